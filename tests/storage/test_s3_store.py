"""What only a bucket does: refusals, conditions, multipart uploads, and movers that die with a request on the wire."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import IncompleteReadError
from s3_world import S3World, credentials
from storage_world import MARKER, MIB, OnLook, make, race, tree

import local_cluster as lc
from checkpoint_operator.api.errors import FAILURES, ErrorCode, ExitCode, Reason
from checkpoint_operator.api.names import ENV_PLAN
from checkpoint_operator.api.protocol import Layout, Operation, Plan, Result, Source, TargetOptions, parse_line
from checkpoint_operator.storage import StorageError, StorageManager
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.s3 import classify


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source", {"config.json": b"{}", "model.safetensors": b"weights"})


@pytest.fixture
def big_source(tmp_path: Path) -> Path:
    """One file of five parts beside a small one."""
    return make(tmp_path / "big", {"model.bin": os.urandom(MIB) * 40, "small": b"x"})


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def everything_said(error: BaseException) -> str:
    """Every text that a log, a debugger or a crash reporter could show of an exception and its causes."""
    texts, seen = [], set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        texts += [str(one), repr(one), repr(one.args), repr(vars(one)), "".join(traceback.format_exception(one))]
        todo += [one.__cause__, one.__context__]
    return "\n".join(texts)


# ---- Refusals

Change = Callable[[lc.ObjectStore, Path], tuple[str, str]]
REFUSALS: dict[str, tuple[Reason, Change]] = {
    "a wrong secret": (Reason.CREDENTIALS_REFUSED, lambda store, _: (store.access_key, "wrong-" + store.secret_key)),
    "an unknown key": (Reason.CREDENTIALS_REFUSED, lambda store, _: ("unknown-key", store.secret_key)),
    "a read-only identity": (
        Reason.CREDENTIALS_REFUSED,
        lambda store, _: (store.identities["reader"].access_key, store.identities["reader"].secret_key),
    ),
    "an identity of another bucket": (
        Reason.CREDENTIALS_REFUSED,
        lambda store, _: (store.identities["tenant"].access_key, store.identities["tenant"].secret_key),
    ),
}


@pytest.mark.parametrize(("reason", "keys"), REFUSALS.values(), ids=REFUSALS)
def test_refused_credentials_are_named_and_never_shown(
    s3_world: S3World, object_store: lc.ObjectStore, source: Path, tmp_path: Path, reason: Reason, keys: Change
) -> None:
    access_key, secret_key = keys(object_store, tmp_path)
    credentials(tmp_path / "credentials", access_key, secret_key)
    with pytest.raises(StorageError) as caught:
        s3_world.upload(source)
    assert caught.value.reason is reason
    assert caught.value.code is ErrorCode.CREDENTIALS
    assert not caught.value.retryable
    assert caught.value.context["backend"] == "s3"
    assert caught.value.context["request_id"]
    assert secret_key not in everything_said(caught.value)
    assert s3_world.paths() == []


def test_an_identity_of_one_bucket_works_in_it(s3_world: S3World, object_store: lc.ObjectStore, source: Path) -> None:
    tenant = object_store.identities["tenant"]
    credentials(s3_world.work / "credentials", tenant.access_key, tenant.secret_key)
    s3_world.base = f"s3://bucket-a/{s3_world.work.name}"
    s3_world.upload(source)
    assert tree(s3_world.download()) == tree(source)
    assert s3_world.delete() == "nothing is left there"


def test_a_missing_bucket_is_named(s3_world: S3World, source: Path) -> None:
    s3_world.base = "s3://no-such-bucket/x"
    for act in (lambda: s3_world.upload(source), s3_world.download):
        with pytest.raises(StorageError, match="no-such-bucket") as caught:
            act()
        assert caught.value.reason is Reason.BUCKET_NOT_FOUND
    assert "nothing is left there" in s3_world.delete()


def test_a_store_that_is_down_is_no_verdict(s3_world: S3World, object_store: lc.ObjectStore, source: Path) -> None:
    s3_world.options = s3_world.options.replace(endpoint=closed_port())
    with pytest.raises(StorageError) as caught:
        s3_world.upload(source)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert caught.value.retryable
    assert object_store.secret_key not in everything_said(caught.value)


def test_an_answer_that_is_cut_off_is_no_verdict() -> None:
    error = IncompleteReadError(actual_bytes=1, expected_bytes=2)
    assert classify(error)[0] is Reason.STORE_UNAVAILABLE


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("how", ["absent", "empty", "blank", "binary", "two lines"])
def test_credentials_that_are_not_whole_never_become_those_of_the_process(
    s3_world: S3World, object_store: lc.ObjectStore, source: Path, monkeypatch: pytest.MonkeyPatch, missing: str, how: str
) -> None:
    # The operator's own identity could do it; a profile that is broken must not borrow it.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    names = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] if how in ("empty", "blank") else [missing]
    for name in names:
        file = s3_world.work / "credentials" / name
        contents = {"empty": b"", "blank": b" \n", "binary": b"SECRET\xff", "two lines": b"SECRET\nmore"}
        file.unlink() if how == "absent" else file.write_bytes(contents[how])
    with pytest.raises(StorageError, match=names[0]) as caught:
        s3_world.upload(source)
    assert caught.value.reason is Reason.CREDENTIALS_MISSING
    said = everything_said(caught.value)
    assert "SECRET\\" not in said
    assert object_store.secret_key not in said
    assert s3_world.paths() == []


def test_without_a_profile_the_identity_of_the_process_is_used_only_where_that_is_allowed(
    s3_world: S3World, object_store: lc.ObjectStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    s3_world.options = s3_world.options.replace(credentials_directory=None)
    with pytest.raises(StorageError) as caught:
        s3_world.upload(source)
    assert caught.value.reason is Reason.CREDENTIALS_MISSING
    s3_world.options = s3_world.options.replace(allow_ambient_credentials=True)
    assert s3_world.upload(source).data_owner


def test_the_librarys_default_finds_the_store_by_the_environment(
    s3_world: S3World, object_store: lc.ObjectStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    monkeypatch.setenv("S3_ENDPOINT_URL", object_store.endpoint)
    assert StorageManager().upload(source, str(s3_world.uri())) == str(s3_world.uri())
    monkeypatch.setenv("S3_ENDPOINT_URL", closed_port())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", object_store.endpoint)
    assert StorageManager().get_metadata(str(s3_world.uri())).size_bytes == 9


def test_a_key_that_would_be_too_long_is_refused_before_the_first_byte(s3_world: S3World, tmp_path: Path) -> None:
    deep = make(tmp_path / "deep", {"/".join(["d" * 200] * 5) + "/file": b"x"})
    with pytest.raises(StorageError, match="1024") as caught:
        s3_world.upload(deep)
    assert caught.value.reason is Reason.UNSUPPORTED_NAME
    assert s3_world.paths() == []


# ---- Conditions


def drop_conditions(params: dict[str, Any], **_: object) -> None:
    """As a store does that has never heard of them."""
    for name in ("IfNoneMatch", "IfMatch"):
        params.pop(name, None)


def answer_not_implemented(request: Any, **_: object) -> AWSResponse | None:
    """No store at hand refuses conditions by name; this one answer is played."""
    if not ({"If-None-Match", "If-Match"} & set(request.headers)) or request.method == "GET":
        return None
    body = b"<Error><Code>NotImplemented</Code><Message>A header is not implemented</Message></Error>"

    class Raw:
        def stream(self, **_: object) -> list[bytes]:
            return [body]

    headers: Any = {"x-amz-request-id": "played"}
    return AWSResponse(request.url, 501, headers, Raw())


FORGETFUL: dict[str, tuple[str, Callable[..., Any]]] = {
    "ignores conditions": ("before-parameter-build.s3", drop_conditions),
    "refuses conditions": ("before-send.s3", answer_not_implemented),
}


@pytest.mark.parametrize("hook", FORGETFUL.values(), ids=FORGETFUL)
def test_a_store_without_conditions_is_refused_before_the_first_byte(
    s3_world: S3World, source: Path, hook: tuple[str, Callable[..., Any]]
) -> None:
    s3_world.hooks.append(hook)
    with pytest.raises(StorageError, match="Unique") as caught:
        s3_world.upload(source)
    assert caught.value.reason is Reason.CONDITIONAL_WRITES_UNSUPPORTED
    assert s3_world.paths() == []


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("hook", FORGETFUL.values(), ids=FORGETFUL)
def test_layout_unique_needs_no_conditions(s3_world: S3World, source: Path, hook: tuple[str, Callable[..., Any]]) -> None:
    s3_world.hooks.append(hook)
    with pytest.raises(Cancelled):
        s3_world.upload(source, layout=Layout.UNIQUE, cancelled=OnLook(2))
    (source / "config.json").write_bytes(b"changed")
    stored = s3_world.upload(source, layout=Layout.UNIQUE, force=True)
    name = stored.storage_uri.removeprefix(s3_world.base + "/")
    assert s3_world.paths() == sorted(f"{name}/{file}" for file in ("config.json", "model.safetensors", MARKER))
    if hook[1] is answer_not_implemented:
        s3_world.hooks.remove(hook)  # ranged reads name their version too, by a condition that such a store refuses
    assert tree(s3_world.download(name)) == tree(source)
    s3_world.hooks.append(hook)
    s3_world.delete(layout=Layout.UNIQUE)
    assert s3_world.paths() == []


def test_the_question_about_conditions_is_asked_once_and_leaves_nothing(s3_world: S3World, source: Path) -> None:
    for name in ("one", "two"):
        s3_world.upload(source, name, uid=name)
    assert not [path for path in s3_world.paths() if ".probe-" in path]
    # Of markers: two claims, two commits, and the three writes of one probe.
    assert s3_world.calls["PutObject marker"] == 7


# ---- Several writers


def test_of_two_uploads_at_once_exactly_one_is_committed_and_it_is_right(s3_world: S3World, tmp_path: Path) -> None:
    sources = [make(tmp_path / name, {f"{n}.bin": name.encode() * 9 for n in range(4)}) for name in ("left", "right")]
    lost: set[Reason] = set()
    for round_ in range(8):
        place = f"run-{round_}"
        winner, loser = race(s3_world, sources, place)
        assert loser in (Reason.TARGET_BUSY, Reason.TARGET_EXISTS, Reason.TARGET_NOT_EMPTY)
        lost.add(loser)
        manifest = s3_world.backend.get_manifest(s3_world.uri(place))
        assert manifest.artifact_uid == f"uid-{winner}"
        for file in manifest.table.files:
            assert hashlib.sha256(s3_world.get(f"{place}/{file.path}")).hexdigest() == file.sha256
        assert tree(s3_world.download(place)) == tree(sources[winner])
    assert lost


def test_a_file_that_a_stranger_writes_during_the_upload_fails_it_and_stays(s3_world: S3World, source: Path) -> None:
    def intrude() -> None:
        s3_world.put("run/stranger.txt", b"mine")

    with pytest.raises(StorageError, match="written by somebody else") as caught:
        s3_world.upload(source, cancelled=OnLook(1, intrude), force=True)
    assert caught.value.reason is Reason.TARGET_NOT_EMPTY
    assert s3_world.get("run/stranger.txt") == b"mine"
    s3_world.delete()
    assert s3_world.paths() == ["run/stranger.txt"]


def test_an_object_that_changes_before_the_commit_is_noticed(s3_world: S3World, source: Path) -> None:
    def overwrite(progress: Any) -> None:
        if progress.stage == "Verifying":
            s3_world.put("run/model.safetensors", b"WEIGHTS")

    with pytest.raises(StorageError) as caught:
        s3_world.upload(source, progress=overwrite)
    assert caught.value.reason is Reason.INTEGRITY_MISMATCH
    with pytest.raises(StorageError, match="uploading"):
        s3_world.backend.get_metadata(s3_world.uri())


# ---- Going on


def test_what_is_stored_already_is_not_sent_again(s3_world: S3World, tmp_path: Path) -> None:
    source = make(tmp_path / "source", {f"{number:02}.bin": bytes([number]) * 50 for number in range(12)})
    cancelled = threading.Event()

    def stop_after_two(_: str) -> None:
        if s3_world.calls["PutObject"] >= 2:
            cancelled.set()

    s3_world.before_body.append(stop_after_two)
    with pytest.raises(Cancelled):
        s3_world.upload(source, cancelled=cancelled)
    sent = s3_world.calls["PutObject"]
    assert 2 <= sent < 12
    s3_world.upload(source)
    assert s3_world.calls["PutObject"] == 12
    assert tree(s3_world.download()) == tree(source)


def test_a_large_file_that_is_stored_already_is_not_sent_again(s3_world: S3World, big_source: Path) -> None:
    cancelled = threading.Event()

    def completed(http_response: AWSResponse, **_: object) -> None:
        if http_response.status_code == 200:  # not the question about conditions, which is refused
            cancelled.set()

    s3_world.hooks.append(("after-call.s3.CompleteMultipartUpload", completed))
    make(big_source, {"config.json": b"{}"})  # comes in the last wave
    with pytest.raises(Cancelled):
        s3_world.upload(big_source, cancelled=cancelled)
    s3_world.hooks.pop()
    s3_world.upload(big_source)
    assert s3_world.calls["UploadPart"] == 5
    file = next(file for file in s3_world.backend.get_manifest(s3_world.uri()).table.files if file.path == "model.bin")
    assert file.parts == 5
    assert file.sha256 == hashlib.sha256((big_source / "model.bin").read_bytes()).hexdigest()


def test_an_upload_that_the_store_forgot_is_begun_again(s3_world: S3World, big_source: Path) -> None:
    aborted: list[str] = []

    def forget(_: str) -> None:
        if not aborted and s3_world.calls["UploadPart"] == 2:
            for upload in s3_world.client.list_multipart_uploads(Bucket=s3_world.bucket, Prefix=s3_world.prefix)["Uploads"]:
                aborted.append(upload["UploadId"])
                s3_world.client.abort_multipart_upload(
                    Bucket=s3_world.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    s3_world.before_body.append(forget)
    s3_world.upload(big_source)
    assert aborted
    assert tree(s3_world.download()) == tree(big_source)
    assert s3_world.uploads() == []


@pytest.mark.usefixtures("sequential")
def test_a_deletion_aborts_half_sent_files_but_not_those_of_a_nested_artifact(s3_world: S3World, big_source: Path) -> None:
    for place, uid in (("run", "uid-a"), ("run/nested", "uid-b")):
        with pytest.raises(Cancelled):
            s3_world.upload(big_source, place, uid=uid, cancelled=OnLook(2))
    assert s3_world.uploads() == ["run/model.bin", "run/nested/model.bin"]
    s3_world.delete()
    assert s3_world.uploads() == ["run/nested/model.bin"]
    s3_world.delete("run/nested", uid="uid-b")
    assert s3_world.uploads() == []
    assert s3_world.paths() == []


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("force", [True, False])
def test_the_parts_of_an_earlier_attempt_are_taken_over_and_nothing_stays(
    s3_world: S3World, big_source: Path, force: bool
) -> None:
    with pytest.raises(Cancelled):
        s3_world.upload(big_source, cancelled=OnLook(5))
    sent = s3_world.calls["UploadPart"]
    assert 0 < sent < 5
    s3_world.upload(big_source, force=force)
    assert s3_world.calls["UploadPart"] == 5
    assert tree(s3_world.download()) == tree(big_source)
    assert s3_world.uploads() == []


@pytest.mark.usefixtures("sequential")
def test_whoever_gives_up_for_good_leaves_no_parts(s3_world: S3World, big_source: Path) -> None:
    with pytest.raises(Cancelled):
        s3_world.upload(big_source, cancelled=OnLook(5), keep_parts=False)
    assert s3_world.calls["UploadPart"] > 0
    assert s3_world.uploads() == []


def test_the_storage_class_is_for_the_data_alone(s3_world: S3World, source: Path) -> None:
    s3_world.options = s3_world.options.replace(storage_class="STANDARD_IA")
    s3_world.upload(source)

    def storage_class(path: str) -> str:
        answer = s3_world.client.head_object(Bucket=s3_world.bucket, Key=s3_world.prefix + path)
        return str(answer.get("StorageClass", "STANDARD"))

    assert storage_class("run/model.safetensors") == "STANDARD_IA"
    assert storage_class(f"run/{MARKER}") == "STANDARD"


# ---- Movers that are processes


def start_mover(s3_world: S3World, source: Path, **changes: Any) -> subprocess.Popen[bytes]:
    plan = Plan(
        operation=Operation.UPLOAD,
        artifact_uid="uid-a",
        target_uri=str(s3_world.uri()),
        options=s3_world.options,
        source=Source(root=str(source.parent), path=source.name),
        lock_file=str(s3_world.work / "locks" / "uid-a"),
    ).replace(**changes)
    return subprocess.Popen(
        [sys.executable, "-m", "checkpoint_operator.mover"],
        env={**os.environ, ENV_PLAN: plan.model_dump_json(by_alias=True, exclude_none=True)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def outcome(process: subprocess.Popen[bytes]) -> tuple[int, Result | None, str]:
    out, err = process.communicate(timeout=120)
    results = [line for text in out.splitlines() if isinstance(line := parse_line(text), Result)]
    return process.returncode, results[-1] if results else None, err.decode()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the mover ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_mover_that_is_killed_in_the_middle_of_a_file_is_followed_by_one_that_completes(
    s3_world: S3World, tmp_path: Path, how: signal.Signals
) -> None:
    source = make(tmp_path / "source", {f"{number}": bytes([number]) for number in range(3)})
    with (source / "model.bin").open("wb") as model:
        for number in range(24):
            model.write(bytes([number]) * (16 * MIB))
    first = start_mover(s3_world, source)

    def a_part_is_sent() -> bool:
        model = f"{s3_world.prefix}run/model.bin"  # before it comes a probe, which has parts too
        found = s3_world.client.list_multipart_uploads(Bucket=s3_world.bucket, Prefix=model).get("Uploads", [])
        return any(
            s3_world.client.list_parts(Bucket=s3_world.bucket, Key=one["Key"], UploadId=one["UploadId"]).get("Parts")
            for one in found
        )

    wait_for(a_part_is_sent, first)
    first.send_signal(how)
    code, result, _ = outcome(first)
    assert (code, result) == (-9 if how is signal.SIGKILL else 143, None)
    state = json.loads(s3_world.get(f"run/{MARKER}"))["state"]
    assert state == "Uploading"
    assert s3_world.uploads() == ["run/model.bin"]

    code, result, log = outcome(start_mover(s3_world, source, earlier_mover_gone=True))
    assert code == ExitCode.DONE, log
    assert result is not None
    assert result.stored is not None
    assert result.stored.data_owner
    assert s3_world.uploads() == []
    restored = s3_world.download()
    assert sorted(path.name for path in restored.iterdir()) == ["0", "1", "2", "model.bin"]
    with (restored / "model.bin").open("rb") as file, (source / "model.bin").open("rb") as original:
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.file_digest(original, "sha256").digest()
    # And a third one, as after a crash before the status was written, finds it done.
    assert outcome(start_mover(s3_world, source))[:2] == (ExitCode.DONE, result)


EXITS: dict[str, tuple[ExitCode, Reason, dict[str, Any]]] = {
    "the store is down": (ExitCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE, {"endpoint": "closed"}),
    "the keys are refused": (ExitCode.CREDENTIALS, Reason.CREDENTIALS_REFUSED, {"credentials_directory": "wrong"}),
    "the bucket is missing": (ExitCode.CONFIGURATION, Reason.BUCKET_NOT_FOUND, {}),
}


@pytest.mark.parametrize(("code", "reason", "options"), EXITS.values(), ids=EXITS)
def test_a_mover_says_by_its_exit_code_what_the_store_refused(
    s3_world: S3World, object_store: lc.ObjectStore, source: Path, code: ExitCode, reason: Reason, options: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {}
    settings: TargetOptions = s3_world.options
    if "endpoint" in options:
        settings = settings.replace(endpoint=closed_port())
    elif options:
        wrong = credentials(s3_world.work / "wrong", object_store.access_key, "wrong-secret")
        settings = settings.replace(credentials_directory=wrong)
    else:
        changes["target_uri"] = "s3://no-such-bucket/run"
    ended, result, log = outcome(start_mover(s3_world, source, options=settings, **changes))
    assert result is not None
    assert result.failure is not None
    assert (ended, result.failure.reason) == (code, reason)
    assert FAILURES[reason].exit_code is code
    assert "wrong-secret" not in log + result.failure.message
    assert object_store.secret_key not in log + result.failure.message
