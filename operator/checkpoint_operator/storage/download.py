"""Puts a committed artifact back on a disk: whole and verified, or not at all.

Files are staged in ``<destination>.partial``, which a later call for the same manifest goes on with, and appear by one
rename. The destination is as hostile as the manifest: every path below its parent is walked without following a link
(:mod:`checkpoint_operator.storage.folders`), and what lies in the staging folder counts only once it has been hashed.

A range is written as soon as it is there, so a file that was left half done may have holes, within the last
:data:`~checkpoint_operator.storage.ranges.SLOTS` ranges. The next call hashes what lies before the first hole and goes on
behind it; if the whole then has another hash than the manifest says, what was found is fetched again as well.
"""

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import MARKER_NAME
from checkpoint_operator.api.protocol import Stage
from checkpoint_operator.storage import marker
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.folders import (
    create_anew,
    hold,
    open_directory_in,
    open_file,
    owner_here,
    read_small,
    remove_except,
    start_writeback,
    sync_folders,
    write_all,
    write_durably,
)
from checkpoint_operator.storage.hostile import check_names
from checkpoint_operator.storage.layout import lay_out
from checkpoint_operator.storage.manifest import StoredFile
from checkpoint_operator.storage.marker import Manifest, Uploading
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.parallel import for_each
from checkpoint_operator.storage.ranges import RANGE, WORKERS, Fetch, Stream, by_size, fetch_all, mismatch
from checkpoint_operator.storage.store import Arrived

PARTIAL = ".partial"
RESTORING = "restore"
"""The claim id in the marker of a staging folder: no upload has it, so that a checkpoint is never taken for one."""
_NOTE_BYTES = 64 << 10
_HASH_BYTES = 1 << 20


def download(
    manifest: Manifest, fetch: Fetch, destination: Path, meter: Meter, cancelled: threading.Event | None = None
) -> None:
    """Fetch every file of a manifest into ``destination``, which must not exist.

    Memory: that of :mod:`checkpoint_operator.storage.ranges`, and the manifest.

    Raises:
        StorageError: DestinationExists; TargetBusy where another process downloads to the same place; UnsupportedName for a
            name that is refused or that the disk cannot hold; IntegrityMismatch; RequestRejected where the disk refuses to
            be written (what was fetched stays for the next call); and what ``fetch`` raises.
        Cancelled: when the event was set; it is looked at before each range.
    """
    if os.path.lexists(destination):
        raise _exists(destination, "download into a new folder")
    check_names(manifest.table)
    try:
        with ExitStack() as stack:
            _download(stack, manifest, fetch, destination, meter, cancelled or threading.Event())
    except OSError as error:
        raise _disk_refused(destination, error) from error


