"""Finds promtool, which tests alert rules, and fetches Debian's where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import LocalClusterError
from .paths import cache_root, locked

_ADVICE = "Install promtool (Debian: apt-get install prometheus) and put it on PATH."


def ensure_promtool(say: Callable[[str], None]) -> Path:
    """The `promtool` on PATH, or the one of Debian's package, put into the cache: nothing is installed or started.

    Raises:
        LocalClusterError: there is none, and none can be fetched; it says what to install.
    """
    if on_path := shutil.which("promtool"):
        return Path(on_path)
    program = cache_root() / "promtool" / "promtool"
    with locked(cache_root() / "promtool" / "lock", lambda: say("another process fetches promtool, waiting for it")):
        if not os.access(program, os.X_OK):
            say(f"there is no promtool on PATH: taking Debian's into {program.parent}")
            _fetch(program)
    return program


def _fetch(program: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise LocalClusterError(f"there is no promtool on PATH, and no apt to fetch one. {_ADVICE}")
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        # apt leaves root for the download, and that user must be able to write here.
        Path(scratch).chmod(0o777)
        command = ["apt-get", "download", "-qq", "prometheus"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        packages = list(Path(scratch).glob("prometheus_*.deb"))
        if done.returncode != 0 or len(packages) != 1:
            tail = done.stderr.strip().splitlines()[-1:] or ["no package came"]
            raise LocalClusterError(
                f"there is no promtool on PATH, and apt gave none ({tail[0]}); try apt-get update. {_ADVICE}"
            )
        unpacked = Path(scratch) / "root"
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(unpacked)], check=True, capture_output=True)
        (unpacked / "usr" / "bin" / "promtool").replace(program)
