"""Parts that are too large to be held: read twice, slice by slice, and never sent other than they were hashed."""

from __future__ import annotations

import hashlib
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from certificates import make_certificates
from gcs_world import GCSWorld, Rule
from proxy import Fault, proxy
from s3_world import S3World
from storage_world import MIB, ObjectWorld, assert_nothing_committed, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Layout
from checkpoint_operator.storage import StorageError, azure_blocks, connector, slices
from checkpoint_operator.storage.azure import AzureStore
from checkpoint_operator.storage.buffers import Buffers
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.gcs import GCSStore
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.pace import Pace
from checkpoint_operator.storage.s3 import S3Store
from checkpoint_operator.storage.slices import Cut, FirstReading, held
from checkpoint_operator.storage.source import OpenFile, SourceTree
from checkpoint_operator.storage.store import Body, Part, Piece, Stat, Written, slices_of
from checkpoint_operator.storage.transfer import BUFFER_BUDGET, Transfer

SLICE = MIB + 13
"""Neither a part nor what a wire sends at once is a multiple of it."""
SIZE = 40 * MIB + 5
"""Five parts of 8 MiB, or two of 16 MiB and one of 8; and a last one, which is so small that it is held."""


@pytest.fixture(params=["s3", "versitygw", "gcs", "azure"])
def bucket(request: pytest.FixtureRequest) -> ObjectWorld:
    found: ObjectWorld = request.getfixturevalue(f"{request.param}_world")
    return found


@pytest.fixture(params=["s3", "versitygw"])
def server(request: pytest.FixtureRequest) -> S3World:
    found: S3World = request.getfixturevalue(f"{request.param}_world")
    return found


@pytest.fixture(autouse=True)
def parts_are_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of 8 MiB is not held. Real parts that are too large would need files of 234 GiB."""
    if "as_it_is" not in request.fixturenames:
        monkeypatch.setattr(slices, "LARGEST_HELD", 7 * MIB)
        monkeypatch.setattr(slices, "SLICE", SLICE)


@pytest.fixture
def as_it_is() -> None:
    """The limits are not touched."""


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return make(tmp_path / "big", {"model.bin": os.urandom(SIZE), "small.bin": b"x" * 1000, "config.json": b"{}"})


@dataclass
class Readings:
    """What was read of files: bytes of the first time and of later ones, and what to do before such a later reading."""

    first: int = 0
    again: int = 0
    paid: int = 0
    cues: dict[int, Callable[[], object]] = field(default_factory=dict)
    """By the offset in the file that is read again."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, **counted: int) -> None:
        with self._lock:
            for name, size in counted.items():
                setattr(self, name, getattr(self, name) + size)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    found = Readings()
    read_into, read_again, spend = OpenFile.read_into, OpenFile.read_again, Pace.spend

    def first(self: OpenFile, offset: int, buffer: memoryview) -> None:
        found.count(first=len(buffer))
        read_into(self, offset, buffer)

    def again(self: OpenFile, offset: int, buffer: memoryview) -> None:
        found.count(again=len(buffer))
        for at in [at for at in found.cues if offset <= at < offset + len(buffer)]:
            found.cues.pop(at)()
        read_again(self, offset, buffer)

    def paid(self: Pace, size: int) -> None:
        found.count(paid=size)
        spend(self, size)

    monkeypatch.setattr(OpenFile, "read_into", first)
    monkeypatch.setattr(OpenFile, "read_again", again)
    monkeypatch.setattr(Pace, "spend", paid)
    return found


# ---- On real stores


