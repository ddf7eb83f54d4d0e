"""Names below an open folder, component by component, without ever following a symlink.

Whoever can write to a volume can swap a folder for a link between our look and our open. So every path is walked by
descriptors with O_NOFOLLOW: a swap gives an error, not another place.
"""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from checkpoint_operator.api.names import PROBE_PREFIX
from checkpoint_operator.storage.store import Buffer

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_directory(root: str, path: str) -> int:
    """Open ``path`` below ``root`` without following a symlink below the root; the caller closes the descriptor.

    Raises:
        OSError: as open(2) gives it; ELOOP or ENOTDIR where a component is a symlink or no folder.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_below(descriptor, path)
    finally:
        os.close(descriptor)


def open_below(directory: int, path: str) -> int:
    """Like :func:`open_directory`, starting from an open folder, which stays open."""
    current = os.dup(directory)
    for segment in [part for part in path.split("/") if part not in ("", ".")]:
        try:
            if segment == "..":
                raise NotADirectoryError(errno.ENOTDIR, "'..' is not followed", path)
            deeper = os.open(segment, DIRECTORY, dir_fd=current)
        finally:
            os.close(current)
        current = deeper
    return current


def remove_except(folder: int, keep: set[str], owner: int | None = None, prefix: str = "") -> None:
    """Remove everything from a staging folder but the regular files in ``keep``, and folders that become empty.

    A file that has another name too (a hard link: it may be anybody's) or that is another user's is not kept.
    """
    for name in os.listdir(folder):
        path = prefix + name
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            with opened_below(folder, name) as deeper:
                remove_except(deeper, keep, owner, f"{path}/")
            with suppress(OSError):
                os.rmdir(name, dir_fd=folder)
        elif path not in keep or not is_private(status) or owner not in (None, status.st_uid):
            os.unlink(name, dir_fd=folder)


def is_private(status: os.stat_result) -> bool:
    """A regular file with one name: writing into it changes nothing elsewhere."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def create_anew(folder: int, path: str) -> None:
    """An empty file in the place of whatever file or link is there."""
    unlink_below(folder, path)
    with open_file(folder, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666):
        pass


def make_link(folder: int, path: str, target: str) -> None:
    """Make a symlink, and the folders that it lies in."""
    above, _, name = path.rpartition("/")
    os.close(make_below(folder, above))
    with opened_below(folder, above) as directory:
        os.symlink(target, name, dir_fd=directory)


def unlink_below(folder: int, path: str) -> None:
    """Remove a file or a link; one that is gone is fine."""
    above, _, name = path.rpartition("/")
    with suppress(FileNotFoundError, NotADirectoryError), opened_below(folder, above) as directory:
        os.unlink(name, dir_fd=directory)


def write_durably(folder: int, name: str, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with open_file(folder, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) as descriptor:
        write_all(descriptor, data, 0)
        os.fsync(descriptor)


def read_small(folder: int, name: str, limit: int) -> bytes | None:
    """A small file's bytes; None where there is none, or something else than a file, or one of more than ``limit`` bytes."""
    try:
        with open_file(folder, name, os.O_RDONLY) as descriptor:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
                return None
            return os.pread(descriptor, limit, 0)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR):
            return None
        raise


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Ask the kernel to write a range to the disk from now on, so that the fsync at the end has little left to do."""
    # The pages are dirty and stay; what DONTNEED does to them is to start their writeback (mm/fadvise.c).
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def write_all(descriptor: int, data: Buffer, offset: int) -> None:
    """``pwrite`` until everything is written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def sync_folders(folder: int) -> None:
    """fsync a folder and every folder below it: a rename is durable only when the names are."""
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            with opened_below(folder, name) as deeper:
                sync_folders(deeper)
    os.fsync(folder)


def hold(stack: ExitStack, descriptor: int) -> int:
    """The descriptor, which the stack closes."""
    stack.callback(os.close, descriptor)
    return descriptor


def open_directory_in(stack: ExitStack, parent: int, name: str) -> int | None:
    """Open a folder (made if need be) and lock it until the stack is closed; None where another process has it.

    Raises:
        NotADirectoryError: something else, or a symlink, has the name.
    """
    with suppress(FileExistsError):
        os.mkdir(name, 0o777, dir_fd=parent)
    try:
        folder = hold(stack, os.open(name, DIRECTORY, dir_fd=parent))
    except FileNotFoundError:
        return None  # its last holder has just renamed it
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name) from error
        raise
    return folder if lock_named(parent, name, folder) else None


def lock_named(parent: int, name: str, folder: int) -> bool:
    """Lock an open folder that still has its name: between open and lock its last holder may have renamed it."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except (BlockingIOError, FileNotFoundError):
        return False
    return os.path.samestat(current, os.fstat(folder))


def owner_here(folder: int) -> int:
    """The user that a file gets which this process makes there; a network file system may have its own idea of that."""
    name = f"{PROBE_PREFIX}{secrets.token_hex(8)}"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        os.unlink(name, dir_fd=folder)


def open_in(stack: ExitStack, root: str, path: str) -> int:
    """Like :func:`open_directory`; the stack closes the descriptor."""
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, top)
    folder = open_below(top, path)
    stack.callback(os.close, folder)
    return folder


@contextmanager
def opened_below(folder: int, path: str) -> Iterator[int]:
    """Like :func:`open_below`, closed at the end."""
    descriptor = open_below(folder, path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_below(folder: int, path: str) -> int:
    """Like :func:`open_below`, making what is missing."""
    current = os.dup(folder)
    for segment in [part for part in path.split("/") if part]:
        try:
            with suppress(FileExistsError):
                os.mkdir(segment, 0o777, dir_fd=current)
            deeper = os.open(segment, DIRECTORY, dir_fd=current)
        finally:
            os.close(current)
        current = deeper
    return current


@contextmanager
def open_file(folder: int, path: str, flags: int, mode: int = 0) -> Iterator[int]:
    """A file below an open folder, closed at the end. ``flags`` as for open(2)."""
    above, _, name = path.rpartition("/")
    with opened_below(folder, above) as directory:
        # O_NONBLOCK means nothing to a file; a FIFO that somebody planted would block us for ever.
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
