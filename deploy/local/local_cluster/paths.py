"""Where files go: builds and detached clusters in the cache, what dies with its starter in the temp dir."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import LocalClusterError

CACHE_VARIABLE = "CHECKPOINT_OPERATOR_CACHE"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


def cache_root() -> Path:
    override = os.environ.get(CACHE_VARIABLE)
    root = Path(override).expanduser() if override else Path.home() / ".cache" / "checkpoint-operator"
    return root.absolute()


def clusters_dir() -> Path:
    return _private(cache_root() / "clusters")


def runs_dir() -> Path:
    """Short on purpose: unix sockets live below it, and their paths end at 107 bytes."""
    path = _private(Path(tempfile.gettempdir()) / f"ckpt-local-{os.getuid()}")
    if path.stat().st_uid != os.getuid():
        raise LocalClusterError(f"{path} belongs to another user; set TMPDIR to a folder of your own.")
    return path


def new_run_dir(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{checked_name(name)}-", dir=runs_dir()))


def checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise LocalClusterError(f"cluster name {name!r} is not usable: use a-z, 0-9 and '-', at most 40 characters.")
    return name


def private_file(path: Path, text: str) -> Path:
    """Written with mode 0600 from its first byte on: a chmod afterwards would leave a moment to read it."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    return path


def remove_tree(path: Path) -> None:
    """A program that is just being killed may still create a file: one more try, then say so."""
    for attempt in range(5):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1 * (attempt + 1))
    raise LocalClusterError(f"{path} cannot be removed; look at who owns it and remove it by hand.")


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on `path`; `waiting` is called once when somebody else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _private(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LocalClusterError(
            f"{path} cannot be created ({error.strerror}); set {CACHE_VARIABLE} or TMPDIR to another."
        ) from error
    return path
