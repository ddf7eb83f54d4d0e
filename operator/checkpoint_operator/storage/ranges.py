"""Fetches the files of a manifest in parallel ranges and hashes each file in order: what restore and verify share.

SHA-256 of a file cannot be computed in parallel, so the ranges of one file are fetched by several threads into private
buffers, and whichever thread brings the one that is due hashes it, and all that wait behind it, while the others fetch on.

Memory: ``SLOTS * RANGE`` = 32 MiB at most, whatever the files' sizes and number: a range has a slot from before it is
fetched until it is hashed. Ranges are taken in the order of the file, so that the one that is due always has a slot.
Ranges of twice the size were no faster on loopback, and every thread's heap keeps one or two of them: 30 MiB more in all.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.manifest import StoredFile
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.parallel import for_each
from checkpoint_operator.storage.store import Buffer

RANGE = 4 << 20
SLOTS = 8
WORKERS = 6

Fetch = Callable[[StoredFile, int, int], Buffer]
"""(file, start, length) → exactly that range of exactly the stored version."""


class Stream:
    """One file on its way. A subclass says what becomes of the bytes (:meth:`keep`) and of a failure (:meth:`fail`).

    ``position`` bytes are hashed, in ``digest``; a stream may begin behind the start, with the digest of what lies before.
    """

    def __init__(self, file: StoredFile, position: int = 0, digest: "hashlib._Hash | None" = None) -> None:
        self.file = file
        self.position = position
        self.digest = digest or hashlib.sha256()
        self.failed = False
        self._lock = threading.Lock()
        self._waiting: dict[int, Buffer] = {}
        self._is_hashing = False

    def keep(self, start: int, body: Buffer) -> None:
        """A range has arrived; called from several threads, in any order."""

    def finish(self, sha256: str) -> None:
        """Every byte was kept and hashed."""

    def fail(self, error: StorageError) -> None:
        """The file cannot be had. What this raises ends the whole transfer; otherwise the file is left out."""
        raise error

    def put(self, start: int, body: Buffer) -> Iterator[int]:
        """Hash what is due, if nobody else is at it; the sizes of the ranges as they are done."""
        with self._lock:
            is_late = self.failed
            if not is_late:
                self._waiting[start] = body
                if self._is_hashing:
                    return
                self._is_hashing = True
        if is_late:  # its slot is free again, and nothing was hashed
            yield 0
            return
        while (due := self._next()) is not None:
            self.digest.update(due)
            self.position += len(due)
            yield len(due)

    def _next(self) -> Buffer | None:
        with self._lock:
            due = self._waiting.pop(self.position, None)
            self._is_hashing = due is not None
            return due

    def drop(self) -> int:
        """Forget what waits; how many ranges that were."""
        with self._lock:
            self.failed = True
            dropped = len(self._waiting)
            self._waiting.clear()
            return dropped


def fetch_all(streams: Iterable[Stream], fetch: Fetch, meter: Meter, cancelled: threading.Event) -> None:
    """Bring every stream to its end.

    Raises:
        StorageError: what ``fetch`` or a stream raised first; the others stop at their next range.
        Cancelled: when the event was set; it is looked at before each range.
    """
    slots = threading.Semaphore(SLOTS)

    def ranges() -> Iterator[tuple[Stream, int, int]]:
        for stream in streams:
            size, first = stream.file.size, stream.position
            for start in range(first, size, RANGE) if size > first else (first,):
                if stream.failed:
                    break
                slots.acquire()
                yield stream, start, min(RANGE, size - start)

    def bring(task: tuple[Stream, int, int]) -> None:
        stream, start, length = task
        if cancelled.is_set():
            raise Cancelled
        try:
            body = fetch(stream.file, start, length) if length else b""
            _check_length(stream.file, start, length, body)
        except StorageError as error:
            stream.fail(error)
            slots.release(1 + stream.drop())
            return
        if not stream.failed:
            stream.keep(start, body)
        for done in stream.put(start, body):
            slots.release()
            meter.add(done)
            if stream.position == stream.file.size:
                stream.finish(stream.digest.hexdigest())
                meter.add(0, files=1)

    # Each thread may take one more range after the end was called; none may wait for a slot then.
    for_each(bring, ranges(), workers=WORKERS, name="fetch", on_stop=lambda: slots.release(WORKERS))


def _check_length(file: StoredFile, start: int, length: int, body: Buffer) -> None:
    if len(body) != length:
        raise StorageError(
            Reason.INTEGRITY_MISMATCH,
            f"'{file.path}' is shorter than its manifest says: {len(body)} of {length} bytes came back at {start}",
            path=file.path,
        )


def mismatch(file: StoredFile, sha256: str) -> StorageError:
    """The error for a file with other bytes than its manifest lists."""
    return StorageError(
        Reason.INTEGRITY_MISMATCH,
        f"'{file.path}' came back as sha256 {sha256}, the manifest says {file.sha256}",
        path=file.path,
    )
