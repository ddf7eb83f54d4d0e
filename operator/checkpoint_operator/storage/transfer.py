"""The transfer engine: one pass over the bytes, from the volume into the store, with a known memory bound.

A byte is read from the volume once, into a private buffer. The one thread that reads a file also hashes it, because
SHA-256 of a whole file can only go forward; the buffer is then handed to one of several senders, which computes the store's
own checksum and gives both to the store. So a large file is hashed and sent at the same time, over several connections.

A part of more than 24 MiB is never held: it is hashed slice by slice, and the sender, which gets the buffer of 8 MiB that
the slices go through, reads them again (:mod:`.slices`). Such parts have files of more than 234 GiB on S3, of 293 GiB on
Azure, of 768 GiB on GCS.

Memory, for a file of any size: :data:`BUFFER_BUDGET` for bodies (48 MiB: six parts of 8 MiB, or two of up to 24 MiB, or a
slice each of six larger ones). On top of it a third of a KiB for each part of the files in hand, and up to 1.5 KiB for each
while one of these is put together in the end; and half a KiB for each file, for its line in the manifest.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TypeVar

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Stage
from checkpoint_operator.storage.buffers import Buffers
from checkpoint_operator.storage.commit import Found, Put
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.manifest import FileTable, StoredFile
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.parallel import first_cause, for_each
from checkpoint_operator.storage.slices import Cut, FirstReading, held
from checkpoint_operator.storage.source import Listing, OpenFile, SourceFile, SourceTree
from checkpoint_operator.storage.store import Body, ObjectStore, Part, Piece, Stat, Upload, UploadLost, Written
from checkpoint_operator.storage.turn import SMALL, TURN

FILES_AT_ONCE = 6
"""Files that are read at the same time; those of one part are sent by the thread that read them."""
BATCH = 8
"""Small files whose requests one thread has under way at the same time."""
STREAMS = 8
"""Threads that have requests with a body under way at the same time."""
BUFFER_BUDGET = 48 << 20
_TRIES = 3

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

# What a loader opens first. It comes last, so that a loader that meets half a folder fails instead of loading half.
_LAST = ("config.json", "adapter_config.json", "model_index.json", "*.index.json")


@dataclass
class Transfer:
    """Puts one scanned source below one prefix of a store.

    ``existing`` maps paths that were seen in the store to their sizes: what has the same size is hashed and compared, not
    sent again. ``unfinished`` maps keys to uploads that an earlier attempt has begun: their parts are taken over.
    ``keep_parts`` says whether a file that could not be finished leaves its parts for the next attempt.
    """

    store: ObjectStore
    prefix: str
    tree: SourceTree
    listing: Listing
    owner: str
    meter: Meter
    cancelled: threading.Event
    existing: Mapping[str, int] = field(default_factory=dict)
    unfinished: Mapping[str, Sequence[Upload]] = field(default_factory=dict)
    keep_parts: bool = True
    files_at_once: int = FILES_AT_ONCE
    streams: int = STREAMS
    _stop: threading.Event = field(default_factory=threading.Event)
    _senders: ThreadPoolExecutor = field(init=False)
    _buffers: Buffers = field(default_factory=lambda: Buffers(BUFFER_BUDGET))
    _volume: "_Volume" = field(default_factory=lambda: _Volume())

    def put_all(self) -> Put:
        """Create every object that is not there.

        Raises:
            StorageError: of the first file that failed; the others stop at their next part.
            Cancelled: when the event was set.
        """
        self.meter.start(Stage.UPLOADING, len(self.listing.files), self.listing.size)
        settled: list[StoredFile | Found] = []
        with ThreadPoolExecutor(self.streams, thread_name_prefix="send") as self._senders:
            for wave in _waves(self.listing.files):
                settled += self._parallel(self._settle_batch, _batches(wave, self.files_at_once))
        assert len(settled) == len(self.listing.files), "each file is stored, or something else is in its place"
        self.meter.stage(Stage.VERIFYING)
        mismatched = tuple(one for one in settled if isinstance(one, Found))
        return Put(self._table(one for one in settled if isinstance(one, StoredFile)), mismatched)

    def hash_all(self) -> FileTable:
        """Read the whole source without storing it, to compare it with what another artifact has stored."""
        self.meter.start(Stage.VERIFYING, len(self.listing.files), self.listing.size)
        return self._table(self._parallel(lambda file: [self._hash_only(file)], self.listing.files))

    def _table(self, files: Iterable[StoredFile]) -> FileTable:
        return FileTable(
            files=sorted(files, key=lambda file: file.path.encode()),
            links=list(self.listing.links),
            empty_directories=list(self.listing.empty_directories),
        )

    def _parallel(self, work: Callable[[Item], Iterable[Outcome]], items: Sequence[Item]) -> list[Outcome]:
        """The outcomes in any order; the first failure stops the others at their next part."""
        self._stop.clear()
        outcomes: list[Outcome] = []
        for_each(
            lambda item: outcomes.extend(work(item)),
            items,
            workers=max(1, min(self.files_at_once, len(items))),
            name="read",
            on_stop=self._stop.set,
        )
        return outcomes

    def _check_cancelled(self) -> None:
        if self.cancelled.is_set() or self._stop.is_set():
            raise Cancelled

    def _settle_batch(self, files: Sequence[SourceFile]) -> Iterable[StoredFile | Found]:
        """One large file, or several small ones: each of these is on its way before the first answer is waited for."""
        if len(files) == 1 and files[0].size >= SMALL:
            return [outcome for outcome in self._settle(files[0], None) if outcome is not None]
        with self._buffers.lent(BATCH * SMALL) as room, nullcontext() if self._volume.is_slow else TURN.taken():
            steps = [
                self._settle(file, room[number * SMALL : number * SMALL + file.size]) for number, file in enumerate(files)
            ]
            with ExitStack() as stack:
                for step in steps:
                    stack.callback(step.close)
                begun = [next(step) for step in steps]
                ended = [outcome for step in steps for outcome in step]
                return [outcome for outcome in (*begun, *ended) if outcome is not None]

    def _open(self, file: SourceFile) -> OpenFile:
        begun = time.monotonic()
        source = self.tree.open(file)
        if file.size < SMALL:
            self._volume.took(time.monotonic() - begun)
        return source

    def _stat(self, key: str) -> Stat | None:
        with TURN.let_go():
            return self.store.stat(key)

    def _settle(self, file: SourceFile, room: memoryview | None) -> Generator[StoredFile | Found | None]:
        """Bring one file into the store, or say what else is there: the last that is yielded. None is yielded where there
        is nothing to do but to wait for the store. ``room``: where its bytes go, else the budget is asked for some."""
        key = self.prefix + file.path
        if file.path in self.existing and (stat := self._stat(key)) is not None:
            for upload in self.unfinished.get(key, ()):  # of no use to anybody: the object is there
                with TURN.let_go():
                    self.store.abort_upload(upload.key, upload.id)
            with self._open(file) as source:
                yield self._compare(source, stat, None, room)
            return
        for _ in range(_TRIES):
            with self._open(file) as source:
                sending = _Sending(self, source, key)
                with suppress(UploadLost):
                    if file.size <= sending.part_size:
                        written = yield from sending.send_whole(room)
                    else:
                        written = sending.send_parts()
                    if written is not None:
                        yield self._confirmed(sending, written)
                        return
                stat = self._stat(key)
                if stat is not None:
                    yield self._compare(source, stat, sending.cut if sending.is_read else None, room)
                    return
        raise StorageError(Reason.STORE_UNAVAILABLE, f"the store gave up {_TRIES} uploads of '{file.path}'", path=file.path)

    def _confirmed(self, sending: "_Sending", written: Written) -> StoredFile | Found:
        """A write counts when the store names the checksum that we computed; where the reply has none it is asked."""
        file, key = sending.source.file, sending.key
        expected, said = self.store.checksum(sending.cut.pieces), written.checksum
        if said is None or sending.adopted:
            stat = self._stat(key)
            said = stat.checksum if stat and stat.token == written.token else None
            if stat and sending.adopted and stat.owner != self.owner:
                # Somebody else had begun the upload that we found: not a thing that our deletion would remove.
                return Found(file.path, stat.size, stat.token, stat.owner)
        if said != expected:
            raise StorageError(
                Reason.INTEGRITY_MISMATCH,
                f"the store says that '{file.path}' has the checksum {said}, it was sent with {expected}",
                path=file.path,
            )
        self.meter.add(0, files=1)
        return sending.cut.stored(file, written.token)

    def _compare(self, source: OpenFile, stat: Stat, cut: Cut | None, room: memoryview | None) -> StoredFile | Found:
        """Whether an object that is there already is this file."""
        file = source.file
        found = Found(file.path, stat.size, stat.token, stat.owner)
        if stat.size != file.size:
            return found
        cut = cut or self._hash(source, room)
        if stat.checksum != self.store.checksum(cut.pieces):
            return found
        self.meter.add(file.size, files=1)
        return cut.stored(file, stat.token)

    def _hash(self, source: OpenFile, room: memoryview | None = None) -> Cut:
        cut = Cut(source.file.size, self.store.part_size(source.file.size))
        for offset, length in cut.ranges:
            self._check_cancelled()
            with self._buffers.lent(held(length)) if room is None else nullcontext(room) as buffer:
                body = cut.piece(source, offset, length, buffer, self._check_cancelled)
                cut.pieces.append(Piece(length, self.store.digest(body)))
        source.check_unchanged()
        return cut

    def _hash_only(self, file: SourceFile) -> StoredFile:
        with self.tree.open(file) as source:
            cut = self._hash(source)
        self.meter.add(file.size, files=1)
        return cut.stored(file, None)


class _Volume:
    """Whether the volume lets its readers wait, as one on a network does: then small files are read side by side."""

    _CALLS, _SLOW_SECONDS = 16, 0.5e-3

    def __init__(self) -> None:
        self.is_slow = False
        self._calls, self._seconds = 0, 0.0

    def took(self, seconds: float) -> None:
        """What opening or reading one small file has taken."""
        self._calls += 1
        self._seconds += seconds
        if self._calls >= self._CALLS and self._seconds > self._calls * self._SLOW_SECONDS:
            self.is_slow = True


class _Sending:
    """One attempt to create the object of one file."""

    def __init__(self, transfer: Transfer, source: OpenFile, key: str) -> None:
        self.source, self.key = source, key
        self.part_size = transfer.store.part_size(source.file.size)
        self.cut = Cut(source.file.size, self.part_size)
        self.adopted = False
        self.is_read = False
        self._transfer, self._store, self._buffers = transfer, transfer.store, transfer._buffers
        self._broken = threading.Event()

    def send_whole(self, room: memoryview | None) -> Generator[None, None, Written | None]:
        """A small file in one request, by the thread that read it; None where the key exists by now."""
        transfer, size = self._transfer, self.source.file.size
        transfer._check_cancelled()
        with self._buffers.lent(size) if room is None else nullcontext(room) as body:
            begun = time.monotonic()
            self.cut.read(self.source, 0, body)
            if size < SMALL:
                transfer._volume.took(time.monotonic() - begun)
            digest = self._store.digest(body)
            self.cut.pieces.append(Piece(size, digest))
            self._finish_reading()
            self.source.close()  # there may be dozens of files whose answer is waited for
            with self._store.put(self.key, body, digest, transfer.owner) as answer:
                yield
                written = answer()
        if written is not None:
            transfer.meter.add(size)
        return written

    def send_parts(self) -> Written | None:
        """A large file: this thread reads and hashes, the senders send. None where the key exists by now."""
        upload_id, there = self._find_upload()
        self.adopted = upload_id is not None
        upload_id = upload_id or self._store.start_upload(self.key, self._transfer.owner)
        parts: list[Part] = []
        sending: deque[Future[Part]] = deque()
        try:
            for number, (offset, length) in enumerate(self.cut.ranges, 1):
                if self._broken.is_set():
                    break  # the sender that failed knows why
                self._transfer._check_cancelled()
                buffer = self._buffers.take(held(length))
                try:
                    body, digest = self._read_part(offset, length, buffer)
                except BaseException as error:
                    self._buffers.give(buffer)
                    if isinstance(error, Cancelled) and self._broken.is_set():
                        break  # in the middle of a large part, for the same reason
                    raise
                # A future is seven times as large as the part that comes of it, and a file may have 32,768 of them.
                while sending and sending[0].done() and sending[0].exception() is None:
                    parts.append(sending.popleft().result())
                work = (upload_id, number, body, digest, buffer, there.get(number))
                sending.append(self._transfer._senders.submit(self._send_part, *work))
            failures = [failure for future in sending if (failure := future.exception()) is not None]
            if failures:
                raise first_cause(failures)
            parts += [future.result() for future in sending]
            sending.clear()
            self.cut.pieces += [Piece(part.size, part.digest or b"") for part in parts]
            self._finish_reading()
            written = self._store.finish_upload(self.key, upload_id, parts, self._transfer.owner)
        except BaseException as error:
            self._give_up(upload_id, parts, sending, error)
            raise
        if written is None:
            self._give_up(upload_id, parts, sending, None)
        return written

    def _find_upload(self) -> tuple[str | None, dict[int, Part]]:
        """What an earlier attempt has sent of this file already; of several uploads the one that is furthest."""
        best: tuple[str | None, dict[int, Part]] = (None, {})
        for upload in self._transfer.unfinished.get(self.key, ()):
            there = {part.number: part for part in self._store.list_parts(self.key, upload.id)}
            if len(there) > len(best[1]):
                best = (upload.id, there)
        return best

    def _check(self) -> None:
        self._transfer._check_cancelled()
        if self._broken.is_set():
            raise Cancelled

    def _read_part(self, offset: int, length: int, buffer: memoryview) -> tuple[Body, bytes | None]:
        """What a sender needs, with the digest of what is not held: that came of the one reading that hashes the file."""
        body = self.cut.piece(self.source, offset, length, buffer, self._check)
        if not isinstance(body, FirstReading):
            return body, None
        digest = self._store.digest(body)
        return body.again(), digest

    def _send_part(
        self, upload_id: str, number: int, body: Body, digest: bytes | None, buffer: memoryview, there: Part | None
    ) -> Part:
        """``buffer`` is what ``body`` is in, or what its slices go through; it is given back."""
        try:
            self._check()
            digest = digest or self._store.digest(body)
            if there is not None and self._store.is_part(there, body, digest):
                token = there.token
            else:
                token = self._store.put_part(self.key, upload_id, number, body, digest)
            self._transfer.meter.add(len(body))
            return Part(number, len(body), token, digest)
        except BaseException:
            self._broken.set()
            raise
        finally:
            self._buffers.give(buffer)

    def _finish_reading(self) -> None:
        self.source.check_unchanged()
        self.is_read = True

    def _give_up(
        self, upload_id: str, parts: Sequence[Part], sending: Iterable[Future[Part]], error: BaseException | None
    ) -> None:
        """Wait for what is on its way, and take back what was counted. The parts stay where another attempt can use them."""
        self._broken.set()
        wait(sending)
        done = [*parts, *(future.result() for future in sending if not future.exception())]
        self._transfer.meter.add(-sum(part.size for part in done))
        is_useful = error is not None and not isinstance(error, UploadLost) and _may_go_on(error)
        if not is_useful or (not self._transfer.keep_parts and not self.adopted):
            with suppress(StorageError):
                self._store.abort_upload(self.key, upload_id)


def _may_go_on(error: BaseException) -> bool:
    """Whether an attempt after this error could use the same parts."""
    return not isinstance(error, StorageError) or (error.retryable and error.reason is not Reason.SOURCE_CHANGED)


def _waves(files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """The weights and the rest, then what makes a loader believe that the folder is whole."""
    first: list[SourceFile] = []
    last: list[SourceFile] = []
    for file in files:
        name = file.path.rpartition("/")[2]
        (last if any(fnmatch(name, pattern) for pattern in _LAST) else first).append(file)
    return first, last


def _batches(files: Sequence[SourceFile], workers: int) -> list[list[SourceFile]]:
    """In their order; neighbours that are small by the handful, as long as there is a handful for each of the workers."""
    most = max(1, min(BATCH, sum(file.size < SMALL for file in files) // workers))
    batches: list[list[SourceFile]] = []
    room = 0
    for file in files:
        if file.size < SMALL and room:
            batches[-1].append(file)
            room -= 1
        else:
            batches.append([file])
            room = most - 1 if file.size < SMALL else 0
    return batches
