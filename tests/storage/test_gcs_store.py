"""What only Google's store does: pieces that are objects, generations, and refusals in Google's words."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import google_crc32c
import pytest
from gcs_world import STALL, GCSWorld, Rule
from google.auth.credentials import Credentials
from google.auth.exceptions import RefreshError, TransportError
from storage_world import MARKER, MIB, fetched, make, put_object, refused, tree

from checkpoint_operator.api.errors import ExitCode, Reason
from checkpoint_operator.api.names import ENV_PLAN
from checkpoint_operator.api.protocol import Layout, Operation, Plan, Source, TargetOptions
from checkpoint_operator.storage import StorageManager, gcs, gcs_client, gcs_crc32c, gcs_credentials
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.gcs_client import classify
from checkpoint_operator.storage.gcs_identity import Identity
from checkpoint_operator.storage.gcs_pieces import parse_piece
from checkpoint_operator.storage.store import Part, Piece, UploadLost
from checkpoint_operator.storage.transfer import STREAMS

KIB = 1 << 10
FORGED = "test-only-forged-secret"
UPLOAD, COMPOSE = r"^POST /upload/", r"^POST .*/compose\?"

needs_real_gcs = pytest.mark.xfail(
    strict=True, reason="needs the real service: fake-gcs-server ignores conditions on compose and delete"
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "PART_SIZE", 64 * KIB)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps failing is given up at the second try."""
    monkeypatch.setattr(gcs_client, "DEADLINE", 0.1)


@pytest.fixture
def big_source(tmp_path: Path) -> Path:
    """One file of 70 pieces beside a small one."""
    return make(tmp_path / "big", {"model.bin": os.urandom(70 * 64 * KIB - 5), "small": b"x"})


def everything_said(error: BaseException) -> str:
    """Every text that a log, a debugger or a crash reporter could show of an exception and its causes."""
    texts, todo = [], [error]
    while todo:
        one = todo.pop()
        texts += [str(one), repr(one), repr(one.args), repr(vars(one)), "".join(traceback.format_exception(one))]
        todo += [cause for cause in (one.__cause__, one.__context__) if cause]
    return "\n".join(texts)


def pieces(world: GCSWorld) -> list[str]:
    return [path for path in world.paths() if ".partial-" in path]


def compositions(world: GCSWorld) -> list[str]:
    """What was asked for, but for the question whether the store honours the condition on it."""
    return [line.split("/o/")[1] for line in world.proxy.requests if "/compose?" in line and ".probe-" not in line]


def sent_in_pieces(world: GCSWorld, content: bytes, size: int = 64 * KIB) -> tuple[str, str, list[Part]]:
    """(key, upload, parts) of an upload that is not finished, by a process that is gone."""
    store, key = world.store(), world.prefix + "run/model.bin"
    upload_id, parts = store.start_upload(key, "uid-a"), []
    for number, start in enumerate(range(0, len(content), size), 1):
        body = content[start : start + size]
        digest = store.digest(body)
        token = store.put_part(key, upload_id, number, body, digest)
        parts.append(Part(number, len(body), token, digest))
    return key, upload_id, parts


# ---- Checksums


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (1, 1), (3, 65536), (65537, 7), (1, 2, 3, 4, 5)])
def test_the_checksum_of_the_whole_comes_from_those_of_its_pieces(gcs_world: GCSWorld, lengths: tuple[int, ...]) -> None:
    store, bodies = gcs_world.store(), [os.urandom(length) for length in lengths]
    whole = gcs_crc32c.encode(google_crc32c.value(b"".join(bodies)))
    assert store.checksum([Piece(len(body), store.digest(body)) for body in bodies]) == whole


def test_every_kind_of_buffer_has_the_same_checksum_however_long_it_is() -> None:
    body = os.urandom(600 * KIB)
    expected = google_crc32c.value(body)
    assert [gcs_crc32c.crc32c(kind(body)) for kind in (bytes, bytearray, memoryview)] == [expected] * 3
    assert gcs_crc32c.decode(gcs_crc32c.encode(expected)) == expected.to_bytes(4, "big")


def test_a_body_that_was_damaged_on_its_way_is_refused_by_the_store_and_nothing_is_kept(gcs_world: GCSWorld) -> None:
    store = gcs_world.store()
    with refused(Reason.INTEGRITY_MISMATCH):
        put_object(store, gcs_world.prefix + "run/x", b"damaged", store.digest(b"as it was"), "uid-a")
    upload_id = store.start_upload(gcs_world.prefix + "run/x", "uid-a")
    with refused(Reason.INTEGRITY_MISMATCH):
        store.put_part(gcs_world.prefix + "run/x", upload_id, 1, b"damaged", store.digest(b"as it was"))
    assert gcs_world.paths() == []


