"""What is made of a mover's Job and pods: each a sentence; and nothing that a pod says is believed unchecked."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from checkpoint_operator.api import names
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Operation, Progress, encode_line
from checkpoint_operator.controller.executor import (
    EarlierMover,
    FinishedMover,
    MoverState,
    NoMover,
    PendingMover,
    RunningMover,
    StopReason,
)
from checkpoint_operator.controller.jobs.observe import (
    JobView,
    Node,
    PodView,
    Told,
    observe,
    read_job,
    read_pod,
)
from checkpoint_operator.controller.jobs.words import read_progress, read_result

NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)
UID, JOB = "artifact-uid", "job-uid"
URI = "s3://bucket/c"
DIGEST = "sha256:" + "1" * 64


def wire(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def job(*, gone: bool = False, **changes: Any) -> JobView:
    body: dict[str, Any] = {
        "metadata": {
            "namespace": "ns",
            "name": "ckpt-1",
            "uid": JOB,
            "resourceVersion": "7",
            "creationTimestamp": wire(NOW),
            "labels": {names.LABEL_ARTIFACT_UID: UID, names.LABEL_ARTIFACT_NAME: "c"},
            "ownerReferences": [owner(names.API_VERSION, names.KIND, UID)],
            **changes.pop("metadata", {}),
        },
        "spec": changes.pop("spec", {}),
        "status": changes.pop("status", {}),
    }
    return read_job(body, gone=gone)


def owner(version: str, kind: str, uid: str) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "name": "n", "uid": uid, "controller": True}


def pod(*, gone: bool = False, by: str | None = JOB, uid: str = "pod-uid", **changes: Any) -> PodView:
    state = changes.pop("state", None)
    body: dict[str, Any] = {
        "metadata": {
            "namespace": "ns",
            "name": "ckpt-1-abcde",
            "uid": uid,
            "resourceVersion": "8",
            "creationTimestamp": wire(NOW),
            "labels": {names.LABEL_ARTIFACT_UID: UID, names.LABEL_ARTIFACT_NAME: "c"},
            "ownerReferences": [owner("batch/v1", "Job", by)] if by else [],
            **changes.pop("metadata", {}),
        },
        "spec": {"nodeName": "node-1", **changes.pop("spec", {})},
        "status": {
            "phase": "Running",
            **({"containerStatuses": [{"name": "mover", "state": state}]} if state else {}),
            **changes.pop("status", {}),
        },
    }
    return read_pod(body, gone=gone)


RUNNING = {"running": {"startedAt": wire(NOW)}}


def ended(code: int, message: str = "", reason: str = "Error", **more: Any) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "message": message, "reason": reason, "startedAt": wire(NOW), **more}}


def stored(**changes: Any) -> str:
    said = {
        "storageURI": URI,
        "sizeBytes": 1,
        "fileCount": 1,
        "manifestDigest": DIGEST,
        "contentDigest": DIGEST,
        "dataOwner": True,
        **changes,
    }
    return json.dumps({"type": "result", "stored": said})


def state(
    found: JobView | None, *pods: PodView, told: Told | None = None, nodes: dict[str, Node] | None = None
) -> MoverState:
    return observe(found, pods, told or Told(), Operation.UPLOAD, URI, nodes or {})


DELETED = {"metadata": {"deletionTimestamp": wire(NOW + timedelta(seconds=30))}}
DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True", "message": "drained"}]}


def job_with(type_: str, reason: str = "", message: str = "") -> JobView:
    return job(status={"conditions": [{"type": type_, "status": "True", "reason": reason, "message": message}]})


# What is there, and the state that it is: its class and facts about it.
CASES: dict[str, tuple[MoverState, type[Any], dict[str, Any]]] = {
    "nothing is nobody": (state(None), NoMover, {"unseen": None}),
    "a pod that no Job made is nobody, whatever it says": (state(None, pod(by=None, state=RUNNING)), NoMover, {}),
    "a pod of an earlier Job that runs is an earlier mover": (state(None, pod(state=RUNNING)), EarlierMover, {}),
    "a pod of an earlier Job that has ended is nobody": (state(None, pod(state=ended(0))), NoMover, {"unseen": None}),
    "a pod of an earlier Job on a node that is silent may run unseen": (
        state(None, pod(state=RUNNING), nodes={"pod-uid": Node.SILENT}),
        NoMover,
        {"unseen": "pod ckpt-1-abcde on node 'node-1', which does not answer"},
    ),
    "a pod of an earlier Job on a node that is gone runs no more": (
        state(None, pod(state=RUNNING), nodes={"pod-uid": Node.GONE}),
        NoMover,
        {"unseen": None},
    ),
    "a Job that nobody has looked at yet takes a moment": (state(job()), PendingMover, {"reason": None, "since": NOW}),
    "a Job without a pod could not make one": (
        state(job(status={"startTime": wire(NOW)})),
        PendingMover,
        {"reason": Reason.POD_REFUSED, "since": NOW},
    ),
    "a Job that is suspended waits for whoever suspended it": (
        state(job(spec={"suspend": True})),
        PendingMover,
        {"reason": Reason.MOVER_NOT_STARTED, "patient": True},
    ),
    "a pod that is being made takes a moment": (
        state(job(), pod(state={"waiting": {"reason": "ContainerCreating"}}, status={"phase": "Pending"})),
        PendingMover,
        {"reason": None},
    ),
    "a pod that no node takes has the scheduler's words": (
        state(
            job(spec={"template": {"spec": {"affinity": {"nodeAffinity": {}}}}}),
            pod(
                status={
                    "phase": "Pending",
                    "conditions": [
                        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes\nfit"}
                    ],
                }
            ),
        ),
        PendingMover,
        {"reason": Reason.UNSCHEDULABLE, "message": "no node takes pod ckpt-1-abcde: 0/3 nodes fit"},
    ),
    "an image that cannot be pulled is named": (
        state(job(), pod(state={"waiting": {"reason": "ErrImagePull", "message": "no such image"}})),
        PendingMover,
        {"reason": Reason.IMAGE_PULL_FAILED},
    ),
    "a container that the kubelet cannot make has its words": (
        state(job(), pod(state={"waiting": {"reason": "CreateContainerConfigError", "message": "runAsNonRoot"}})),
        PendingMover,
        {"reason": Reason.MOVER_NOT_STARTED},
    ),
    "a container that runs is a mover that runs": (
        state(job(), pod(state=RUNNING)),
        RunningMover,
        {"moved_at": None, "stopping": None, "uid": JOB},
    ),
    "a mover that moved before we began to look has until now": (
        state(job(), pod(state=RUNNING), told=Told(moved_at=NOW - timedelta(hours=1))),
        RunningMover,
        {"moved_at": NOW},
    ),
    "a mover that we stop is stopping": (
        state(job(), pod(state=RUNNING), told=Told(stopping=StopReason.SUSPENDED)),
        RunningMover,
        {"stopping": StopReason.SUSPENDED},
    ),
    "a mover whose Job somebody deletes is stopping": (
        state(job(metadata=DELETED["metadata"]), pod(state=RUNNING)),
        RunningMover,
        {"stopping": StopReason.SHUTDOWN},
    ),
    "a result is a result": (
        state(job(), pod(state=ended(0, stored()))),
        FinishedMover,
        {"exit_code": 0, "stopped": None, "failure": None, "result.stored.storage_uri": URI},
    ),
    "a result stays one although somebody deletes the Job and its pod": (
        state(job(gone=True), pod(state=ended(0, stored()), gone=True)),
        FinishedMover,
        {"result.stored.storage_uri": URI},
    ),
    "a result is believed although the mover was to stop": (
        state(job(), pod(state=ended(0, stored())), told=Told(stopping=StopReason.SUSPENDED)),
        FinishedMover,
        {"result.stored.storage_uri": URI, "stopped": StopReason.SUSPENDED},
    ),
    "a success without the exit code of one is none": (
        state(job(), pod(state=ended(137, stored()))),
        FinishedMover,
        {"result": None, "exit_code": 137},
    ),
    "a result of a pod of another Job is not about this one": (
        state(job(), pod(by="other", state=ended(0, stored()))),
        PendingMover,
        {},
    ),
    "an end without a result that can be understood says so": (
        state(job(), pod(state=ended(0, "noise"))),
        FinishedMover,
        {"failure.reason": Reason.POD_LOST},
    ),
    "an end without a result is judged by its code": (
        state(job(), pod(state=ended(21))),
        FinishedMover,
        {"exit_code": 21, "failure": None},
    ),
    "out of memory is out of memory": (
        state(job(), pod(state=ended(137, reason="OOMKilled"))),
        FinishedMover,
        {"failure.reason": Reason.OUT_OF_MEMORY},
    ),
    "a pod that was drained was disrupted": (
        state(job(), pod(state=ended(143), status=DISRUPTED)),
        FinishedMover,
        {"failure.reason": Reason.MOVER_DISRUPTED},
    ),
    "a pod that the kubelet evicted was disrupted, although its container is unknown": (
        state(job(), pod(status={"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory"})),
        FinishedMover,
        {"failure.reason": Reason.MOVER_DISRUPTED},
    ),
    "a mover that told its failure before it was drained has told it": (
        state(
            job(),
            pod(
                state=ended(31, '{"type":"result","failure":{"reason":"CredentialsRefused","message":"no"}}'),
                status=DISRUPTED,
            ),
        ),
        FinishedMover,
        {"result.failure.reason": Reason.CREDENTIALS_REFUSED, "failure": None},
    ),
    "a pod that somebody deleted is lost": (
        state(job(), pod(state=ended(143), gone=True, metadata=DELETED["metadata"])),
        FinishedMover,
        {"failure.reason": Reason.POD_LOST},
    ),
    "a stopped mover has stopped, however it ended": (
        state(job(), pod(state=ended(137, reason="OOMKilled")), told=Told(stopping=StopReason.DELETED)),
        FinishedMover,
        {"stopped": StopReason.DELETED, "failure": None, "ran": True},
    ),
    "a mover that was stopped before its container was made never ran": (
        state(
            job(),
            pod(state={"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown"}}, gone=True),
            told=Told(stopping=StopReason.REPLANNED, was_pending=True),
        ),
        FinishedMover,
        {"stopped": StopReason.REPLANNED, "ran": False},
    ),
    "a Job that was stopped without a pod never ran": (
        state(job(gone=True), told=Told(stopping=StopReason.REPLANNED)),
        FinishedMover,
        {"stopped": StopReason.REPLANNED, "ran": False},
    ),
    "a Job that is gone, with what its pod said, is lost": (
        state(job(gone=True)),
        FinishedMover,
        {"failure.reason": Reason.POD_LOST},
    ),
    "a node that went silent under a mover disrupted it": (
        state(job(), pod(state=RUNNING, metadata=DELETED["metadata"]), nodes={"pod-uid": Node.SILENT}),
        FinishedMover,
        {"failure.reason": Reason.MOVER_DISRUPTED},
    ),
    "a mover that was to stop on a node that went silent has stopped for us": (
        state(job(), pod(state=RUNNING), told=Told(stopping=StopReason.SUSPENDED), nodes={"pod-uid": Node.SILENT}),
        FinishedMover,
        {"stopped": StopReason.SUSPENDED},
    ),
    "a Job that outlived its pod says the exit code": (
        state(job_with("Failed", "PodFailurePolicy", "Container mover for pod ns/p failed with exit code 31 matching rule")),
        FinishedMover,
        {"exit_code": 31, "failure": None},
    ),
    "a Job that outlived its disrupted pod says so": (
        state(job_with("Failed", "PodFailurePolicy", "Pod ns/p has condition DisruptionTarget matching FailJob rule")),
        FinishedMover,
        {"failure.reason": Reason.MOVER_DISRUPTED},
    ),
    "a Job that is complete without a pod has lost its result": (
        state(job_with("Complete")),
        FinishedMover,
        {"failure.reason": Reason.POD_LOST},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_observe(name: str) -> None:
    found, expected, facts = CASES[name]
    assert isinstance(found, expected), found
    for path, value in facts.items():
        have: Any = found
        for part in path.split("."):
            have = getattr(have, part)
        assert have == value, path


BAD_RESULTS = {
    "nothing": "",
    "no JSON": "{",
    "deep JSON": "[" * 100_000,
    "another type": encode_line(Progress()),
    "nothing said": '{"type":"result"}',
    "two things said": json.dumps({**json.loads(stored()), "deleted": "x"}),
    "another place": stored(storageURI="s3://other/c"),
    "a place that only begins alike": stored(storageURI=URI + "-2"),
    "a place with control characters": stored(storageURI=URI + "/\x1b[2J"),
    "a place that no status holds": stored(storageURI=URI + "/" + "x" * 1300),
    "less than nothing": stored(sizeBytes=-1),
    "more than there is": stored(fileCount=10**20),
    "a digest that no status holds": stored(manifestDigest="x" * 200),
    "a digest of other characters": stored(contentDigest="sha256:\u202e"),
    "too long": stored(extra="x" * 5000),
    "the end of another operation": '{"type":"result","deleted":"everything"}',
}


@pytest.mark.parametrize("text", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_what_is_no_result_of_this_upload_is_not_taken_for_one(text: str) -> None:
    assert read_result(text, Operation.UPLOAD, URI) is None


def test_a_result_is_found_at_the_end_of_a_log_that_the_kubelet_took_instead() -> None:
    found = read_result(f"some noise\n{stored()}\n", Operation.UPLOAD, URI + "/")
    assert found is not None
    assert found.stored is not None


def test_a_unique_place_below_the_target_is_a_place_of_the_target() -> None:
    assert read_result(stored(storageURI=f"{URI}/uid-0123"), Operation.UPLOAD, URI) is not None


def test_a_message_becomes_one_line_that_a_status_holds() -> None:
    text = json.dumps({"type": "result", "failure": {"reason": "InternalError", "message": "a\nb\x00\u2028c" + "x" * 2000}})
    found = read_result(text, Operation.UPLOAD, URI)
    assert found is not None
    assert found.failure is not None
    assert found.failure.message.startswith("a b c")
    assert len(found.failure.message) <= 1024


def test_progress_is_the_last_line_that_is_one() -> None:
    lines = [encode_line(Progress(bytes_done=done, bytes_total=9)) for done in (1, 2)]
    lying = [encode_line(Progress(bytes_done=done)) for done in (-1, 2**60)]
    found = read_progress("\n".join(["noise", *lines, *lying, '{"type":"prog']).encode())
    assert found is not None
    assert found.bytes_done == 2
    assert read_progress(b"\xff\xfe\x00") is None


def test_an_object_that_somebody_else_wrote_is_read_without_an_error() -> None:
    bare = {"namespace": "ns", "name": "n", "uid": "u", "resourceVersion": "1", "creationTimestamp": wire(NOW)}
    assert read_job({"metadata": bare}).owner_uid is None
    assert read_pod({"metadata": bare}).job_uid is None
    other = {**bare, "ownerReferences": [owner("evil/v1", "Job", "x"), owner("batch/v1", "CronJob", "y")]}
    assert read_pod({"metadata": other}).job_uid is None


def test_of_two_pods_of_one_job_the_one_that_runs_decides() -> None:
    done, other = pod(state=ended(0, stored())), pod(state=RUNNING, uid="second")
    assert isinstance(state(job(), done, replace(other, created=NOW - timedelta(hours=1))), RunningMover)
