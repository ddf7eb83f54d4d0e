"""Names below an open folder, component by component, without ever following a symlink.

Whoever can write to a volume can swap a folder for a link between our look and our open. So every path is walked by
descriptors with O_NOFOLLOW: a swap gives an error, not another place.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

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


def remove_except(folder: int, keep: set[str], prefix: str = "") -> None:
    """Remove everything from a staging folder but the regular files in ``keep``, and folders that become empty."""
    for name in os.listdir(folder):
        path = prefix + name
        kind = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        if stat.S_ISDIR(kind):
            deeper = os.open(name, DIRECTORY, dir_fd=folder)
            try:
                remove_except(deeper, keep, f"{path}/")
            finally:
                os.close(deeper)
            with suppress(OSError):
                os.rmdir(name, dir_fd=folder)
        elif path not in keep or not stat.S_ISREG(kind):
            os.unlink(name, dir_fd=folder)


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


def write_all(descriptor: int, data: bytes, offset: int) -> None:
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