def test_the_largest_file_needs_three_levels_and_parts_of_160_mib(gcs_world: GCSWorld) -> None:
    store = gcs_world.store()
    assert store.part_size(0) == store.part_size(32768 * (16 << 20)) == 16 << 20
    assert store.part_size(5 << 40) == 160 << 20


# ---- Composition


@pytest.mark.usefixtures("small_pieces")
def test_a_large_file_is_composed_in_levels_and_leaves_nothing_but_itself(gcs_world: GCSWorld, big_source: Path) -> None:
    gcs_world.upload(big_source)
    assert gcs_world.paths() == [f"run/{name}" for name in (MARKER, "model.bin", "small")]
    composed = compositions(gcs_world)
    assert len(composed) == 4, "70 pieces are three groups, and those are the file"
    assert "model.bin" in composed[-1]
    assert all("ifGenerationMatch=0" in line for line in composed)
    assert tree(gcs_world.download()) == tree(big_source)
    [large, _] = gcs_world.backend.get_manifest(gcs_world.uri()).table.files
    assert large.parts == 70
    stat = gcs_world.store().stat(gcs_world.prefix + "run/model.bin")
    assert stat is not None
    content = (big_source / "model.bin").read_bytes()
    assert (stat.owner, stat.checksum) == ("uid-a", gcs_crc32c.encode(google_crc32c.value(content)))


@pytest.mark.usefixtures("small_pieces")
def test_levels_go_as_deep_as_it_takes(gcs_world: GCSWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "COMPOSE_LIMIT", 3)
    deep = make(tmp_path / "deep", {"model.bin": os.urandom(28 * 64 * KIB)})  # 28, 10, 4, 2 and the file
    gcs_world.upload(deep)
    assert len(compositions(gcs_world)) == 10 + 4 + 2 + 1
    assert tree(gcs_world.download()) == tree(deep)
    assert pieces(gcs_world) == []


@pytest.mark.usefixtures("small_pieces", "sequential")
def test_after_a_kill_the_pieces_that_are_there_are_not_sent_again(gcs_world: GCSWorld, big_source: Path) -> None:
    cancelled = threading.Event()

    def stop_at_the_40th(verb: str, _: str) -> None:
        if verb == "put_part" and gcs_world.calls["put_part"] == 40:
            cancelled.set()

    gcs_world.cues.append(stop_at_the_40th)
    with pytest.raises(Cancelled):
        gcs_world.upload(big_source, cancelled=cancelled)
    there = len(pieces(gcs_world))
    assert 40 <= there < 70
    assert gcs_world.uploads() == ["run/model.bin"]
    before = gcs_world.proxy.sent
    gcs_world.upload(big_source)
    sent, size = gcs_world.proxy.sent - before, (big_source / "model.bin").stat().st_size
    rest = size - there * 64 * KIB
    assert rest <= sent <= rest + 64 * KIB + 200 * KIB, "what is not sent again is what was there; the rest are requests"
    assert tree(gcs_world.download()) == tree(big_source)
    assert pieces(gcs_world) == []


