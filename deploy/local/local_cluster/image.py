"""The product's image as an archive, for clusters that pull nothing: by Docker where it runs, else on a base made here.

Where there is no registry, the base image cannot be had either. Debian's debootstrap makes a stand-in for it, with the same
release of Debian and of Python, and buildah builds the Dockerfile on that. What pip needs is fetched on the host, with the
host's settings, and handed in as a folder of wheels.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import LocalClusterError
from .paths import cache_root, locked, remove_tree

TAG = "checkpoint-operator:dev"
REPOSITORY = Path(__file__).resolve().parents[3]

_INPUTS = ("Dockerfile", "pyproject.toml", "README.md", "requirements/build.txt", "requirements/image.txt")
_FOLDERS = ("operator", "deploy/image")
_BASE = re.compile(r"^ARG PYTHON_IMAGE=python:(?P<python>\d+\.\d+)-slim-(?P<suite>[a-z]+)$", re.MULTILINE)
_PACKAGES = ("python3", "python3-venv", "python3-pip", "ca-certificates")
_TOOLS = ("buildah", "debootstrap")
# A build leaves its layers in the store, so that the next one need not install everything again.
_STORE_BYTES = 3 << 30
_ARCHIVES_KEPT = 4

Say = Callable[[str], None]


class ImageUnavailable(LocalClusterError):
    """This machine has nothing that could build an image; whoever only wants to test it skips with this text."""


@dataclass(frozen=True)
class Base:
    """What the Dockerfile wants to stand on: a version of Python, a release of Debian."""

    python: str
    suite: str

    @classmethod
    def of(cls, dockerfile: Path) -> Base:
        """Raises LocalClusterError where the default base is none that can be made here."""
        found = _BASE.search(dockerfile.read_text("utf-8"))
        if found is None:
            raise LocalClusterError(f"{dockerfile} has no line 'ARG PYTHON_IMAGE=python:3.x-slim-<release of Debian>'.")
        return cls(found["python"], found["suite"])

    @property
    def image(self) -> str:
        key = hashlib.sha256("\0".join((self.suite, *_PACKAGES)).encode()).hexdigest()[:12]
        return f"localhost/checkpoint-operator-base:{self.python}-{self.suite}-{key}"


def ensure_image(say: Say) -> Path:
    """An archive (docker-archive) of this checkout's image, tagged :data:`TAG`; built first where the cache has none.

    Raises:
        ImageUnavailable: this machine cannot build images; the message says what it lacks.
        LocalClusterError: the build failed; the message has its last words.
    """
    archive = image_archive()
    if archive.exists():
        os.utime(archive)
        return archive
    folder = archive.parent
    with locked(folder / "build.lock", lambda: say("another process builds the image, waiting for it")):
        # From a copy: who edits a file meanwhile gets an image of its own, not half of this one.
        context = folder / ".context"
        _copy_inputs(context)
        archive = image_archive(context)
        if not archive.exists():
            fresh = folder / ".building.tar"
            fresh.unlink(missing_ok=True)
            if _docker_runs():
                _build_with_docker(context, fresh, say)
            else:
                _build_with_buildah(context, fresh, say)
            fresh.rename(archive)
            say(f"the image is {archive.stat().st_size / 1e6:.0f} MB: {archive}")
        _remove(context)
        for old in sorted(folder.glob("image-*.tar"), key=lambda path: path.stat().st_mtime)[:-_ARCHIVES_KEPT]:
            old.unlink()
    return archive


def image_archive(repository: Path = REPOSITORY) -> Path:
    """Where the archive of exactly this content lies, or will lie."""
    digest = hashlib.sha256(platform.machine().encode())
    for path in _files(repository):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(repository)}\0{len(content)}\0".encode() + content)
    return cache_root() / "image" / f"image-{digest.hexdigest()[:16]}.tar"


def _files(repository: Path) -> Iterator[Path]:
    """What the Dockerfile copies, as .dockerignore lets it through."""
    yield from (repository / name for name in _INPUTS)
    for folder in _FOLDERS:
        found = (path for path in (repository / folder).rglob("*") if "__pycache__" not in path.parts)
        yield from sorted(path for path in found if path.is_file() and not path.name.endswith((".pyc", ".pyo")))


def _copy_inputs(context: Path) -> None:
    _remove(context)
    for path in _files(REPOSITORY):
        target = context / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def _docker_runs() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0


def _build_with_docker(context: Path, archive: Path, say: Say) -> None:
    say("building the image with docker")
    _run(["docker", "build", "--tag", TAG, str(context)], archive)
    _run(["docker", "save", "--output", str(archive), TAG], archive)


def _build_with_buildah(context: Path, archive: Path, say: Say) -> None:
    _require_tools(say)
    base = Base.of(context / "Dockerfile")
    store = archive.parent / "store"
    if store.exists() and _size(store) > _STORE_BYTES:
        say(f"emptying the builder's store, it is larger than {_STORE_BYTES >> 30} GB: {store}")
        _forget(store)
    buildah = _buildah(store)
    if subprocess.run([*buildah, "inspect", "--type", "image", base.image], capture_output=True, check=False).returncode:
        _make_base(base, buildah, archive, say)
    wheels = _fetch_wheels(base, context, archive, say)
    say("building the image with buildah (two minutes the first time, kept afterwards)")
    built = f"localhost/{TAG}"
    _run(
        [
            *(*buildah, "build", "--isolation", "chroot", "--pull=never", "--layers", "--tag", built),
            *("--build-arg", f"PYTHON_IMAGE={base.image}"),
            *("--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PIP_FIND_LINKS=/wheels", "--volume", f"{wheels}:/wheels:ro"),
            str(context),
        ],
        archive,
    )
    _run([*buildah, "push", built, f"docker-archive:{archive}:{TAG}"], archive)


def _require_tools(say: Say) -> None:
    """Raises ImageUnavailable where the image can neither be built here nor what builds it be installed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise ImageUnavailable("the image needs a running Docker, or Linux and root for buildah and debootstrap.")
    install_missing(_TOOLS, "the image", say)