def _download(
    stack: ExitStack, manifest: Manifest, fetch: Fetch, destination: Path, meter: Meter, cancelled: threading.Event
) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    parent = hold(stack, os.open(destination.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    folder = _open_staging(stack, parent, destination, manifest)
    table = manifest.table
    meter.start(Stage.VERIFYING, len(table.files), table.size)
    found = lay_out(folder, table, str(destination))
    again: list[StoredFile] = []

    def landing(file: StoredFile) -> "_Landing":
        return _Landing(folder, file, again, meter)

    resumed: list[_Landing] = []
    for_each(
        lambda file: resumed.extend(_go_on(folder, landing(file), meter, cancelled)),
        [file for file in table.files if file.path in found],
        workers=WORKERS,
        name="restore",
    )

    fetch_all(resumed, fetch, meter, cancelled)
    for small, files in by_size(file for file in table.files if file.path not in found):
        fetch_all(map(landing, files), fetch, meter, cancelled, small=small)
    for file in again:
        create_anew(folder, file.path)
    fetch_all([landing(file) for file in again], fetch, meter, cancelled)
    sync_folders(folder)
    try:
        os.rename(destination.name + PARTIAL, destination.name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise _exists(destination, "it appeared during the download, whose files are beside it") from error
        raise
    # Not before: without its marker nobody could tell the staging folder from one of the user's.
    os.unlink(MARKER_NAME, dir_fd=folder)
    os.fsync(folder)
    os.fsync(parent)
    meter.stage(Stage.VERIFYING)


def _open_staging(stack: ExitStack, parent: int, destination: Path, manifest: Manifest) -> int:
    """The locked staging folder with its marker, which says for which manifest it is; of another one it is emptied."""
    name, shown = destination.name + PARTIAL, Path(f"{destination}{PARTIAL}")
    try:
        folder = open_directory_in(stack, parent, name)
    except NotADirectoryError as error:
        raise _exists(shown, "and is no download of ours: remove it, or choose another destination") from error
    if folder is None:
        raise StorageError(
            Reason.TARGET_BUSY, f"another process is downloading to '{destination}' right now", path=str(destination)
        )
    note = marker.encode(
        Uploading(
            artifact_uid=manifest.artifact_uid,
            claim_id=RESTORING,
            source_fingerprint=marker.digest(marker.encode(manifest)),
        )
    )
    left = read_small(folder, MARKER_NAME, _NOTE_BYTES)
    if left != note and not _is_ours(folder, left):
        raise _exists(shown, "and is no download of ours: remove it, or choose another destination")
    if os.fstat(folder).st_uid != (owner := owner_here(folder)):
        raise _exists(shown, f"and belongs to another user than {owner}, who could change what is put there: remove it")
    if left == note:
        remove_except(folder, {MARKER_NAME, *(file.path for file in manifest.table.files)}, owner)
    else:
        remove_except(folder, set(), owner)
        write_durably(folder, MARKER_NAME, note)
    return folder


def _is_ours(folder: int, note: bytes | None) -> bool:
    """Whether a staging folder is one of a download, or of one that was killed before it could say so."""
    if not note:
        names = set(os.listdir(folder))
        return not names or (note == b"" and names == {MARKER_NAME})
    try:
        found = marker.decode(note, "", "").marker
    except StorageError:
        return False
    return isinstance(found, Uploading) and found.claim_id == RESTORING


def _go_on(folder: int, landing: "_Landing", meter: Meter, cancelled: threading.Event) -> list["_Landing"]:
    """Hash what an earlier call left of a file: what is still to be fetched of it (nothing, if it is whole)."""
    file = landing.file
    with open_file(folder, file.path, os.O_RDWR) as left:
        end = _first_hole(left)
        size = os.fstat(left).st_size
        if size <= file.size:
            landing.position = _hash(left, end, landing.digest, cancelled)
        if size != landing.position:
            os.ftruncate(left, landing.position)
    if landing.position < file.size:
        landing.is_resumed = landing.position > 0
        meter.add(landing.position)
        return [landing]
    if landing.digest.hexdigest() == file.sha256:
        landing.settle()
        meter.add(file.size, files=1)
        return []
    create_anew(folder, file.path)
    landing.position, landing.digest = 0, hashlib.sha256()
    return [landing]


def _first_hole(descriptor: int) -> int:
    size = os.fstat(descriptor).st_size
    try:
        return min(size, os.lseek(descriptor, 0, os.SEEK_HOLE)) if size else 0
    except OSError:  # a file system that has none: then the hash of the whole decides
        return size


def _hash(descriptor: int, end: int, digest: "hashlib._Hash", cancelled: threading.Event) -> int:
    """Hash the first ``end`` bytes; how many there were."""
    buffer, position = memoryview(bytearray(_HASH_BYTES)), 0
    while position < end:
        if cancelled.is_set():
            raise Cancelled
        count = os.preadv(descriptor, [buffer[: min(_HASH_BYTES, end - position)]], position)
        if not count:
            break
        digest.update(buffer[:count])
        position += count
    return position


class _Landing(Stream):
    """A file that is written into the staging folder."""

    def __init__(self, folder: int, file: StoredFile, again: list[StoredFile], meter: Meter) -> None:
        super().__init__(file)
        self._folder = folder
        self._again = again
        self._meter = meter
        self.is_resumed = False

    @contextmanager
    def receive(self, start: int, body: memoryview) -> Iterator[Arrived]:
        with open_file(self._folder, self.file.path, os.O_WRONLY) as target:

            def write(first: int, last: int) -> None:
                try:
                    write_all(target, body[first:last], start + first)
                except OSError as error:
                    raise _DiskRefused(error) from error

            try:
                yield write
            except _DiskRefused as refused:
                raise refused.error from None
            if self.file.size > RANGE:
                start_writeback(target, start, len(body))

    def finish(self, sha256: str) -> None:
        if sha256 == self.file.sha256:
            self.settle()
        elif self.is_resumed:
            self._again.append(self.file)
            self._meter.add(-self.file.size, files=-1)
        else:
            raise mismatch(self.file, sha256)

    def settle(self) -> None:
        """The bytes are right: mode (never setuid and the like), time, and on the disk."""
        file = self.file
        with open_file(self._folder, file.path, os.O_RDONLY) as target:
            status = os.fstat(target)
            _as_it_was(file, target, status)
            os.fsync(target)


class _DiskRefused(Exception):
    """On its way through a store, which would take an OSError for one of its own."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


def _as_it_was(file: StoredFile, target: int, status: os.stat_result) -> None:
    try:
        if file.mode is not None and stat.S_IMODE(status.st_mode) != file.mode & 0o777:
            os.chmod(target, file.mode & 0o777)
        if file.mtime_ns is not None and status.st_mtime_ns != file.mtime_ns:
            os.utime(target, ns=(file.mtime_ns, file.mtime_ns))
    except PermissionError:
        return  # a file system without modes; the content does not depend on them


def _exists(path: Path, what: str) -> StorageError:
    return StorageError(Reason.DESTINATION_EXISTS, f"'{path}' exists: {what}", path=str(path))


_WAYS_OUT = {
    errno.ENOSPC: "free some space and download again, what was fetched is kept beside it",
    errno.EDQUOT: "free some space and download again, what was fetched is kept beside it",
    errno.EROFS: "choose a destination that can be written",
    errno.EACCES: "choose a destination that can be written",
}


def _disk_refused(destination: Path, error: OSError) -> StorageError:
    way_out = _WAYS_OUT.get(error.errno or 0)
    return StorageError(
        Reason.REQUEST_REJECTED,
        f"writing to '{destination}' failed: {error.strerror}{f': {way_out}' if way_out else ''}",
        operation="download",
        path=str(destination),
    )
