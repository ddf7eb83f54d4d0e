"""S3 as it is elsewhere: stores that know no conditions, and networks that stall, cut, and lose what was said."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy import Fault, Proxy, proxy
from s3_world import S3World
from storage_world import CHECKPOINT, MARKER, MIB, SHARDED, make, refused, tree
from test_conformance import NAMES
from test_s3_store import outcome, start_mover

from checkpoint_operator.api.errors import ExitCode, Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, Stored
from checkpoint_operator.storage import UploadRequest, connector, s3_connect, s3_wire
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.s3 import PART_SIZE
from checkpoint_operator.storage.transfer import STREAMS

PARTS = 5


@pytest.fixture(params=["s3", "versitygw"])
def server(request: pytest.FixtureRequest) -> S3World:
    """Both S3 servers: what is said here of S3 is said of each."""
    found: S3World = request.getfixturevalue(f"{request.param}_world")
    return found


@pytest.fixture
def between(server: S3World) -> Iterator[Proxy]:
    """A proxy between the backend and its server; the raw way of the test goes past it."""
    with proxy(server.options.endpoint or "", server.server.access_key, server.server.secret_key) as found:
        server.options = server.options.replace(endpoint=found.endpoint)
        yield found


@pytest.fixture
def old_store(server: S3World) -> Iterator[Proxy]:
    """The same server, without conditions and without checksums."""
    with proxy(server.options.endpoint or "", server.server.access_key, server.server.secret_key, strips=True) as found:
        server.options = server.options.replace(endpoint=found.endpoint)
        yield found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (connector, s3_connect):
        monkeypatch.setattr(module, "STALL_SECONDS", 1.0)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of five parts, the last one short, beside two small ones."""
    model = os.urandom(MIB) * ((PARTS - 1) * PART_SIZE // MIB) + b"the end"
    return make(tmp_path / "big", {"model.bin": model, "small.bin": b"x" * 1000, "config.json": b"{}"})


def upload_as_a_mover(server: S3World, source: Path, **changes: Any) -> Stored:
    """The parts of what could not be finished stay for the next attempt."""
    request = UploadRequest(
        str(source.parent), source.name, server.uri(), ArtifactMetadata(), "uid-a", keep_parts=True, **changes
    )
    return server.backend.upload_artifact(request)


# ---- A store without conditions


@pytest.mark.usefixtures("old_store")
def test_a_store_without_conditions_is_found_out_before_the_first_byte(server: S3World, big: Path) -> None:
    with refused(Reason.CONDITIONAL_WRITES_UNSUPPORTED):
        server.upload(big)
    assert server.paths() == []


@pytest.mark.usefixtures("old_store")
@pytest.mark.parametrize("what", ["LoRA", "sharded", "parts", "names", "empty"])
def test_layout_unique_keeps_everything_on_a_store_without_conditions(
    server: S3World, big: Path, tmp_path: Path, what: str
) -> None:
    sources = {
        "LoRA": CHECKPOINT,
        "sharded": SHARDED,
        "parts": big,
        "names": make(tmp_path / "names", {name: name.encode() for name in NAMES}),
        "empty": make(tmp_path / "empty", {"nothing": b"", "deep/nothing": b""}),
    }
    source = sources[what]
    stored = server.upload(source, layout=Layout.UNIQUE)
    assert server.upload(source, layout=Layout.UNIQUE) == stored, "a second run finds what the first has committed"
    place = stored.storage_uri.removeprefix(f"{server.base}/")
    assert server.paths() == sorted(f"{place}/{name}" for name in [*(n for n, v in tree(source).items()), MARKER])
    # Somebody who comes later, in another process, and has never asked the store what it can.
    manager = server.manager()
    assert [found.storage_path for found in manager.list(server.base)] == [stored.storage_uri]
    manager.verify(stored.storage_uri)
    manager.download(stored.storage_uri, tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(source)
    server.delete(layout=Layout.UNIQUE)
    assert server.paths() == []
    assert server.uploads() == []


@pytest.mark.usefixtures("old_store")
def test_on_a_store_without_conditions_a_flipped_byte_is_found(server: S3World, big: Path) -> None:
    stored = server.upload(big, layout=Layout.UNIQUE)
    path = stored.storage_uri.removeprefix(f"{server.base}/") + "/small.bin"
    server.put(path, b"y" + b"x" * 999)
    with refused(Reason.INTEGRITY_MISMATCH):
        server.manager().download(stored.storage_uri, server.work / "restored")
    assert not (server.work / "restored").exists()


def test_on_a_store_without_conditions_an_upload_goes_on_where_it_was_stopped(
    server: S3World, big: Path, old_store: Proxy
) -> None:
    cancelled = threading.Event()
    old_store.at_byte(3 * PART_SIZE, cancelled.set)
    with pytest.raises(Cancelled):
        upload_as_a_mover(server, big, layout=Layout.UNIQUE, cancelled=cancelled)
    old_store.wait_idle()
    there, before = settled_bytes(server), old_store.bytes_of_data
    stored = server.upload(big, layout=Layout.UNIQUE)
    assert old_store.bytes_of_data - before == size_of(big) - there
    server.manager().download(stored.storage_uri, server.work / "restored")
    assert tree(server.work / "restored") == tree(big)
    assert server.uploads() == []


# ---- A store that knows conditions on PutObject, and not where several parts become an object


@pytest.fixture
def half_old_store(server: S3World) -> Iterator[Proxy]:
    keys = server.server.access_key, server.server.secret_key
    with proxy(server.options.endpoint or "", *keys, forgets=["CompleteMultipartUpload"]) as found:
        server.options = server.options.replace(endpoint=found.endpoint)
        yield found


def test_a_store_that_completes_over_what_is_there_is_found_out_before_the_first_byte(
    server: S3World, big: Path, source: Path, half_old_store: Proxy
) -> None:
    server.upload(source, "small")
    assert half_old_store.asked["CompleteMultipartUpload"] == 0, "who has no parts does not ask about them"
    with refused(Reason.CONDITIONAL_WRITES_UNSUPPORTED) as caught:
        server.upload(big)
    assert "several parts" in caught.value.message
    assert server.paths() == sorted(f"small/{name}" for name in (MARKER, *tree(source)))
    assert server.uploads() == []
    with refused(Reason.CONDITIONAL_WRITES_UNSUPPORTED):
        server.upload(big)
    assert half_old_store.asked["CompleteMultipartUpload"] == 1, "it is asked once"
    stored = server.upload(big, layout=Layout.UNIQUE)
    server.manager().download(stored.storage_uri, server.work / "restored")
    assert tree(server.work / "restored") == tree(big)
    assert server.uploads() == []


def test_the_question_about_parts_is_asked_once_and_costs_seven_small_requests(
    server: S3World, big: Path, source: Path, between: Proxy
) -> None:
    server.upload(source, "small")
    before = between.asked.copy()
    server.upload(big, "first")
    first, before = between.asked - before, between.asked.copy()
    server.upload(big, "second")
    question = first - (between.asked - before)
    parts = ("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload")
    assert question == dict.fromkeys((*parts, "PutObject", "HeadObject", "DeleteObject"), 1)


# ---- A network that is none


RETRIED = [
    *((operation, fault) for operation in ("PutObject", "UploadPart") for fault in Fault if fault is not Fault.CUT_ANSWER),
    ("CreateMultipartUpload", Fault.SLOW_DOWN),
    ("CompleteMultipartUpload", Fault.SLOW_DOWN),
    ("CompleteMultipartUpload", Fault.LOSE_REPLY),
    ("ListObjectsV2", Fault.CUT_ANSWER),
]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("operation", "fault"), RETRIED, ids=[f"{what}-{fault.name}" for what, fault in RETRIED])
def test_an_upload_gets_over_what_befalls_one_request(
    server: S3World, big: Path, between: Proxy, operation: str, fault: Fault
) -> None:
    between.plan(fault, operation, key={"PutObject": "small.bin", "ListObjectsV2": ""}.get(operation, "model.bin"))
    stored = server.upload(big)
    assert between.happened[fault] == 1
    assert stored.data_owner
    assert stored.size_bytes == size_of(big)
    assert tree(server.download()) == tree(big)
    assert server.uploads() == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [Fault.STALL, Fault.CUT_ANSWER, Fault.SLOW_DOWN, Fault.LOSE_REPLY], ids=lambda f: f.name)
