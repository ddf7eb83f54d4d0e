"""Copies a source into the staging folder of the file backend: durably, several files at once, and never twice.

The kernel copies where it can (copy_file_range: a reflink, or a copy on the server, where the file system has them), and
the hash is computed from the private copy: the source is read once, and what was hashed is what was stored.

**What a later attempt trusts.** A line of the journal is written only after the file's bytes are on the disk. It names the
state of the source (size, mtime, inode, ctime) and of the copy (inode, ctime). Every later write to either changes its
ctime, which no program can set back, so while both are what the line says, the hash in it still holds: neither is read
again. A line that a power cut took away costs a second copy, nothing else.

Memory: one buffer of :data:`CHUNK` for each of the :data:`WORKERS`.
"""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import PROBE_PREFIX
from checkpoint_operator.api.protocol import Stage
from checkpoint_operator.storage.backend import UploadRequest
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.folders import (
    create_anew,
    is_private,
    make_below,
    open_file,
    read_small,
    remove_except,
    start_writeback,
    write_all,
)
from checkpoint_operator.storage.manifest import StoredFile
from checkpoint_operator.storage.marker import MAX_BYTES
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.parallel import for_each
from checkpoint_operator.storage.source import OpenFile, SourceFile, SourceTree

WORKERS = 4
CHUNK = 8 << 20
JOURNAL = f"{PROBE_PREFIX}staged"
"""A name that no source may have at its root."""

_ZEROS = memoryview(bytes(CHUNK))
_NOT_IN_KERNEL = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EIO, errno.EPERM, errno.ETXTBSY, errno.EBADF}
)
"""Where copy_file_range cannot, or cannot say whose fault it is: reading and writing can."""


def stage_all(tree: SourceTree, files: tuple[SourceFile, ...], staging: int, request: UploadRequest) -> list[StoredFile]:
    """Copy every file of a source into a locked staging folder; what an earlier attempt has finished there is kept.

    Raises:
        StorageError: SourceChanged, SourceUnreadable, IntegrityMismatch.
        OSError: what the target's disk says.
        Cancelled: when the request's event was set; it is looked at before each piece.
    """
    meter = Meter(request.progress)
    meter.start(Stage.UPLOADING, len(files), sum(file.size for file in files))
    journal = _Journal(staging)
    remove_except(staging, {JOURNAL, *(file.path for file in files)})
    for folder in sorted({file.path.rpartition("/")[0] for file in files}):
        os.close(make_below(staging, folder))
    digests: dict[str, str] = {}

    def settle(file: SourceFile) -> None:
        with tree.open(file) as source:
            digests[file.path] = _stage(source, staging, journal, request.cancelled, meter)
        meter.add(0, files=1)

    for_each(settle, files, workers=WORKERS, name="stage")
    meter.stage(Stage.VERIFYING)
    for file in files:
        with open_file(staging, file.path, os.O_RDONLY) as descriptor:
            if (size := os.fstat(descriptor).st_size) != file.size:
                raise StorageError(
                    Reason.INTEGRITY_MISMATCH,
                    f"'{file.path}' has {size} bytes after {file.size} were written",
                    path=file.path,
                )
    return [
        StoredFile(path=file.path, size=file.size, sha256=digests[file.path], mode=file.mode, mtime_ns=file.mtime_ns)
        for file in files
    ]


def _stage(source: OpenFile, staging: int, journal: "_Journal", cancelled: threading.Event, meter: Meter) -> str:
    file = source.file
    if kept := journal.trusted(source, staging):
        if cancelled.is_set():
            raise Cancelled
        meter.add(file.size)
        return kept
    create_anew(staging, file.path)
    with open_file(staging, file.path, os.O_RDWR) as target:
        before = os.fstat(source.descriptor)
        digest = _copy(source, target, cancelled, meter)
        source.check_unchanged()
        os.utime(target, ns=(file.mtime_ns, file.mtime_ns))
        os.fsync(target)
        journal.add(_Line.of(file.path, before, os.fstat(target), digest))
    return digest


