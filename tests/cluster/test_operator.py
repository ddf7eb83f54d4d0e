"""The main job on a real control plane: a folder on a volume becomes a checkpoint in a store, or says why not."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import BUCKET, SAMPLE, Operator


@pytest.fixture(scope="module")
def operator(make_operator: Callable[[str], Operator]) -> Iterator[Operator]:
    started = make_operator("main-job")
    started.start()
    yield started
    assert started.process is not None
    assert started.process.poll() is None, "the operator died"
    assert started.stop() == 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_of_a_real_training_becomes_ready_and_is_in_the_bucket_byte_for_byte(operator: Operator) -> None:
    operator.save("checkpoint-2")
    operator.create("dpo-llama-2", path="checkpoint-2", training={"jobName": "dpo-llama", "step": 2, "finalLoss": "0.69"})
    status = operator.wait("dpo-llama-2", "Ready")
    stored = operator.objects("main-job/dpo-llama-2")
    manifest = json.loads(stored.pop(".metadata.json"))
    assert stored == files_of(SAMPLE)
    assert manifest["artifactUID"] == operator.get("dpo-llama-2")["metadata"]["uid"]
    assert status["storageURI"] == f"s3://{BUCKET}/main-job/dpo-llama-2"
    assert status["contentDigest"] == manifest["contentDigest"]
    assert status["sizeBytes"] == sum(len(content) for content in stored.values())
    assert status["dataOwner"] is True
    assert status["observedGeneration"] == 1
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "SourceReady": "True",
        "Uploaded": "True",
        "Verified": "True",
        "Ready": "True",
        "Stalled": "False",
    }
    assert ("Normal", "Committed", f"stored 60Ki at s3://{BUCKET}/main-job/dpo-llama-2") in operator.events("dpo-llama-2")


def test_the_table_that_kubectl_prints_is_the_one_of_the_readme(operator: Operator) -> None:
    operator.wait("dpo-llama-2", "Ready")
    header, row = operator.kubectl("get", "checkpointartifacts", "dpo-llama-2").stdout.splitlines()
    assert header.split() == ["NAME", "TYPE", "PHASE", "PROGRESS", "SIZE", "JOB", "STEP", "LOSS", "AGE"]
    assert row.split()[:-1] == ["dpo-llama-2", "checkpoint", "Ready", "100%", "60Ki", "dpo-llama", "2", "0.69"]
    wide = operator.kubectl("get", "ckpt", "dpo-llama-2", "-o", "wide").stdout.splitlines()[0].split()
    assert wide[-4:] == ["ALGORITHM", "BASE", "URI", "AGE"] or {"ALGORITHM", "BASE", "URI"} <= set(wide)


def test_kubectl_wait_works_on_the_ready_condition(operator: Operator) -> None:
    operator.save("waited")
    operator.create("waited")
    operator.kubectl("wait", "--for=condition=Ready", "ckpt/waited", "--timeout=30s")


def test_tags_and_metrics_may_change_afterwards_and_the_generation_is_noted(operator: Operator) -> None:
    operator.save("tagged")
    operator.create("tagged")
    before = operator.wait("tagged", "Ready")
    operator.patch("tagged", {"spec": {"tags": {"best": "yes"}, "metrics": [{"name": "eval_loss", "value": "0.42"}]}})
    after = operator.until("tagged", lambda status: status["observedGeneration"] == 2, "the generation to be noted")
    assert after["phase"] == "Ready"
    assert after["completionTime"] == before["completionTime"]


def test_include_exclude_and_layout_unique_store_just_that_in_a_place_of_its_own(operator: Operator) -> None:
    operator.save("chosen")
    operator.create(
        "chosen",
        source={"include": ["*.safetensors", "*.json"], "exclude": ["tokenizer*"]},
        target={"layout": "Unique"},
    )
    status = operator.wait("chosen", "Ready")
    uid = operator.get("chosen")["metadata"]["uid"]
    assert re.fullmatch(rf"s3://{BUCKET}/main-job/chosen/{uid}-[0-9a-f]{{16}}", status["storageURI"])
    stored = operator.objects(status["storageURI"].removeprefix(f"s3://{BUCKET}/"))
    assert set(stored) == {".metadata.json", "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"}


def test_a_file_target_lands_in_the_other_claim(operator: Operator) -> None:
    operator.save("archived")
    operator.create("archived", uri="file:///runs/archived", target={"persistentVolumeClaim": {"claimName": "archive"}})
    status = operator.wait("archived", "Ready")
    assert status["storageURI"] == "file:///runs/archived"
    stored = files_of(operator.archive / "runs" / "archived")
    del stored[".metadata.json"]
    assert stored == files_of(SAMPLE)


def test_the_same_content_is_shared_and_stays_while_somebody_names_it(operator: Operator) -> None:
    operator.save("shared")
    uri = f"s3://{BUCKET}/main-job/shared"
    operator.create("owner", path="shared", uri=uri, deletionPolicy="Delete")
    operator.wait("owner", "Ready")
    operator.create("sharer", path="shared", uri=uri, deletionPolicy="Delete")
    assert operator.wait("sharer", "Ready")["dataOwner"] is False
    operator.kubectl("delete", "ckpt", "owner", "--wait=false")
    operator.wait_gone("owner")
    operator.kubectl("delete", "ckpt", "sharer", "--wait=false")
    operator.wait_gone("sharer")
    assert len(operator.objects("main-job/shared")) == 12
    assert ("Normal", "DataKept", f"{uri} was kept: sharer names it too") in operator.events("owner")


def test_another_checkpoint_at_the_same_place_is_refused_and_the_first_stays(operator: Operator) -> None:
    operator.save("first")
    operator.save("second", {"config.json": b"{}"})
    uri = f"s3://{BUCKET}/main-job/first"
    operator.create("first", uri=uri)
    operator.wait("first", "Ready")
    before = operator.objects("main-job/first")
    operator.create("second", uri=uri)
    status = operator.wait("second", "Failed")
    assert status["failure"]["reason"] == "TargetExists"
    assert status["failure"]["code"] == "RLHF055"
    assert operator.get("first")["metadata"]["uid"] in status["failure"]["message"]
    assert operator.objects("main-job/first") == before


def test_somebody_elses_objects_are_not_touched(operator: Operator) -> None:
    client = operator.store.client()
    client.put_object(Bucket=BUCKET, Key="main-job/taken/their.txt", Body=b"theirs")
    operator.save("taken")
    operator.create("taken", deletionPolicy="Delete")
    assert operator.wait("taken", "Failed")["failure"]["reason"] == "TargetNotEmpty"
    operator.kubectl("delete", "ckpt", "taken", "--wait=false")
    operator.wait_gone("taken")
    assert operator.objects("main-job/taken") == {"their.txt": b"theirs"}


@pytest.mark.parametrize(
    ("name", "spec", "reason", "code", "says"),
    [
        ("no-source", {"path": "missing"}, "SourceNotFound", "RLHF057", "source.path 'missing' does not exist"),
        (
            "no-files",
            {"source": {"include": ["*.nothing"]}},
            "SourceEmpty",
            "RLHF057",
            "source.include and source.exclude",
        ),
        ("wrong-secret", {"sub": "wrong-secret"}, "CredentialsRefused", "RLHF058", "SignatureDoesNotMatch"),
        ("read-only", {"sub": "read-only"}, "CredentialsRefused", "RLHF058", "AccessDenied"),
        ("no-bucket", {"uri": "s3://no-such-bucket/main-job/x"}, "BucketNotFound", "RLHF054", "no-such-bucket"),
        ("elsewhere", {"uri": "s3://checkpoints/other-team/x"}, "TargetNotAllowed", "RLHF050", "s3://checkpoints/main-job"),
        (
            "own-endpoint",
            {"target": {"endpoint": "http://127.0.0.1:1"}},
            "TargetNotAllowed",
            "RLHF050",
            "spec.target.endpoint 'http://127.0.0.1:1'",
        ),
        (
            "own-secret",
            {"target": {"credentialsSecretRef": {"name": "mine"}}},
            "CredentialsSecretNotSupported",
            "RLHF050",
            "remove it",
        ),
        (
            "other-claim",
            {"source": {"persistentVolumeClaim": {"claimName": "theirs"}}},
            "ClaimNotServed",
            "RLHF050",
            "spec.source.persistentVolumeClaim.claimName 'theirs'",
        ),
    ],
)
def test_what_cannot_work_fails_at_once_with_a_reason_and_can_be_deleted(
    operator: Operator, name: str, spec: dict[str, object], reason: str, code: str, says: str
) -> None:
    operator.save(f"bad-{name}")
    arguments = dict(spec)
    if "sub" in arguments:
        arguments["uri"] = f"s3://{BUCKET}/main-job/{arguments.pop('sub')}/{name}"
    operator.create(name, **{"path": f"bad-{name}", **arguments})  # type: ignore[arg-type]
    status = operator.wait(name, "Failed")
    assert (status["failure"]["reason"], status["failure"]["code"]) == (reason, code)
    assert says in status["failure"]["message"]
    assert {c["type"]: c["status"] for c in status["conditions"]}["Stalled"] == "True"
    assert ("Warning", reason) in {event[:2] for event in operator.events(name)}
    operator.kubectl("delete", "ckpt", name, "--wait=false")
    if name == "wrong-secret":
        # Nothing was written, so there is nothing to clean up: wrong keys do not hold the object back.
        operator.wait_gone(name, seconds=10)
    else:
        operator.wait_gone(name)


def test_a_failed_artifact_is_tried_again_when_the_annotation_asks(operator: Operator) -> None:
    operator.create("late")
    assert operator.wait("late", "Failed")["failure"]["reason"] == "SourceNotFound"
    operator.save("late")
    operator.kubectl("annotate", "ckpt", "late", "checkpoints.rlhf.dev/retry=now")
    status = operator.wait("late", "Ready")
    assert "failure" not in status
    assert status["retryHandled"] == "now"


def test_a_source_that_is_being_written_is_never_committed_and_becomes_ready_when_it_rests(operator: Operator) -> None:
    folder = operator.save("busy", {"weights.bin": os.urandom(1 << 20)})
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            with (folder / "weights.bin").open("ab") as file:
                file.write(b"x")

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        operator.create("busy")
        status = operator.until("busy", lambda status: "failure" in status, "a failure")
    finally:
        stop.set()
        writer.join()
    assert status["failure"]["reason"] == "SourceChanged"
    assert status["phase"] in ("Waiting", "Failed", "Uploading")
    if operator.wait("busy", "Ready", "Failed")["phase"] == "Failed":
        operator.kubectl("annotate", "ckpt", "busy", "checkpoints.rlhf.dev/retry=1")
    operator.wait("busy", "Ready")
    assert operator.objects("main-job/busy")["weights.bin"] == (folder / "weights.bin").read_bytes()


def test_a_symlink_to_a_file_of_the_operator_is_refused(operator: Operator) -> None:
    folder = operator.save("linked", {"a.txt": b"a"})
    (folder / "stolen").symlink_to(operator.folder / "keys" / "admin" / "AWS_SECRET_ACCESS_KEY")
    operator.create("linked")
    status = operator.wait("linked", "Failed")
    assert status["failure"]["reason"] == "SourceUnsupported"
    assert "'stolen' points out of the folder" in status["failure"]["message"]
    (operator.volume / "door").symlink_to(operator.folder / "keys")
    operator.create("through-the-door", path="door/admin")
    assert operator.wait("through-the-door", "Failed")["failure"]["reason"] == "SourceUnsupported"


def test_delete_removes_what_was_stored_and_retain_keeps_it(operator: Operator) -> None:
    operator.save("going")
    operator.save("staying")
    operator.create("going", deletionPolicy="Delete")
    operator.create("staying")
    operator.wait("going", "Ready")
    operator.wait("staying", "Ready")
    operator.kubectl("delete", "ckpt", "going", "staying", "--wait=false")
    operator.wait_gone("going")
    operator.wait_gone("staying")
    assert operator.objects("main-job/going") == {}
    assert len(operator.objects("main-job/staying")) == 12
    assert ("Normal", "Cleaned") in {event[:2] for event in operator.events("going")}


def test_no_secret_is_in_a_status_an_event_or_the_log(operator: Operator) -> None:
    everything = operator.kubectl("get", "ckpt,events", "-o", "yaml").stdout + operator.log.read_text()
    assert operator.store.secret_key not in everything
    assert "not-the-secret" not in everything


def test_the_operator_made_no_request_that_its_rights_refuse(operator: Operator) -> None:
    assert "is forbidden" not in operator.log.read_text()
    assert "Traceback" not in operator.log.read_text()