def start_mover(world: GCSWorld, source: Path, *, earlier_mover_gone: bool = False) -> subprocess.Popen[bytes]:
    plan = Plan(
        operation=Operation.UPLOAD,
        artifact_uid="uid-a",
        target_uri=str(world.uri()),
        options=world.options,
        source=Source(root=str(source.parent), path=source.name),
        earlier_mover_gone=earlier_mover_gone,
    )
    return subprocess.Popen(
        [sys.executable, "-m", "checkpoint_operator.mover"],
        env={**os.environ, ENV_PLAN: plan.model_dump_json(by_alias=True, exclude_none=True)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_mover_that_is_killed_leaves_pieces_and_the_next_one_sends_only_the_rest(
    gcs_world: GCSWorld, tmp_path: Path
) -> None:
    size = 16 * MIB
    source = make(tmp_path / "source", {"model.bin": b"".join(bytes([number]) * size for number in range(5))})
    # The claim and the two questions about conditions are six writes; then two pieces, and no answer to the third.
    gcs_world.proxy.rules.append(Rule(UPLOAD, STALL, after=6 + 2))
    first = start_mover(gcs_world, source)
    deadline = time.monotonic() + 60
    while len(pieces(gcs_world)) < 2:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    first.communicate()
    gcs_world.proxy.rules.clear()
    assert gcs_world.uploads() == ["run/model.bin"]
    assert json.loads(gcs_world.get(f"run/{MARKER}"))["state"] == "Uploading"

    before = gcs_world.proxy.sent
    second = start_mover(gcs_world, source, earlier_mover_gone=True)
    _, log = second.communicate(timeout=120)
    assert second.returncode == ExitCode.DONE, log.decode()
    assert 3 * size < gcs_world.proxy.sent - before < 3 * size + 64 * KIB
    assert gcs_world.paths() == [f"run/{name}" for name in (MARKER, "model.bin")]
    assert tree(gcs_world.download()) == tree(source)


@pytest.mark.usefixtures("small_pieces", "impatient")
def test_a_composition_that_was_killed_goes_on_without_a_byte_being_sent_again(
    gcs_world: GCSWorld, big_source: Path
) -> None:
    gcs_world.proxy.rules.append(Rule(r"model\.bin/compose\?", 503))
    with refused(Reason.STORE_UNAVAILABLE):
        gcs_world.upload(big_source)
    assert len(pieces(gcs_world)) == 73, "70 as they were sent, and three that they were composed into"
    assert gcs_world.uploads() == ["run/model.bin"]
    gcs_world.proxy.rules.clear()
    before = len(gcs_world.proxy.requests)
    gcs_world.upload(big_source)
    assert not [line for line in gcs_world.proxy.requests[before:] if "upload" in line and "partial" in line]
    assert gcs_world.calls["put_part"] == 70
    assert tree(gcs_world.download()) == tree(big_source)
    assert pieces(gcs_world) == []


@pytest.mark.usefixtures("small_pieces")
def test_a_composed_piece_that_is_not_what_it_should_be_is_made_again(gcs_world: GCSWorld) -> None:
    content = os.urandom(40 * 64 * KIB)
    key, upload_id, parts = sent_in_pieces(gcs_world, content)
    gcs_world.put(f"run/.partial-{upload_id}/c1-00001.checkpoint-piece", b"of another try")
    assert gcs_world.store().finish_upload(key, upload_id, parts, "uid-a") is not None
    assert gcs_world.get("run/model.bin") == content


@pytest.mark.usefixtures("small_pieces", "impatient")
def test_pieces_that_cannot_be_removed_do_not_fail_the_upload_and_go_with_the_artifact(
    gcs_world: GCSWorld, big_source: Path
) -> None:
    gcs_world.proxy.rules.append(Rule(r"^DELETE .*partial-", 503))
    gcs_world.upload(big_source)
    assert len(pieces(gcs_world)) == 73 + 1, "and the one with which the store was asked"
    assert not [entry for entry in gcs_world.store().list(gcs_world.prefix) if ".partial-" in entry.key]
    gcs_world.proxy.rules.clear()
    gcs_world.delete()
    assert gcs_world.paths() == []


def test_a_composition_that_is_not_what_was_sent_is_removed_and_said(gcs_world: GCSWorld) -> None:
    key, upload_id, parts = sent_in_pieces(gcs_world, b"abc", size=1)
    wrong = [*parts[:2], Part(3, 1, parts[2].token, gcs_world.store().digest(b"X"))]
    with refused(Reason.INTEGRITY_MISMATCH):
        gcs_world.store().finish_upload(key, upload_id, wrong, "uid-a")
    assert gcs_world.store().stat(key) is None


# ---- Pieces are no data, and data is no piece


def test_another_process_finds_an_upload_with_its_parts_and_forgets_it(gcs_world: GCSWorld) -> None:
    key, upload_id, parts = sent_in_pieces(gcs_world, b"abc", size=1)
    other = gcs_world.store()
    assert [(upload.key, upload.id) for upload in other.list_uploads(gcs_world.prefix)] == [(key, upload_id)]
    assert list(other.list_parts(key, upload_id)) == parts
    assert other.is_part(parts[0], b"a", other.digest(b"a"))
    assert not other.is_part(parts[0], b"b", other.digest(b"b"))
    assert list(other.list(gcs_world.prefix)) == []
    assert other.put_part(key, upload_id, 3, b"c", other.digest(b"c")) == parts[2].token, "it is there already"
    assert other.put_part(key, upload_id, 3, b"C", other.digest(b"C")) != parts[2].token, "sent again it is replaced"
    other.abort_upload(key, upload_id)
    other.abort_upload(key, upload_id)
    assert list(other.list_parts(key, upload_id)) == []
    assert gcs_world.paths() == []
    with pytest.raises(UploadLost):
        gcs_world.store().put_part(key, upload_id, 1, b"a", other.digest(b"a"))


def test_the_uploads_of_a_nested_artifact_have_its_keys(gcs_world: GCSWorld) -> None:
    store = gcs_world.store()
    for name in ("run/a b#?%2F日本.bin", "run/nested/model.bin"):
        upload_id = store.start_upload(gcs_world.prefix + name, "uid-a")
        store.put_part(gcs_world.prefix + name, upload_id, 1, b"x", store.digest(b"x"))
    assert gcs_world.uploads() == ["run/a b#?%2F日本.bin", "run/nested/model.bin"]


def test_a_strangers_object_of_a_similar_name_is_data_and_nobody_removes_it(gcs_world: GCSWorld, source: Path) -> None:
    strange = "run/.partial-0123456789abcdef/00001.checkpoint-piece"
    gcs_world.put(strange, b"mine")
    assert gcs_world.uploads() == []
    with refused(Reason.TARGET_NOT_EMPTY):
        gcs_world.upload(source)
    gcs_world.delete()
    assert gcs_world.paths() == [strange]


@pytest.mark.parametrize("named", ["", "../other/model.bin", "nested%2Fmodel.bin"])
def test_a_piece_that_says_it_belongs_elsewhere_is_none(named: str) -> None:
    name = "run/.partial-0123456789abcdef/00001.checkpoint-piece"
    assert parse_piece(name, {"artifact-uid": "uid-a", "piece-of": "model.bin"}) is not None
    assert parse_piece(name, {"artifact-uid": "uid-a", "piece-of": named}) is None


REFUSED = {
    "too long": "k" * 1025,
    "too long in bytes": "é" * 513,
    "a folder without room for pieces": "d" * 1000 + "/f",
    "a newline": "run/a\nb",
    "a carriage return": "run/a\rb",
    "a certificate's challenge": ".well-known/acme-challenge/x",
    "a dot": ".",
    "two dots": "..",
    "a piece": "run/.partial-0123456789abcdef/00001.checkpoint-piece",
    "a composed piece": ".partial-0123456789abcdef/c1-00001.checkpoint-piece",
}
KEPT = [
    "k" * 1024,
    "d" * 970 + "/f",
    "run/.partial-0123456789abcdef/00001",
    ".partial-0123456789abcdef",
    "x/.well-known/acme-challenge/x",
]


@pytest.mark.parametrize("key", REFUSED.values(), ids=REFUSED)
def test_a_name_that_google_would_not_keep_is_refused_without_a_request(gcs_world: GCSWorld, key: str) -> None:
    assert gcs_world.store().refusal(key)
    assert gcs_world.proxy.requests == []


@pytest.mark.parametrize("key", KEPT)
def test_every_other_name_is_kept(gcs_world: GCSWorld, key: str) -> None:
    assert gcs_world.store().refusal(key) is None


def test_a_source_with_a_pieces_name_is_refused_before_the_first_byte(gcs_world: GCSWorld, tmp_path: Path) -> None:
    odd = make(tmp_path / "odd", {"sub/x.checkpoint-piece": b"x"})
    with refused(Reason.UNSUPPORTED_NAME):
        gcs_world.upload(odd)
    assert gcs_world.paths() == []


# ---- Conditions


def test_a_piece_that_is_gone_loses_the_upload(gcs_world: GCSWorld) -> None:
    key, upload_id, parts = sent_in_pieces(gcs_world, b"abc", size=1)
    gcs_world.proxy.rules.append(Rule(COMPOSE, 404))  # the emulator says 500
    with pytest.raises(UploadLost):
        gcs_world.store().finish_upload(key, upload_id, parts, "uid-a")


def test_a_refused_composition_means_that_the_object_is_there_or_a_piece_is_another(gcs_world: GCSWorld) -> None:
    key, upload_id, parts = sent_in_pieces(gcs_world, b"abc", size=1)
    gcs_world.proxy.rules.append(Rule(COMPOSE, 412))
    with pytest.raises(UploadLost):
        gcs_world.store().finish_upload(key, upload_id, parts, "uid-a")
    gcs_world.put("run/model.bin", b"a stranger's")
    assert gcs_world.store().finish_upload(key, upload_id, parts, "uid-a") is None
    assert gcs_world.get("run/model.bin") == b"a stranger's"


def test_a_refused_removal_leaves_the_object_alone(gcs_world: GCSWorld) -> None:
    gcs_world.put("run/x", b"x")
    gcs_world.proxy.rules.append(Rule("^DELETE", 412))
    gcs_world.store().remove(gcs_world.prefix + "run/x", "1")
    assert gcs_world.get("run/x") == b"x"
    assert "ifGenerationMatch=1" in gcs_world.proxy.requests[-1]


@pytest.fixture(params=["the proxy", pytest.param("the store", marks=needs_real_gcs)])
def judged_world(request: pytest.FixtureRequest, gcs_world: GCSWorld) -> GCSWorld:
    """Who looks at the conditions on compose and delete: the proxy in Google's place, or the store itself."""
    gcs_world.proxy.judges = request.param == "the proxy"
    return gcs_world


def test_a_removal_means_one_generation(judged_world: GCSWorld) -> None:
    judged_world.put("run/x", b"x")
    judged_world.store().remove(judged_world.prefix + "run/x", "1")
    assert judged_world.paths() == ["run/x"]


def test_a_composition_never_overwrites(judged_world: GCSWorld) -> None:
    key, upload_id, parts = sent_in_pieces(judged_world, b"abc", size=1)
    judged_world.put("run/model.bin", b"a stranger's")
    judged_world.store().finish_upload(key, upload_id, parts, "uid-a")
    assert judged_world.get("run/model.bin") == b"a stranger's"


def test_a_composition_takes_no_other_generation_of_a_piece(judged_world: GCSWorld) -> None:
    key, upload_id, parts = sent_in_pieces(judged_world, b"abc", size=1)
    judged_world.put(f"run/.partial-{upload_id}/00002.checkpoint-piece", b"b")
    with pytest.raises(UploadLost):
        judged_world.store().finish_upload(key, upload_id, parts, "uid-a")


def test_a_version_that_was_replaced_is_not_fetched(gcs_world: GCSWorld) -> None:
    store, key = gcs_world.store(), gcs_world.prefix + "run/x"
    written = put_object(store, key, b"first", store.digest(b"first"), "uid-a")
    assert written is not None
    assert fetched(store, key, written.token, 1, 3) == b"irs"
    gcs_world.put("run/x", b"other")
    with refused(Reason.INTEGRITY_MISMATCH):
        fetched(store, key, written.token, 0, 5)


def test_a_range_that_goes_over_the_end_is_no_answer(gcs_world: GCSWorld) -> None:
    store, key = gcs_world.store(), gcs_world.prefix + "run/x"
    written = put_object(store, key, b"short", store.digest(b"short"), "uid-a")
    assert written is not None
    with refused(Reason.INTEGRITY_MISMATCH):
        fetched(store, key, written.token, 0, 6)


def test_a_marker_may_not_be_cached_even_in_a_public_bucket(gcs_world: GCSWorld, source: Path) -> None:
    gcs_world.upload(source)
    blob = gcs_world.client.bucket(gcs_world.bucket).get_blob(f"{gcs_world.prefix}run/{MARKER}")
    assert (blob.cache_control, blob.content_type) == ("no-store", "application/json")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("lost", [UPLOAD, COMPOSE])
def test_a_reply_that_is_lost_is_asked_for_and_nothing_is_written_twice(
    gcs_world: GCSWorld, tmp_path: Path, lost: str
) -> None:
    source = make(tmp_path / "source", {"large.bin": os.urandom(3 * 64 * KIB), "small": b"x"})
    gcs_world.proxy.rules.append(Rule(lost, 0, times=1))
    gcs_world.upload(source)
    assert gcs_world.proxy.rules[0].times == 0
    assert gcs_world.paths() == [f"run/{name}" for name in (MARKER, "large.bin", "small")]
    assert tree(gcs_world.download()) == tree(source)


def test_a_download_goes_on_after_an_answer_that_was_cut_off(gcs_world: GCSWorld, source: Path) -> None:
    gcs_world.upload(source)
    gcs_world.proxy.rules.append(Rule("^GET /download/.*model", 0, times=1))
    assert tree(gcs_world.download()) == tree(source)


@pytest.mark.usefixtures("small_pieces")
def test_no_request_needs_more_than_the_rights_that_the_page_names(gcs_world: GCSWorld, big_source: Path) -> None:
    gcs_world.upload(big_source)
    gcs_world.download()
    gcs_world.delete()
    of_objects = re.compile(
        r"(POST /upload|GET /download)/storage/v1/b/checkpoints/o|(GET|DELETE|POST) /storage/v1/b/checkpoints/o"
    )
    assert [line for line in gcs_world.proxy.requests if not of_objects.match(line)] == []


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("request_line", [UPLOAD, COMPOSE, "^GET /download/.*large"])
def test_a_connection_that_stalls_is_given_up_and_the_request_sent_again(
    gcs_world: GCSWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_line: str
) -> None:
    monkeypatch.setattr(gcs_client, "TIMEOUT", (5.0, 0.5))
    source = make(tmp_path / "source", {"large.bin": os.urandom(3 * 64 * KIB)})
    gcs_world.proxy.rules.append(Rule(request_line, STALL, times=1))
    gcs_world.upload(source)
    assert tree(gcs_world.download()) == tree(source)
    assert gcs_world.proxy.rules[0].times == 0


# ---- A store without conditions


def test_a_store_without_conditions_is_refused_before_the_first_byte(
    gcs_without_conditions_world: GCSWorld, source: Path
) -> None:
    with refused(Reason.CONDITIONAL_WRITES_UNSUPPORTED):
        gcs_without_conditions_world.upload(source)
    assert gcs_without_conditions_world.paths() == []


@pytest.mark.usefixtures("small_pieces")
def test_layout_unique_needs_no_conditions_not_even_for_large_files(
    gcs_without_conditions_world: GCSWorld, big_source: Path
) -> None:
    world = gcs_without_conditions_world
    stored = world.upload(big_source, layout=Layout.UNIQUE)
    name = stored.storage_uri.removeprefix(world.base + "/")
    assert world.paths() == sorted(f"{name}/{file}" for file in ("model.bin", "small", MARKER))
    assert tree(world.download(name)) == tree(big_source)
    world.delete(layout=Layout.UNIQUE)
    assert world.paths() == []


# ---- Refusals

ANSWERS = {
    "a token that is not accepted": (Rule("", 401), Reason.CREDENTIALS_REFUSED),
    "a right that is missing": (Rule("", 403), Reason.CREDENTIALS_REFUSED),
    "too many requests, as 403": (Rule("", 403, "rateLimitExceeded"), Reason.STORE_UNAVAILABLE),
    "too many requests": (Rule("", 429), Reason.STORE_UNAVAILABLE),
    "an outage": (Rule("", 503), Reason.STORE_UNAVAILABLE),
    "an organisation's policy": (Rule(UPLOAD, 412, "orgPolicyConstraintFailed"), Reason.REQUEST_REJECTED),
    "a hold": (Rule(UPLOAD, 403, "objectUnderActiveHold"), Reason.REQUEST_REJECTED),
    "no multipart at all": (Rule(UPLOAD, 501), Reason.CONDITIONAL_WRITES_UNSUPPORTED),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("rule", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_what_google_answers_has_its_reason(gcs_world: GCSWorld, source: Path, rule: Rule, reason: Reason) -> None:
    gcs_world.proxy.rules.append(rule)
    with refused(reason) as caught:
        gcs_world.upload(source)
    if reason is not Reason.CONDITIONAL_WRITES_UNSUPPORTED:
        assert caught.value.context["backend"] == "gcs"
        assert caught.value.context["request_id"] == "played"
    gcs_world.proxy.rules.clear()
    assert gcs_world.paths() == []


@pytest.mark.parametrize("status", [429, 503])
def test_a_store_that_is_busy_gets_fewer_requests_at_once(gcs_world: GCSWorld, source: Path, status: int) -> None:
    gcs_world.proxy.rules.append(Rule(r"^POST /upload.*", status, times=1, after=4))
    gcs_world.upload(source)
    assert gcs_world.open(gcs_world.uri()).gate.limit < STREAMS  # type: ignore[attr-defined]
    assert tree(gcs_world.download()) == tree(source)


def test_a_short_outage_is_not_even_noticed(gcs_world: GCSWorld, source: Path) -> None:
    gcs_world.proxy.rules.append(Rule(UPLOAD, 503, times=2))
    gcs_world.upload(source)
    assert tree(gcs_world.download()) == tree(source)


@pytest.mark.usefixtures("impatient")
def test_a_store_that_is_down_is_no_verdict(gcs_world: GCSWorld, source: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gcs_world.options = TargetOptions(endpoint=f"http://127.0.0.1:{free.getsockname()[1]}")
    with refused(Reason.STORE_UNAVAILABLE):
        gcs_world.upload(source)


def test_a_missing_bucket_is_named_whatever_is_asked_first(gcs_world: GCSWorld, source: Path) -> None:
    gcs_world.base = "gs://no-such-bucket/x"
    for act in (
        lambda: gcs_world.upload(source),
        gcs_world.download,
        lambda: gcs_world.backend.get_metadata(gcs_world.uri()),
    ):
        with refused(Reason.BUCKET_NOT_FOUND) as caught:
            act()
        assert "no-such-bucket" in str(caught.value)
    assert "nothing is left there" in gcs_world.delete()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RefreshError("invalid_grant", {"assertion": FORGED}), Reason.CREDENTIALS_REFUSED),
        (RefreshError("backend_error", retryable=True), Reason.STORE_UNAVAILABLE),
        (TransportError(FORGED), Reason.STORE_UNAVAILABLE),
    ],
)
def test_what_a_token_endpoint_says_is_never_repeated(error: Exception, reason: Reason) -> None:
    found, said, _ = classify(error)
    assert found is reason
    assert FORGED not in said


# ---- Credentials


@pytest.fixture
def without_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A profile's folder; Google itself would be asked, so these tests end before any request."""
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no-gcloud"))
    folder = tmp_path / "credentials"
    folder.mkdir()
    return folder


def key_file(**changes: Any) -> dict[str, Any]:
    """A key file as Google makes it, whose key was made for this test."""
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return {
        "type": "service_account",
        "client_email": "mover@project.iam.gserviceaccount.com",
        "private_key": key.decode(),
        "token_uri": "https://oauth2.googleapis.com/token",
        **changes,
    }


FEDERATED = {
    "type": "external_account",
    "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/k",
    "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
    "token_url": "https://sts.googleapis.com/v1/token",
    "credential_source": {"file": "/var/run/secrets/tokens/gcp"},
    "service_account_impersonation_url": "https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts/m:x",
}


def connect(**options: Any) -> Any:
    return StorageManager(TargetOptions(**options)).get_metadata("gs://checkpoints/run")


def opened(folder: Path) -> gcs.GCSStore:
    from checkpoint_operator.api.uris import TargetURI

    return gcs.open_gcs(TargetURI.parse("gs://checkpoints/run"), TargetOptions(credentials_directory=str(folder)), 4)


def test_a_key_file_and_a_federation_by_file_are_used(without_emulator: Path) -> None:
    for profile in (key_file(), FEDERATED, key_file(token_uri="https://accounts.google.com/o/oauth2/token")):
        (without_emulator / "gcp.json").write_text(json.dumps(profile))
        session = opened(without_emulator)._bucket._session
        assert type(session.credentials._inner).__module__.startswith("google.")
        assert session.credentials.token is None, "nothing was asked yet"


class TokenEndpoint:
    """Google's token endpoint as its reference prints it (https://developers.google.com/identity/protocols/oauth2)."""

    def __init__(self) -> None:
        self.asked_by: list[str] = []

    def __call__(self, url: str, body: bytes, **_: Any) -> Any:
        [assertion] = parse_qs(body.decode())["assertion"]
        claims = assertion.split(".")[1]
        self.asked_by.append(json.loads(base64.urlsafe_b64decode(claims + "=="))["iss"])
        answer = json.dumps({"access_token": f"token-{len(self.asked_by)}", "expires_in": 3600})
        return SimpleNamespace(status=200, headers={}, data=answer.encode())


def test_a_profile_that_was_rotated_is_read_again_for_the_next_token(without_emulator: Path) -> None:
    profile, google = without_emulator / "gcp.json", TokenEndpoint()
    profile.write_text(json.dumps(key_file(client_email="old@project.iam.gserviceaccount.com")))
    credentials = opened(without_emulator)._bucket._session.credentials
    credentials.refresh(google)
    assert (credentials.token, credentials.valid) == ("token-1", True)
    profile.write_text("")  # somebody is writing it
    credentials.refresh(google)
    profile.write_text(json.dumps(key_file(client_email="new@project.iam.gserviceaccount.com")))
    credentials.refresh(google)
    assert credentials.token == "token-3"
    assert [name.partition("@")[0] for name in google.asked_by] == ["old", "old", "new"]


def test_a_token_that_is_refused_is_replaced_and_the_request_made_again(
    gcs_world: GCSWorld, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session does it for whoever has a token; that what is asked then is ours, the test above shows."""
    refreshed: list[object] = []

    class Rotated(gcs_credentials.MountedCredentials):
        def __init__(self) -> None:
            Credentials.__init__(self)

        def refresh(self, request: object) -> None:
            refreshed.append(request)
            self.token = f"token-{len(refreshed)}"

    monkeypatch.setattr(gcs_client, "make_credentials", lambda *_: Rotated())
    monkeypatch.setattr(gcs, "choose_identity", lambda options: Identity(options.endpoint))
    gcs_world.proxy.rules.append(Rule(UPLOAD, 401, times=1, after=4))
    gcs_world.upload(source)
    assert len(refreshed) == 2, "once to begin with, once after the refusal"
    assert tree(gcs_world.download()) == tree(source)


def source_of(**credential_source: Any) -> dict[str, Any]:
    return {**FEDERATED, "credential_source": credential_source}


REFUSED_PROFILES: dict[str, bytes | dict[str, Any]] = {
    "empty": b"",
    "binary": b"\xff" + FORGED.encode(),
    "no JSON": FORGED.encode(),
    "a list": b'["test-only-forged-secret"]',
    "nested without end": b"[" * 60000,
    "a user's own": {"type": "authorized_user", "refresh_token": FORGED},
    "a program": source_of(executable={"command": FORGED}),
    "a program beside a file": source_of(file="/x", executable={"command": FORGED}),
    "a URL": source_of(url=f"https://example.com/{FORGED}"),
    "another cloud's metadata": source_of(environment_id="aws1", regional_cred_verification_url="https://x"),
    "a foreign token endpoint": {**FEDERATED, "token_url": f"https://{FORGED}.example.com/"},
    "a look-alike": {**FEDERATED, "token_url": "https://sts.googleapis.com.example.com/"},
    "a look-alike with a user": {**FEDERATED, "token_url": "https://sts.googleapis.com@example.com/.googleapis.com"},
    "a foreign impersonation": {**FEDERATED, "service_account_impersonation_url": "https://example.com"},
    "no TLS": {**FEDERATED, "token_url": "http://sts.googleapis.com/v1/token"},
    "a key that is none": {
        "type": "service_account",
        "client_email": "x@y",
        "private_key": f"-----BEGIN PRIVATE KEY-----\n{FORGED}\n-----END PRIVATE KEY-----\n",
        "token_uri": "https://oauth2.googleapis.com/token",
    },
    "a key that is missing": {"type": "service_account", "client_email": FORGED},
    "another universe": {**FEDERATED, "universe_domain": "example.com"},
}


@pytest.mark.parametrize("content", REFUSED_PROFILES.values(), ids=REFUSED_PROFILES)
def test_a_profile_that_is_not_whole_or_would_ask_others_is_refused_and_never_shown(
    without_emulator: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | dict[str, Any]
) -> None:
    # The process's own identity would do; a profile that is broken must not borrow it.
    own = without_emulator.parent / "own.json"
    own.write_text(json.dumps(key_file()))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(own))
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (without_emulator / "gcp.json").write_bytes(data)
    with refused(Reason.CREDENTIALS_MISSING) as caught:
        connect(credentials_directory=str(without_emulator), allow_ambient_credentials=True)
    assert FORGED not in everything_said(caught.value)


def test_a_profile_that_is_not_there_is_named(without_emulator: Path) -> None:
    with refused(Reason.CREDENTIALS_MISSING) as caught:
        connect(credentials_directory=str(without_emulator), allow_ambient_credentials=True)
    assert "gcp.json" in str(caught.value)


def test_nothing_that_holds_a_key_shows_it(without_emulator: Path) -> None:
    profile = key_file()
    (without_emulator / "gcp.json").write_text(json.dumps(profile))
    store = opened(without_emulator)
    secret = profile["private_key"].splitlines()[1]
    for shown in (store, store._bucket, store._bucket._session, vars(store), vars(store._bucket)):
        assert secret not in repr(shown)


def test_the_identity_of_the_process_is_used_only_where_that_is_allowed_and_never_the_machines(
    without_emulator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(Reason.CREDENTIALS_MISSING):
        connect()
    with refused(Reason.CREDENTIALS_MISSING) as caught:  # without a word to the metadata server
        connect(allow_ambient_credentials=True)
    assert "NO_GCE_CHECK" in str(caught.value)
    own = without_emulator / "own.json"
    profile = key_file()
    own.write_text(json.dumps(profile))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(own))
    from checkpoint_operator.api.uris import TargetURI

    uri, options = TargetURI.parse("gs://checkpoints/run"), TargetOptions(allow_ambient_credentials=True)
    session = gcs.open_gcs(uri, options, 4)._bucket._session
    assert session.credentials.service_account_email == profile["client_email"]


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://storage.example.com",
        "http://10.0.0.1:4443",
        "ftp://127.0.0.1",
        f"https://user:{FORGED}@example.com",
        "https://",
    ],
)
def test_a_token_never_goes_where_others_can_read_it(without_emulator: Path, endpoint: str) -> None:
    (without_emulator / "gcp.json").write_text(json.dumps(key_file()))
    with refused(Reason.INVALID_SPEC) as caught:
        connect(credentials_directory=str(without_emulator), endpoint=endpoint)
    assert FORGED not in everything_said(caught.value)


def test_googles_own_variable_names_an_emulator(gcs_world: GCSWorld, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_world.proxy.endpoint.removeprefix("http://"))
    manager = StorageManager()
    manager.upload(source, str(gcs_world.uri()))
    assert tree(gcs_world.download()) == tree(source)


def test_an_emulator_is_never_given_the_profile(gcs_world: GCSWorld, source: Path, without_emulator: Path) -> None:
    (without_emulator / "gcp.json").write_text(json.dumps(key_file()))
    gcs_world.options = gcs_world.options.replace(credentials_directory=str(without_emulator))
    gcs_world.upload(source)
    assert tree(gcs_world.download()) == tree(source)


# ---- The extra


def test_without_googles_client_the_command_that_installs_it_is_named(
    gcs_world: GCSWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("checkpoint_operator.storage.gcs")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    with refused(Reason.BACKEND_NOT_INSTALLED) as caught:
        gcs_world.manager().get_metadata(str(gcs_world.uri()))
    assert "pip install 'checkpoint-operator[gcs]'" in str(caught.value)
