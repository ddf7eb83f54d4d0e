"""The transfer engine: one pass over the bytes, from the volume into the store, with a known memory bound.

A byte is read once, into a private buffer; SHA-256 of the file, SHA-256 of the part and the socket all use that buffer.

Memory: ``workers * part_size`` for the buffers, with ``part_size = max(16 MiB, size / 10,000)`` of the largest file, and
as many workers (at most four) as stay below 256 MiB: 64 MiB with files up to 160 GB, 525 MiB at the largest file that a
store takes (5 TiB), which has the mover for itself.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TypeVar

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Progress, Stage
from checkpoint_operator.storage.commit import Found, Put
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.manifest import FileTable, StoredFile
from checkpoint_operator.storage.source import Listing, OpenFile, SourceFile, SourceTree
from checkpoint_operator.storage.store import ObjectStore, Stat, UploadLost, Written

DEFAULT_WORKERS = 4

Outcome = TypeVar("Outcome")

BUFFER_BUDGET = 256 << 20
"""Bytes that the buffers of all workers may hold together, as long as one worker alone does not exceed it."""

# What a loader opens first. It comes last, so that a loader that meets half a folder fails instead of loading half.
_LAST = ("config.json", "adapter_config.json", "model_index.json", "*.index.json")


@dataclass
class Meter:
    """Counts what is settled, from any thread, and reports at most once a second (and at the end of each stage)."""

    report: Callable[[Progress], None] | None = None
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _state: Progress = field(default_factory=Progress)
    _started: float = 0.0
    _reported: float = float("-inf")

    def start(self, stage: Stage, files: int, size: int) -> None:
        with self._lock:
            self._started = self.clock()
            self._state = Progress(stage=stage, files_total=files, bytes_total=size)
            self._report(force=True)

    def add(self, size: int, files: int = 0) -> None:
        with self._lock:
            seconds = max(self.clock() - self._started, 1e-3)
            done = self._state.bytes_done + size
            self._state = self._state.replace(
                bytes_done=done, files_done=self._state.files_done + files, bytes_per_second=int(done / seconds)
            )
            self._report(force=False)

    def stage(self, stage: Stage) -> None:
        with self._lock:
            self._state = self._state.replace(stage=stage)
            self._report(force=True)

    def _report(self, *, force: bool) -> None:
        now = self.clock()
        if self.report and (force or now - self._reported >= 1.0):
            self._reported = now
            self.report(self._state)


@dataclass
class Transfer:
    """Puts one scanned source below one prefix of a store."""

    store: ObjectStore
    prefix: str
    tree: SourceTree
    listing: Listing
    owner: str
    meter: Meter
    cancelled: threading.Event
    workers: int = DEFAULT_WORKERS
    _stop: threading.Event = field(default_factory=threading.Event)

    def put_all(self, existing: dict[str, int]) -> Put:
        """Create every object that is not there. ``existing`` maps paths that were seen in the store to their sizes.

        What the store has with the same size is hashed and compared, not sent again.

        Raises:
            StorageError: of the first file that failed; the others stop at their next part.
            Cancelled: when the event was set.
        """
        self.meter.start(Stage.UPLOADING, len(self.listing.files), self.listing.size)
        stored: list[StoredFile] = []
        mismatched: list[Found] = []
        for wave in _waves(self.listing.files):
            for outcome in self._parallel(lambda file: self._settle(file, existing.get(file.path)), wave):
                if isinstance(outcome, Found):
                    mismatched.append(outcome)
                else:
                    stored.append(outcome)
        self.meter.stage(Stage.VERIFYING)
        return Put(self._table(stored), tuple(mismatched))

    def hash_all(self) -> FileTable:
        """Read the whole source without storing it, to compare it with what another artifact has stored."""
        self.meter.start(Stage.VERIFYING, len(self.listing.files), self.listing.size)
        return self._table(list(self._parallel(self._hash_only, self.listing.files)))

    def _table(self, files: Iterable[StoredFile]) -> FileTable:
        return FileTable(
            files=sorted(files, key=lambda file: file.path.encode()),
            links=list(self.listing.links),
            empty_directories=list(self.listing.empty_directories),
        )

    def _parallel(self, work: Callable[[SourceFile], Outcome], files: Iterable[SourceFile]) -> Iterator[Outcome]:
        """The outcomes in the order of the files; the first failure stops the others at their next part."""
        self._stop = threading.Event()
        largest = max((file.size for file in self.listing.files), default=0)
        workers = max(1, min(self.workers, BUFFER_BUDGET // self.store.part_size(largest)))
        with ThreadPoolExecutor(workers, thread_name_prefix="transfer") as pool:
            futures = [pool.submit(work, file) for file in files]
            pending: set[Future[Outcome]] = set(futures)
            try:
                _, pending = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # a KeyboardInterrupt in a notebook as well: the pool would send everything before it lets us go
                if pending:
                    self._stop.set()
                    for future in pending:
                        future.cancel()
        failed = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if failed:
            # A file that was stopped because of another one is not the cause.
            raise next((error for error in failed if not isinstance(error, Cancelled)), failed[0])
        return (future.result() for future in futures)

    def _check_cancelled(self) -> None:
        if self.cancelled.is_set() or self._stop.is_set():
            raise Cancelled

    def _settle(self, file: SourceFile, existing_size: int | None) -> StoredFile | Found:
        """Bring one file into the store, or say what else is there."""
        key = self.prefix + file.path
        with self.tree.open(file) as source:
            if existing_size is not None and (stat := self.store.stat(key)) is not None:
                return self._compare(source, key, stat, None)
            for _ in range(3):
                try:
                    written, pieces = self._send(source, key)
                except UploadLost:
                    written, pieces = None, None
                if written is not None and pieces is not None:
                    return self._confirmed(key, file, pieces, written)
                stat = self.store.stat(key)
                if stat is not None:
                    return self._compare(source, key, stat, pieces)
            raise StorageError(Reason.STORE_UNAVAILABLE, f"the store gave up three uploads of '{file.path}'", path=file.path)

    def _send(self, source: OpenFile, key: str) -> tuple[Written | None, "Pieces"]:
        """Create the object; None where the key exists by now."""
        size, part_size = source.file.size, self.store.part_size(source.file.size)
        pieces = Pieces(size, part_size)
        if size <= part_size:
            self._check_cancelled()
            body = source.read(0, size)
            pieces.add(body)
            source.check_unchanged()
            written = self.store.put(key, body, pieces.digests[0], self.owner)
            if written is not None:
                self.meter.add(size, files=1)
            return written, pieces
        upload_id = self.store.start_upload(key, self.owner)
        sent = 0
        try:
            tokens: list[str] = []
            for offset in range(0, size, part_size):
                self._check_cancelled()
                body = source.read(offset, min(part_size, size - offset))
                pieces.add(body)
                tokens.append(self.store.put_part(key, upload_id, len(tokens) + 1, body, pieces.digests[-1]))
                sent += len(body)
                self.meter.add(len(body))
            source.check_unchanged()
            written = self.store.finish_upload(key, upload_id, tokens, pieces.digests)
        except Cancelled:
            raise  # SIGTERM leaves parts: whoever goes on owns every upload below the prefix
        except BaseException:
            self.meter.add(-sent)
            with suppress(StorageError):
                self.store.abort_upload(key, upload_id)
            raise
        if written is None:
            self.meter.add(-sent)
            self.store.abort_upload(key, upload_id)
        else:
            self.meter.add(0, files=1)
        return written, pieces

    def _confirmed(self, key: str, file: SourceFile, pieces: "Pieces", written: Written) -> StoredFile:
        """A write counts when the store names the checksum that we computed; where the reply has none it is asked."""
        expected = self.store.checksum(pieces.digests)
        said = written.checksum
        if said is None:
            stat = self.store.stat(key)
            said = stat.checksum if stat and stat.token == written.token else None
        if said != expected:
            raise StorageError(
                Reason.INTEGRITY_MISMATCH,
                f"the store says that '{file.path}' has the checksum {said}, it was sent with {expected}",
                path=file.path,
            )
        return pieces.stored(file, written.token)

    def _compare(self, source: OpenFile, key: str, stat: Stat, pieces: "Pieces | None") -> StoredFile | Found:
        """Whether an object that is there already is this file."""
        file = source.file
        found = Found(file.path, stat.size, stat.token, stat.owner)
        if stat.size != file.size:
            return found
        pieces = pieces or self._hash(source)
        if stat.checksum != self.store.checksum(pieces.digests):
            return found
        self.meter.add(file.size, files=1)
        return pieces.stored(file, stat.token)

    def _hash(self, source: OpenFile) -> "Pieces":
        size = source.file.size
        pieces = Pieces(size, self.store.part_size(size))
        for offset in range(0, max(size, 1), pieces.part_size):
            self._check_cancelled()
            pieces.add(source.read(offset, min(pieces.part_size, size - offset)))
        source.check_unchanged()
        return pieces

    def _hash_only(self, file: SourceFile) -> StoredFile:
        with self.tree.open(file) as source:
            pieces = self._hash(source)
        self.meter.add(file.size, files=1)
        return pieces.stored(file, None)


class Pieces:
    """The hashes of a file and of the parts that it is cut into."""

    def __init__(self, size: int, part_size: int) -> None:
        self.size, self.part_size = size, part_size
        self.digests: list[bytes] = []
        self._whole = hashlib.sha256()

    def add(self, body: bytes) -> None:
        self._whole.update(body)
        # A file in one piece is hashed once.
        single = self.size <= self.part_size
        self.digests.append(self._whole.digest() if single else hashlib.sha256(body).digest())

    def stored(self, file: SourceFile, token: str | None) -> StoredFile:
        return StoredFile(
            path=file.path,
            size=file.size,
            sha256=self._whole.hexdigest(),
            parts=len(self.digests),
            part_size=self.part_size if len(self.digests) > 1 else None,
            etag=token,
            mode=file.mode,
            mtime_ns=file.mtime_ns,
        )


def _waves(files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """The weights and the rest, then what makes a loader believe that the folder is whole."""
    first: list[SourceFile] = []
    last: list[SourceFile] = []
    for file in files:
        name = file.path.rpartition("/")[2]
        (last if any(fnmatch(name, pattern) for pattern in _LAST) else first).append(file)
    return first, last
