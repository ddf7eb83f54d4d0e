"""Fetches the files of a manifest in parallel ranges and hashes each file in order: what restore and verify share.

SHA-256 of a file cannot be computed in parallel, so the ranges of one file are fetched by several threads into private
buffers, and whichever thread brings the one that is due hashes it, and all that wait behind it, while the others fetch on.

Memory: ``SLOTS * RANGE`` at most, 32 MiB on two cores and 56 MiB on many, whatever the files' sizes and number: a range has
one of so many buffers from before it is fetched until it is hashed. Ranges are taken in the order of the file, so that the
one that is due always has one. Small files come after the large ones, in smaller buffers and by more threads: of these most
wait for the store (:mod:`checkpoint_operator.storage.turn`).
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from mmap import mmap
from queue import SimpleQueue

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.manifest import StoredFile
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.parallel import for_each
from checkpoint_operator.storage.store import Arrived, unheard
from checkpoint_operator.storage.turn import SMALL

RANGE = 8 << 20
WORKERS = min(6, max(3, (os.cpu_count() or 1) + 1))
"""Fetches at once. Decryption, hash and copies keep a core busy each, and threads beyond that take it from one another: on
two cores six were a fifth slower than three (1 GiB over TLS on loopback)."""
SLOTS = WORKERS + 1
SMALL_WORKERS = 24
"""Small files that are fetched at once: with 20 ms for an answer a thousand a second. On loopback, where nobody waits, it
costs a twentieth more than three at once."""

Fetch = Callable[[StoredFile, int, memoryview, Arrived], None]
"""(file, start, into, arrived): fill a buffer with the range of exactly the stored version that begins there."""


class Stream:
    """One file on its way. A subclass says what becomes of the bytes (:meth:`receive`) and of a failure (:meth:`fail`).

    ``position`` bytes are hashed, in ``digest``; a stream may begin behind the start, with the digest of what lies before.
    """

    def __init__(self, file: StoredFile, position: int = 0, digest: "hashlib._Hash | None" = None) -> None:
        self.file = file
        self.position = position
        self.digest = digest or hashlib.sha256()
        self.failed = False
        self._lock = threading.Lock()
        self._waiting: dict[int, memoryview] = {}
        self._is_hashing = False

    def receive(self, start: int, body: memoryview) -> AbstractContextManager[Arrived]:
        """For the time in which the range that begins at ``start`` comes into ``body``; from several threads, in any order.

        What is raised at its end fails the transfer, not the file.
        """
        return nullcontext(unheard)

    def finish(self, sha256: str) -> None:
        """Every byte was kept and hashed."""

    def fail(self, error: StorageError) -> None:
        """The file cannot be had. What this raises ends the whole transfer; otherwise the file is left out."""
        raise error

    def put(self, start: int, body: memoryview) -> Iterator[memoryview]:
        """Hash what is due, if nobody else is at it; the ranges as they are done with."""
        with self._lock:
            is_late = self.failed
            if not is_late:
                self._waiting[start] = body
                if self._is_hashing:
                    return
                self._is_hashing = True
        if is_late:  # its buffer is free again, and nothing was hashed
            yield body[:0]
            return
        while (due := self._next()) is not None:
            self.digest.update(due)
            self.position += len(due)
            yield due

    def _next(self) -> memoryview | None:
        with self._lock:
            due = self._waiting.pop(self.position, None)
            self._is_hashing = due is not None
            return due

    def drop(self) -> list[memoryview]:
        """Forget what waits; the ranges that did."""
        with self._lock:
            self.failed = True
            dropped = list(self._waiting.values())
            self._waiting.clear()
            return dropped


def by_size(files: Iterable[StoredFile]) -> Iterator[tuple[bool, list[StoredFile]]]:
    """The large files and then the small ones, as :func:`fetch_all` wants them: whether they are small, and which."""
    files = list(files)
    for small in (False, True):
        if some := [file for file in files if (file.size < min(SMALL, RANGE)) is small]:
            yield small, some


def fetch_all(
    streams: Iterable[Stream], fetch: Fetch, meter: Meter, cancelled: threading.Event, *, small: bool = False
) -> None:
    """Bring every stream to its end. ``small``: no file of them has :data:`~checkpoint_operator.storage.turn.SMALL` bytes.

    Raises:
        StorageError: what ``fetch`` or a stream raised first; the others stop at their next range.
        Cancelled: when the event was set; it is looked at before each range.
    """
    free: SimpleQueue[mmap] = SimpleQueue()
    workers, slots, most = (SMALL_WORKERS, SMALL_WORKERS + 1, SMALL) if small else (WORKERS, SLOTS, RANGE)

    def lend(count: int) -> None:
        for _ in range(count):
            free.put(mmap(-1, most))  # private memory, of which the kernel gives what is written to, and nothing before

    def ranges() -> Iterator[tuple[Stream, int, memoryview]]:
        for stream in streams:
            size, first = stream.file.size, stream.position
            for start in range(first, size, most) if size > first else (first,):
                if stream.failed:
                    break
                yield stream, start, memoryview(free.get())[: size - start]

    def give_back(bodies: Iterable[memoryview]) -> None:
        for body in bodies:
            assert isinstance(body.obj, mmap)
            free.put(body.obj)

    def bring(task: tuple[Stream, int, memoryview]) -> None:
        stream, start, body = task
        if cancelled.is_set():
            raise Cancelled
        try:
            if body:
                _fetch_whole(fetch, stream, start, body)
        except StorageError as error:
            stream.fail(error)
            give_back([body, *stream.drop()])
            return
        for done in stream.put(start, body):
            give_back([done])
            meter.add(len(done))
            if stream.position == stream.file.size:
                stream.finish(stream.digest.hexdigest())
                meter.add(0, files=1)

    lend(slots)
    # Each thread may take one more range after the end was called; none may wait for a buffer then.
    for_each(bring, ranges(), workers=workers, name="fetch", on_stop=lambda: lend(workers))


def _fetch_whole(fetch: Fetch, stream: Stream, start: int, body: memoryview) -> None:
    """No store may leave in a buffer what was in it before."""
    filled = 0
    with stream.receive(start, body) as receive:

        def arrived(first: int, last: int) -> None:
            nonlocal filled
            receive(first, last)
            filled = last

        fetch(stream.file, start, body, arrived)
    if filled != len(body):
        raise StorageError(
            Reason.INTEGRITY_MISMATCH,
            f"'{stream.file.path}' is shorter than its manifest says: {filled} of {len(body)} bytes came back at {start}",
            path=stream.file.path,
        )


def mismatch(file: StoredFile, sha256: str) -> StorageError:
    """The error for a file with other bytes than its manifest lists."""
    return StorageError(
        Reason.INTEGRITY_MISMATCH,
        f"'{file.path}' came back as sha256 {sha256}, the manifest says {file.sha256}",
        path=file.path,
    )