def _copy(source: OpenFile, target: int, cancelled: threading.Event, meter: Meter) -> str:
    """Copy the bytes; the hex digest of the copy."""
    size, digest, in_kernel = source.file.size, hashlib.sha256(), True
    whole = bytearray(min(CHUNK, size))
    buffer = memoryview(whole)
    os.ftruncate(target, size)
    for start, length, is_data in _pieces(source.descriptor, size):
        if cancelled.is_set():
            raise Cancelled
        piece = buffer[:length]
        if in_kernel and is_data:
            source.pace.spend(length)  # else it is read, and reading keeps the pace
        in_kernel = in_kernel and (not is_data or _copy_in_kernel(source.descriptor, target, start, length))
        if in_kernel and is_data:
            _read_back(target, piece, start, source.file.path)
        else:
            source.read_into(start, piece)
            # A hole that a file system reports stays one in the copy, but nobody's word is taken for it.
            if is_data or not whole.startswith(_ZEROS[:length]):
                write_all(target, piece, start)
        if size > CHUNK:
            start_writeback(target, start, length)
        digest.update(piece)
        meter.add(length)
    return digest.hexdigest()


def _pieces(descriptor: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """(start, length, whether it may hold data) of every piece."""
    data_from, hole_from = 0, 0
    for start in range(0, size, CHUNK):
        end = min(start + CHUNK, size)
        if hole_from <= start:
            data_from, hole_from = _next_data(descriptor, start, size)
        yield start, end - start, data_from < end


def _next_data(descriptor: int, start: int, size: int) -> tuple[int, int]:
    """Where the next data begins and ends; everything is data to a file system that does not know."""
    try:
        begin = os.lseek(descriptor, start, os.SEEK_DATA)
        return begin, os.lseek(descriptor, begin, os.SEEK_HOLE)
    except OSError as error:
        return (size, size) if error.errno == errno.ENXIO else (start, size)


def _copy_in_kernel(source: int, target: int, start: int, length: int) -> bool:
    """False where the kernel did not do it all: then the piece is read and written as a whole."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source, target, length - done, start + done, start + done)
        except OSError as error:
            if error.errno in _NOT_IN_KERNEL:
                return False
            raise
        if not count:
            return False
        done += count
    return True


def _read_back(target: int, piece: memoryview, start: int, path: str) -> None:
    got = 0
    while got < len(piece):
        count = os.preadv(target, [piece[got:]], start + got)
        if not count:
            raise StorageError(
                Reason.INTEGRITY_MISMATCH, f"the copy of '{path}' is shorter than what was written", path=path
            )
        got += count


@dataclass(frozen=True)
class _Line:
    """One staged file: the state of its source and of its copy when the hash was true of both."""

    path: str
    source: tuple[int, int, int, int]
    copy: tuple[int, int, int]
    sha256: str

    @classmethod
    def of(cls, path: str, source: os.stat_result, copy: os.stat_result, sha256: str) -> "_Line":
        return cls(
            path,
            (source.st_size, source.st_mtime_ns, source.st_ino, source.st_ctime_ns),
            (copy.st_size, copy.st_ino, copy.st_ctime_ns),
            sha256,
        )


class _Journal:
    """The lines that earlier attempts left, and those of this one."""

    def __init__(self, staging: int) -> None:
        self._staging = staging
        self._lock = threading.Lock()
        self._lines = {line.path: line for line in _read_lines(read_small(staging, JOURNAL, MAX_BYTES))}

    def trusted(self, source: OpenFile, staging: int) -> str | None:
        """The hash of a staged file, where neither it nor its source has changed since."""
        path = source.file.path
        line = self._lines.get(path)
        if line is None:
            return None
        try:
            with open_file(staging, path, os.O_RDONLY) as descriptor:
                status = os.fstat(descriptor)
        except OSError:
            return None
        is_same = is_private(status) and _Line.of(path, os.fstat(source.descriptor), status, line.sha256) == line
        return line.sha256 if is_same else None

    def add(self, line: _Line) -> None:
        text = json.dumps([line.path, line.source, line.copy, line.sha256]) + "\n"
        with self._lock, open_file(self._staging, JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) as file:
            os.write(file, text.encode())


def _read_lines(data: bytes | None) -> Iterator[_Line]:
    for text in (data or b"").splitlines():
        with suppress(ValueError, TypeError):  # cut off by a kill, or of another version
            path, source, copy, sha256 = json.loads(text)
            yield _Line(path, tuple(source), tuple(copy), sha256)
