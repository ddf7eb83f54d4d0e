"""What lies at a place of a volume: its marker, its staging folder, its content. And how it is removed.

No symlink is followed (:mod:`checkpoint_operator.storage.folders`): whoever may write into the volume may swap any of it.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import MARKER_NAME
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import marker
from checkpoint_operator.storage.backend import DeleteRequest
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.folders import (
    DIRECTORY,
    hold,
    lock_named,
    open_file,
    opened_below,
    remove_except,
    unlink_below,
)
from checkpoint_operator.storage.hostile import check_names, folders_of
from checkpoint_operator.storage.manifest import StoredFile
from checkpoint_operator.storage.marker import DELETING_NAME, ForeignMarker, Manifest, Seen
from checkpoint_operator.storage.store import PIECE, Arrived, Entry
from checkpoint_operator.storage.verify import FOLDER, Held, link_to

PARTIAL = ".partial-"
"""Begins the name of the folder beside the target in which an artifact is staged; its uid follows."""
NOTHING_LEFT = "nothing is left there"


def read_marker(parent: int, name: str, place: TargetURI) -> Seen | None:
    """What lies at the target; None where nothing does (an empty folder is nothing).

    Raises:
        StorageError: TargetNotEmpty, or TargetBusy where a deletion is under way.
    """
    with ExitStack() as stack:
        try:
            folder = hold(stack, os.open(name, DIRECTORY, dir_fd=parent))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise _not_empty(place, "a file or a symlink is there") from error
        names = os.listdir(folder)
        if DELETING_NAME in names:
            raise StorageError(Reason.TARGET_BUSY, "a checkpoint is being removed there", uri=str(place))
        if names and MARKER_NAME not in names:
            raise _not_empty(place, "the folder is not empty")
        return read_manifest(folder, MARKER_NAME, place) if names else None


def read_manifest(folder: int, name: str, place: TargetURI) -> Seen | None:
    """The marker of that name in an open folder, or None. Raises TargetNotEmpty where it is no marker of ours."""
    try:
        with open_file(folder, name, os.O_RDONLY) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            if (size := os.fstat(descriptor).st_size) > marker.MAX_BYTES:
                raise marker.too_large(size, str(place))
            return marker.decode(file.read(), "", str(place))
    except FileNotFoundError:
        return None


def _not_empty(place: TargetURI, what: str) -> StorageError:
    return StorageError(Reason.TARGET_NOT_EMPTY, f"{what} and belongs to no checkpoint: choose another URI", uri=str(place))


def busy(place: TargetURI) -> StorageError:
    """Another process has the lock, or had it until just now."""
    return StorageError(
        Reason.TARGET_BUSY,
        "another process is writing or removing this artifact right now, or has just finished",
        uri=str(place),
    )


def read_range(folder: int, file: StoredFile, start: int, into: memoryview, arrived: Arrived) -> None:
    """Fill a buffer with a range of a stored file.

    Raises:
        StorageError: IntegrityMismatch where the file is not what was stored; StoreUnavailable where the disk fails.
    """
    try:
        with open_file(folder, file.path, os.O_RDONLY) as descriptor:
            status, got = os.fstat(descriptor), 0
            if not stat.S_ISREG(status.st_mode):
                raise _not_stored(file, "is no file any more")
            if status.st_size != file.size:
                raise _not_stored(file, f"has {status.st_size} bytes, the manifest lists {file.size}")
            while got < len(into) and (count := os.preadv(descriptor, [into[got : got + PIECE]], start + got)):
                arrived(got, got + count)
                got += count
            if got < len(into):
                raise _not_stored(file, "became shorter while it was read")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise _not_stored(file, f"was replaced or removed: {error.strerror}") from error
        reason = Reason.CREDENTIALS_REFUSED if isinstance(error, PermissionError) else Reason.STORE_UNAVAILABLE
        raise StorageError(reason, f"reading '{file.path}' failed: {error.strerror}", path=file.path) from error


def _not_stored(file: StoredFile, what: str) -> StorageError:
    return StorageError(Reason.INTEGRITY_MISMATCH, f"'{file.path}' {what}", path=file.path)


def contents(folder: int) -> Held:
    """Everything below an open folder; staging folders are left out, they belong to artifacts that are being written."""
    entries: list[Entry] = []
    others: dict[str, str] = {}
    for path, directory, name, status in _walk(folder, ""):
        if stat.S_ISREG(status.st_mode):
            entries.append(Entry(path, status.st_size, ""))
        elif stat.S_ISDIR(status.st_mode):
            others[path] = FOLDER
        elif stat.S_ISLNK(status.st_mode):
            others[path] = link_to(os.readlink(name, dir_fd=directory))
        else:
            others[path] = "a FIFO, socket or device"
    nested = tuple(entry.key.removesuffix(MARKER_NAME) for entry in entries if entry.key.endswith(f"/{MARKER_NAME}"))
    return Held(entries, {path: what for path, what in others.items() if not path.startswith(nested)})


def _walk(top: int, prefix: str) -> Iterator[tuple[str, int, str, os.stat_result]]:
    """(path, open folder, name, status) of everything below a folder; as deep as a hostile one may be."""
    pending = [prefix]
    while pending:
        above = pending.pop()
        with suppress(FileNotFoundError, NotADirectoryError), opened_below(top, above) as directory:
            for name in os.listdir(directory):
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                path = f"{above}/{name}" if above else name
                if stat.S_ISDIR(status.st_mode):
                    if name.startswith(PARTIAL):
                        continue
                    pending.append(path)
                yield path, directory, name, status


def remove(parent: int, name: str, place: TargetURI, request: DeleteRequest) -> str:
    """Remove the artifact at a target; one sentence about what was removed or kept.

    Raises:
        StorageError: TargetBusy; UnsupportedName where the manifest was written by somebody who means other files.
    """
    with ExitStack() as stack:
        folder = hold(stack, os.open(name, DIRECTORY, dir_fd=parent))
        if not lock_named(parent, name, folder):
            raise busy(place)
        try:
            seen = read_manifest(folder, DELETING_NAME, place)
            visible = read_manifest(folder, MARKER_NAME, place) if seen is None else None
        except ForeignMarker:
            return "left alone: the .metadata.json there was not written by this software"
        found = seen or visible
        if found is None or not isinstance(found.marker, Manifest):
            return NOTHING_LEFT
        manifest = found.marker
        if request.uid and manifest.artifact_uid != request.uid:
            return f"left alone: it belongs to artifact {manifest.artifact_uid}"
        check_names(manifest.table)
        if visible is not None:
            if request.keep_committed:
                return "the committed checkpoint was kept (deletionPolicy: Retain)"
            os.rename(MARKER_NAME, DELETING_NAME, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        _remove_listed(folder, manifest)
        # Last: without it nobody knows what else is ours, and folders that are left would block the place for ever.
        os.unlink(DELETING_NAME, dir_fd=folder)
        with suppress(OSError):
            os.rmdir(name, dir_fd=parent)
        return NOTHING_LEFT


def _remove_listed(folder: int, manifest: Manifest) -> None:
    table = manifest.table
    for path in (*(file.path for file in table.files), *(link.path for link in table.links)):
        unlink_below(folder, path)
    for path in reversed(folders_of(table)):
        above, _, last = path.rpartition("/")
        with suppress(OSError), opened_below(folder, above) as directory:
            os.rmdir(last, dir_fd=directory)


def remove_staging(parent: int, uid: str, place: TargetURI) -> None:
    """Remove what attempts of an artifact left that were never committed. Raises TargetBusy while one is running."""
    name = PARTIAL + uid
    with suppress(FileNotFoundError), ExitStack() as stack:
        folder = hold(stack, os.open(name, DIRECTORY, dir_fd=parent))
        if not lock_named(parent, name, folder):
            raise busy(place)
        empty_staging(parent, uid, folder)


def empty_staging(parent: int, uid: str, folder: int) -> None:
    """Remove the staging folder that the caller has locked, and everything in it."""
    remove_except(folder, set())
    os.rmdir(PARTIAL + uid, dir_fd=parent)