def test_a_file_of_large_parts_is_read_twice_and_arrives_as_it_is(
    bucket: ObjectWorld, big: Path, readings: Readings
) -> None:
    bucket.upload(big)
    content = (big / "model.bin").read_bytes()
    line = next(line for line in bucket.backend.get_manifest(bucket.uri()).table.files if line.path == "model.bin")
    store = bucket.open(bucket.uri())
    assert line.sha256 == hashlib.sha256(content).hexdigest()
    assert line.part_size == store.part_size(SIZE)
    bodies = [content[at : at + line.part_size] for at in range(0, SIZE, line.part_size)]
    assert line.parts == len(bodies) == bucket.calls["put_part"]
    stat = store.stat(f"{bucket.prefix}run/model.bin")
    assert stat is not None
    assert stat.checksum == store.checksum([Piece(len(body), store.digest(body)) for body in bodies])
    assert bucket.get("run/model.bin") == content
    sizes = [len(body) for body in bodies if len(body) > slices.LARGEST_HELD]
    # Over plain HTTP the signature of S3 is over the SHA-256 of the body.
    times = 2 if isinstance(bucket, S3World) else 1
    total = sum(path.stat().st_size for path in big.rglob("*"))
    assert sizes
    assert (readings.first, readings.paid, readings.again) == (total, total, times * sum(sizes))
    assert bucket.uploads() == []


def test_what_is_there_already_is_hashed_in_slices_and_not_sent_again(
    bucket: ObjectWorld, big: Path, readings: Readings
) -> None:
    cancelled = threading.Event()
    bucket.cues.append(lambda verb, key: cancelled.set() if verb == "finish_upload" and key.endswith("model.bin") else None)
    with pytest.raises(Cancelled):  # config.json comes in the last wave
        bucket.upload(big, cancelled=cancelled)
    sent, again = bucket.calls["put_part"], readings.again
    bucket.upload(big)
    assert (bucket.calls["put_part"], readings.again) == (sent, again)
    line = next(line for line in bucket.backend.get_manifest(bucket.uri()).table.files if line.path == "model.bin")
    assert line.sha256 == hashlib.sha256((big / "model.bin").read_bytes()).hexdigest()