def install_missing(programs: Sequence[str], what: str, say: Say) -> None:
    """Install the Debian packages of these programs, which have the same names, where they are missing.

    Raises:
        ImageUnavailable: this is no Debian; names what is missing.
    """
    missing = [name for name in programs if shutil.which(name) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise ImageUnavailable(f"{what} needs {' and '.join(missing)}: install them, or start Docker.")
    say(f"installing the Debian packages {' and '.join(missing)}, which build {what}")
    log = cache_root() / "image" / "packages"
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "--quiet"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run([*apt, "update"], log, environment)
    _run([*apt, "install", "--yes", "--no-install-recommends", *missing], log, environment)


def _buildah(store: Path) -> list[str]:
    """buildah with a store of its own, of the kind that this file system can hold."""
    for driver in ("overlay", "vfs"):
        command = [
            *("buildah", "--root", str(store / driver), "--runroot", str(store / f"{driver}-run")),
            *("--storage-driver", driver),
        ]
        done = subprocess.run([*command, "images"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return command
    raise LocalClusterError(f"buildah can keep nothing in {store}:\n{done.stderr.strip()}")


def _make_base(base: Base, buildah: list[str], archive: Path, say: Say) -> None:
    work = archive.parent / ".base"
    _remove(work)
    work.mkdir(parents=True)
    # Kept beside the store: that is emptied now and then, and what is made from the network need not be made again.
    tar = archive.parent / f"{base.image.rpartition(':')[2]}.tar"
    try:
        if not tar.exists():
            _bootstrap(base, work, archive, say).rename(tar)
        os.link(tar, work / "base.tar")
        (work / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n", "utf-8")
        _run([*buildah, "build", "--isolation", "chroot", "--tag", base.image, str(work)], archive)
    finally:
        _remove(work)


def _bootstrap(base: Base, work: Path, archive: Path, say: Say) -> Path:
    """The files of the stand-in as one tar. Raises LocalClusterError where that Debian has no such Python."""
    say(f"making a stand-in for the base image, Debian {base.suite} with Python {base.python} (about two minutes, once)")
    root, tar = work / "root", work / "fresh.tar"
    _run(["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", base.suite, str(root)], archive)
    if not (root / "usr" / "bin" / f"python{base.python}").exists():
        raise LocalClusterError(f"Debian {base.suite} has no Python {base.python}; the Dockerfile's base wants both.")
    without = [f"--exclude=./{path}" for path in ("dev/*", "var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*")]
    _run(["tar", "--create", "--file", str(tar), *without, "--directory", str(root), "."], archive)
    remove_tree(root)
    return tar


def _fetch_wheels(base: Base, context: Path, archive: Path, say: Say) -> Path:
    """A folder with everything that the locks name, for the image's Python and not for ours."""
    locks = [context / "requirements" / f"{name}.txt" for name in ("image", "build")]
    digest = hashlib.sha256(b"\0".join([base.python.encode(), *(lock.read_bytes() for lock in locks)]))
    wheels = archive.parent / f"wheels-{digest.hexdigest()[:12]}"
    if wheels.exists():
        return wheels
    say("fetching the image's Python packages")
    fresh = archive.parent / ".wheels"
    _remove(fresh)
    machine = platform.machine()
    # pip takes the platforms by their names alone: every manylinux that this Debian's libc can run.
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(41, 4, -1)]
    for lock in locks:
        _run(
            [
                *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"),
                *("--require-hashes", "--only-binary", ":all:", "--python-version", base.python, *platforms),
                *(f"--platform=manylinux2014_{machine}", "--dest", str(fresh), "--requirement", str(lock)),
            ],
            archive,
        )
    for old in archive.parent.glob("wheels-*"):
        _remove(old)
    fresh.rename(wheels)
    return wheels


def _run(command: list[str], archive: Path, environment: dict[str, str] | None = None) -> None:
    """Its output goes into a log beside the archive. Raises LocalClusterError with the log's end."""
    log = archive.parent / "build.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode != 0:
        lines = log.read_text("utf-8", "replace").splitlines()[-15:]
        tail = "\n".join(f"    {line[:300]}" for line in lines)
        raise LocalClusterError(f"{command[0]} failed (status {done.returncode}):\n{tail}\nFull log: {log}")


def _forget(store: Path) -> None:
    for driver in store.glob("*/overlay"):
        # What an interrupted build had mounted would survive the removal of its folder.
        subprocess.run(["umount", "--lazy", str(driver)], capture_output=True, check=False)
    _remove(store)


def _remove(path: Path) -> None:
    if path.exists():
        remove_tree(path)


def _size(folder: Path) -> int:
    shown = subprocess.run(
        ["du", "--summarize", "--one-file-system", "--block-size=1", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(shown.stdout.split()[0]) if shown.returncode == 0 else 0