def test_a_download_gets_over_what_befalls_one_request(server: S3World, big: Path, between: Proxy, fault: Fault) -> None:
    server.upload(big)
    for key in ("model.bin", "small.bin", MARKER):
        between.plan(fault, "GetObject", key=key)
    assert tree(server.download()) == tree(big)
    assert between.happened[fault] == 3


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [Fault.STALL, Fault.CUT, Fault.SLOW_DOWN], ids=lambda f: f.name)
def test_a_store_that_never_takes_a_part_is_unavailable_and_what_it_has_taken_is_kept(
    server: S3World, big: Path, between: Proxy, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(s3_wire, "ATTEMPTS", 2)
    between.plan(fault, "UploadPart", times=1000, key="model.bin")
    with refused(Reason.STORE_UNAVAILABLE) as caught:
        upload_as_a_mover(server, big)
    assert caught.value.retryable
    assert server.server.secret_key not in str(caught.value)
    assert server.uploads() == ["run/model.bin"]
    with refused(Reason.NOT_FOUND):
        server.backend.get_metadata(server.uri())


def test_a_store_that_says_slow_down_gets_fewer_requests_at_once(server: S3World, big: Path, between: Proxy) -> None:
    between.plan(Fault.SLOW_DOWN, "UploadPart", times=2, key="model.bin")
    server.upload(big)
    gate = server.open(server.uri())._connection.wire.gate  # type: ignore[attr-defined]
    assert gate.limit < STREAMS
    assert tree(server.download()) == tree(big)


# ---- A mover that is killed


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def settled_bytes(server: S3World) -> int:
    """What the server has of the data: whole objects, and whole parts of unfinished ones."""
    client, place = server.client, {"Bucket": server.bucket, "Prefix": server.prefix}
    objects = client.list_objects_v2(**place).get("Contents", [])
    found = sum(item["Size"] for item in objects if not item["Key"].endswith(MARKER))
    for upload in client.list_multipart_uploads(**place).get("Uploads", []):
        named = {"Bucket": server.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        found += sum(part["Size"] for part in client.list_parts(**named).get("Parts", []))
    return int(found)


@pytest.mark.parametrize("tenths", range(10))
def test_after_a_kill_only_what_was_on_its_way_is_sent_again(s3_world: S3World, tmp_path: Path, tenths: int) -> None:
    source = tmp_path / "source"
    make(source, {f"small-{number}": bytes([number]) * 1000 for number in range(20)})
    make(source, {"model.bin": os.urandom(MIB) * 61, "optimizer.pt": os.urandom(MIB) * 21, "config.json": b"{}"})
    size = size_of(source)
    with proxy(s3_world.options.endpoint or "", s3_world.server.access_key, s3_world.server.secret_key) as between:
        s3_world.options = s3_world.options.replace(endpoint=between.endpoint)
        killed: list[subprocess.Popen[bytes]] = []
        may_kill = threading.Event()

        def kill() -> None:
            may_kill.wait(60)
            killed[0].send_signal(signal.SIGKILL)

        between.at_byte(max(1, size * tenths // 10), kill)
        killed.append(start_mover(s3_world, source))
        may_kill.set()
        assert outcome(killed[0])[0] == -signal.SIGKILL
        between.wait_idle()
        there, first = settled_bytes(s3_world), between.bytes_of_data
        assert first - there <= STREAMS * PART_SIZE, "at most one part of each stream is lost"

        code, result, log = outcome(start_mover(s3_world, source, earlier_mover_gone=True))
        assert code == ExitCode.DONE, log
        assert result is not None
        assert result.stored is not None
        assert between.bytes_of_data - first == size - there, "what is whole in the store is not sent again"
    assert s3_world.uploads() == []
    s3_world.options = s3_world.options.replace(endpoint=s3_world.server.endpoint)
    assert tree(s3_world.download()) == tree(source)