@pytest.mark.usefixtures("sequential")
def test_who_cancels_in_the_middle_of_a_part_has_no_such_part_and_the_next_attempt_takes_over_the_others(
    bucket: ObjectWorld, big: Path, readings: Readings
) -> None:
    cancelled, part_size = threading.Event(), bucket.open(bucket.uri()).part_size(SIZE)
    readings.cues[part_size + 3 * SLICE] = cancelled.set
    with pytest.raises(Cancelled):
        bucket.upload(big, cancelled=cancelled)
    assert_nothing_committed(bucket)
    assert "run/model.bin" not in bucket.paths()
    store = bucket.open(bucket.uri())
    [upload] = store.list_uploads(bucket.prefix)
    assert [(part.number, part.size) for part in store.list_parts(upload.key, upload.id)] == [(1, part_size)]
    before = bucket.calls["put_part"]
    stored = bucket.upload(big)
    assert bucket.calls["put_part"] - before == -(-SIZE // part_size) - 1
    assert stored.size_bytes == SIZE + 1002
    assert bucket.get("run/model.bin") == (big / "model.bin").read_bytes()
    assert bucket.uploads() == []


def overwrite(path: Path, at: int) -> None:
    """As nobody could see it from outside: the same size, the same times."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path, int], object]] = {
    "one bit in the first slice": lambda path, part_size: overwrite(path, 5),
    "one bit in the last slice": lambda path, part_size: overwrite(path, part_size - 1),
    "it became shorter": lambda path, part_size: os.truncate(path, part_size // 2),
}


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_between_reading_and_sending_is_noticed_before_the_store_has_the_part(
    bucket: ObjectWorld, big: Path, readings: Readings, change: Callable[[Path, int], object]
) -> None:
    path, part_size = big / "model.bin", bucket.open(bucket.uri()).part_size(SIZE)
    readings.cues[0] = lambda: change(path, part_size)
    assert_not_stored(bucket, big, readings)


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_between_signing_and_sending_is_noticed_too(
    server: S3World, big: Path, readings: Readings, change: Callable[[Path, int], object]
) -> None:
    """Over plain HTTP the first of the later readings is for the signature."""
    path, part_size = big / "model.bin", server.open(server.uri()).part_size(SIZE)
    readings.cues[0] = lambda: readings.cues.update({0: lambda: change(path, part_size)})
    assert_not_stored(server, big, readings)


def assert_not_stored(bucket: ObjectWorld, big: Path, readings: Readings) -> None:
    finished: list[str] = []
    bucket.cues.append(lambda verb, key: finished.append(key) if verb == "finish_upload" else None)
    with refused(Reason.SOURCE_CHANGED) as caught:
        bucket.upload(big)
    assert "model.bin" in caught.value.message
    assert not readings.cues, "it was changed"
    assert not [key for key in finished if key.endswith("model.bin")]
    assert_nothing_committed(bucket)
    assert "run/model.bin" not in bucket.paths()
    # Of no use to another attempt. (On Azure nothing can be aborted, and nothing of it was there.)
    assert bucket.uploads() == []


def test_a_body_that_is_other_than_its_digest_is_refused_by_the_store_as_well(bucket: ObjectWorld, big: Path) -> None:
    """Should slices ever be wrong without noticing."""

    class Wrong:
        def __len__(self) -> int:
            return 8 * MIB

        def __iter__(self) -> Iterator[memoryview]:
            return iter([memoryview(bytes(4 * MIB)), memoryview(bytes(4 * MIB))])

    store, key = bucket.open(bucket.uri()), f"{bucket.prefix}run/x"
    upload_id = store.start_upload(key, "uid-a")
    assert store.digest(Wrong()) == store.digest(bytes(8 * MIB))
    with pytest.raises(StorageError):
        store.put_part(key, upload_id, 1, Wrong(), store.digest(b"something else"))
    assert list(store.list_parts(key, upload_id)) == []
    store.abort_upload(key, upload_id)


# ---- Networks that are none


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "STALL_SECONDS", 1.0)


BEFALLS = [Fault.CUT, Fault.SLOW_DOWN, Fault.LOSE_REPLY, Fault.STALL]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", BEFALLS, ids=lambda fault: fault.name)
def test_a_part_that_was_cut_off_is_read_and_sent_again(
    server: S3World, big: Path, readings: Readings, fault: Fault
) -> None:
    with proxy(server.options.endpoint or "", server.server.access_key, server.server.secret_key) as between:
        server.options = server.options.replace(endpoint=between.endpoint)
        between.plan(fault, "UploadPart", key="model.bin")
        server.upload(big)
        assert between.happened[fault] == 1
        assert server.get("run/model.bin") == (big / "model.bin").read_bytes()
    assert readings.again > 2 * 5 * 8 * MIB, "twice is what it takes if nothing happens"
    assert readings.paid == SIZE + 1002


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOSE_REPLY], ids=lambda fault: fault.name)
def test_over_tls_a_part_is_read_for_each_time_that_it_is_sent(
    s3_world: S3World, big: Path, tmp_path: Path, readings: Readings, fault: Fault
) -> None:
    files, server = make_certificates(tmp_path / "tls"), s3_world.server
    with proxy(server.endpoint, server.access_key, server.secret_key, tls=files) as between:
        s3_world.options = s3_world.options.replace(endpoint=between.endpoint, ca_bundle=str(files.ca))
        s3_world.upload(big, "untouched")
        assert readings.again == 5 * 8 * MIB
        between.plan(fault, "UploadPart", key="run/model.bin")
        s3_world.upload(big)
        assert between.happened[fault] == 1
    assert readings.again > 2 * 5 * 8 * MIB
    assert s3_world.get("run/model.bin") == (big / "model.bin").read_bytes()


@pytest.mark.parametrize("status", [503, 0], ids=["refused", "lost reply"])
def test_google_gets_a_piece_again(gcs_world: GCSWorld, big: Path, readings: Readings, status: int) -> None:
    # Of the writes before it, the claim and the questions about conditions, there are six.
    rule = Rule(r"^POST /upload/", status, times=1, after=6)
    gcs_world.proxy.rules.append(rule)
    for name in ("small.bin", "config.json"):
        (big / name).unlink()
    gcs_world.upload(big)
    assert rule.times == 0
    assert gcs_world.get("run/model.bin") == (big / "model.bin").read_bytes()
    assert readings.again > SIZE
    assert not [path for path in gcs_world.paths() if ".partial-" in path]


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.SLOW_DOWN, Fault.LOSE_REPLY], ids=lambda fault: fault.name)
def test_azure_gets_a_block_again(azure_world: Any, big: Path, readings: Readings, fault: Fault) -> None:
    server = azure_world.server
    with proxy(server.endpoint, server.account, server.key) as between:
        azure_world.options = azure_world.options.replace(endpoint=f"{between.endpoint}/{server.account}")
        between.plan(fault, "PutObject", key="model.bin")  # the proxy speaks S3: a PUT is a PUT
        azure_world.upload(big)
        assert between.happened[fault] == 1
    assert azure_world.get("run/model.bin") == (big / "model.bin").read_bytes()
    assert readings.again > 5 * 8 * MIB


def test_parts_that_a_store_knows_by_their_md5_alone_are_taken_over(server: S3World, big: Path) -> None:
    """A store without checksums: the digest is an MD5, and so is what a part is recognised by."""
    keys = server.server.access_key, server.server.secret_key
    with proxy(server.options.endpoint or "", *keys, strips=True) as old:
        server.options = server.options.replace(endpoint=old.endpoint)
        cancelled = threading.Event()
        old.at_byte(20 * MIB, cancelled.set)
        with pytest.raises(Cancelled):
            server.upload(big, layout=Layout.UNIQUE, cancelled=cancelled)
        old.wait_idle()
        there = parts_there(server)
        assert there
        before = old.bytes_of_data
        small = ["small.bin", "config.json"]
        left = sum((big / name).stat().st_size for name in small if not _is_there(server, name))
        stored = server.upload(big, layout=Layout.UNIQUE)
        assert old.bytes_of_data - before == SIZE - sum(there) + left
        server.manager().download(stored.storage_uri, server.work / "restored")
        assert tree(server.work / "restored") == tree(big)
        server.delete(layout=Layout.UNIQUE)


def parts_there(server: S3World) -> list[int]:
    place = {"Bucket": server.bucket, "Prefix": server.prefix}
    [upload] = server.client.list_multipart_uploads(**place)["Uploads"]
    named = {"Bucket": server.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
    return [part["Size"] for part in server.client.list_parts(**named).get("Parts", [])]


def _is_there(server: S3World, name: str) -> bool:
    return any(path.endswith(f"/{name}") for path in server.paths())


# ---- How much is held


@pytest.mark.usefixtures("as_it_is")
@pytest.mark.parametrize("size", [0, 1, 234 << 30, (234 << 30) + (1 << 34), 768 << 30, 3 << 40, 5 << 40])
def test_of_no_file_on_no_store_is_more_in_memory_than_the_budget_allows(size: int) -> None:
    for part_size in (S3Store.part_size(None, size), GCSStore.part_size(None, size), azure_blocks.part_size(size)):  # type: ignore[arg-type]
        assert held(part_size) <= BUFFER_BUDGET // 2
        assert held(part_size) == part_size or part_size > slices.LARGEST_HELD
    assert held(S3Store.part_size(None, 5 << 40)) == 8 * MIB  # type: ignore[arg-type]
    assert AzureStore.part_size(None, 5 << 40) == 420 * MIB  # type: ignore[arg-type]


class Pretended:
    """A store that takes parts of one size, remembers a digest of each, and keeps nothing."""

    def __init__(self, part_size: int, meet: int = 1) -> None:
        self.size, self.at_once, self.most = part_size, 0, 0
        self.got: dict[int, str] = {}
        self._meeting, self._lock = threading.Barrier(meet), threading.Lock()

    def part_size(self, size: int) -> int:
        return self.size

    def digest(self, body: Body) -> bytes:
        found = hashlib.md5(usedforsecurity=False)
        for one in slices_of(body):
            found.update(one)
        return found.digest()

    def checksum(self, pieces: list[Piece]) -> str:
        return "".join(piece.digest.hex() for piece in pieces)

    def start_upload(self, key: str, owner: str) -> str:
        return "upload"

    def put_part(self, key: str, upload_id: str, number: int, body: Body, digest: bytes) -> str:
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        if number <= self._meeting.parties:
            self._meeting.wait(60)
        self.got[number] = self.digest(body).hex()
        assert self.got[number] == digest.hex()
        with self._lock:
            self.at_once -= 1
        return str(number)

    def finish_upload(self, key: str, upload_id: str, parts: list[Part], owner: str) -> Written:
        return Written("token", "".join(self.got[part.number] for part in parts))

    def stat(self, key: str) -> Stat | None:
        return None

    def abort_upload(self, key: str, upload_id: str) -> None:
        raise AssertionError("nothing fails here")


class Watched(Buffers):
    most = 0

    def _lend(self, size: int) -> memoryview:
        lent = super()._lend(size)
        self.most = max(self.most, self._lent)
        return lent


def send(store: Pretended, folder: Path, buffers: Buffers) -> Any:
    with SourceTree(str(folder.parent), folder.name) as source:
        transfer = Transfer(store, "", source, source.scan(), "uid", Meter(), threading.Event(), _buffers=buffers)  # type: ignore[arg-type]
        [line] = transfer.put_all().table.files
        return line


@pytest.mark.usefixtures("as_it_is")
def test_parts_as_a_file_of_5_tib_has_them_take_no_more_than_the_budget(tmp_path: Path) -> None:
    part_size = S3Store.part_size(None, 5 << 40)  # type: ignore[arg-type]
    assert part_size == 525 * MIB
    source = make(tmp_path / "source", {"model.bin": b"it begins"})
    os.truncate(source / "model.bin", part_size + 30 * MIB)
    store, buffers = Pretended(part_size), Watched(BUFFER_BUDGET)
    tracemalloc.start()
    try:
        line = send(store, source, buffers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with (source / "model.bin").open("rb") as file:
        assert line.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    assert line.parts == 2
    assert buffers.most == 2 * 8 * MIB, "a slice of each part that is under way"
    assert peak < BUFFER_BUDGET


def test_as_many_large_parts_are_under_way_as_slices_fit_into_the_budget(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"model.bin": os.urandom(MIB) * 80})
    store, buffers = Pretended(8 * MIB, meet=6), Watched(6 * SLICE)
    line = send(store, source, buffers)
    assert line.parts == len(store.got) == 10
    assert store.most == 6, "they go side by side, and the next one waits for a slice"
    assert buffers.most == 6 * SLICE


def test_what_a_sender_reads_is_compared_each_time(tmp_path: Path) -> None:
    content = os.urandom(3 * SLICE + 7)
    folder = make(tmp_path / "source", {"model.bin": content})
    with SourceTree(str(tmp_path), "source") as source, source.open(source.scan().files[0]) as file:
        looks: list[int] = []
        cut, buffer = Cut(len(content), len(content)), memoryview(bytearray(SLICE))
        first = cut.piece(file, 0, len(content), buffer, lambda: looks.append(1))
        assert isinstance(first, FirstReading)
        assert len(first) == len(content)
        assert b"".join(bytes(one) for one in first) == content
        again = first.again()
        for _ in range(3):
            assert b"".join(bytes(one) for one in again) == content
        assert len(looks) == 4 * 4, "before each slice"
        overwrite(folder / "model.bin", len(content) - 1)
        got = []
        with refused(Reason.SOURCE_CHANGED):
            for one in again:
                got.append(bytes(one))  # noqa: PERF401 - it is not finished
        assert got == [content[at : at + SLICE] for at in range(0, 3 * SLICE, SLICE)]
