"""By this lock a later operator sees whether an earlier mover is gone, even after a crash of both."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage import StorageError


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the flock of a file for as long as the mover lives; the kernel frees it with the process.

    Raises:
        StorageError: EarlierMoverNotGone where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StorageError(
                Reason.EARLIER_MOVER_NOT_GONE, f"an earlier mover of this artifact is still running (it holds {path})"
            ) from error
        if _is_current(descriptor, path):
            break
        os.close(descriptor)  # removed by its last holder between our open and our lock
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
