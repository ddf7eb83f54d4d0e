"""Movers as Jobs on a real control plane; a node's words are said by hand, the operator has just the chart's rights."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Operator
from hand_kubelet import NAME_LABEL, UID_LABEL, HandKubelet, failed, stored, until
from jobs_world import bound_claim, create, environment, message_of, prepare, reason_of

import local_cluster as lc


@pytest.fixture(scope="module")
def operator(cluster: lc.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    prepared = prepare(cluster, tmp_path_factory.mktemp("jobs"), "jobs")
    prepared.start()
    yield prepared
    assert prepared.process is not None
    assert prepared.process.poll() is None, "the operator died"
    assert prepared.stop() == 0


@pytest.fixture(scope="module")
def kubelet(operator: Operator) -> HandKubelet:
    return HandKubelet(operator)


def test_an_artifact_becomes_ready_by_what_its_mover_says_and_its_job_goes(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "happy")
    kubelet.complete("happy")
    status = operator.wait("happy", "Ready")
    assert (status["launches"], status["attempts"], status["sizeBytes"]) == (1, 1, 2048)
    assert status["mover"]["done"] is True
    until(lambda: kubelet.jobs("happy") == [], "the Job to be deleted", operator)
    assert ("Normal", "Committed") in {event[:2] for event in operator.events("happy")}


def test_the_mover_has_no_more_than_it_needs_and_belongs_to_its_artifact(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "modest")
    job = kubelet.job("modest")
    uid = operator.get("modest")["metadata"]["uid"]
    assert job["metadata"]["name"] == f"ckpt-{uid}-1"
    assert [(owner["kind"], owner["uid"], owner["controller"]) for owner in job["metadata"]["ownerReferences"]] == [
        ("CheckpointArtifact", uid, True)
    ]
    assert job["spec"]["backoffLimit"] == 0
    assert "activeDeadlineSeconds" not in job["spec"]
    assert "ttlSecondsAfterFinished" not in job["spec"]
    pod = job["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume] == ["keys"]
    kubelet.complete("modest")
    operator.wait("modest", "Ready")


def test_a_mover_that_runs_is_found_again_by_the_next_operator_and_not_started_twice(
    operator: Operator, kubelet: HandKubelet
) -> None:
    create(operator, "adopted")
    kubelet.run(kubelet.pod("adopted"))
    operator.stop(signal.SIGKILL)
    operator.start()
    kubelet.end(kubelet.pod("adopted"), 0, stored(f"s3://bucket/{operator.namespace}/adopted"))
    status = operator.wait("adopted", "Ready")
    assert (status["launches"], status["attempts"]) == (1, 1)


def test_a_mover_that_ends_while_there_is_no_operator_has_its_result_recorded(
    operator: Operator, kubelet: HandKubelet
) -> None:
    create(operator, "unwatched")
    kubelet.run(kubelet.pod("unwatched"))
    operator.stop(signal.SIGKILL)
    kubelet.end(kubelet.pod("unwatched"), 0, stored(f"s3://bucket/{operator.namespace}/unwatched"))
    operator.start()
    status = operator.wait("unwatched", "Ready")
    assert status["launches"] == 1
    until(lambda: kubelet.jobs("unwatched") == [], "the Job to be deleted", operator)


def test_a_job_that_was_recorded_and_not_deleted_before_a_crash_is_deleted_later(
    operator: Operator, kubelet: HandKubelet
) -> None:
    create(operator, "orphan", suspend=True)
    operator.wait("orphan", "Suspended")
    uid = operator.get("orphan")["metadata"]["uid"]
    operator.stop(signal.SIGKILL)
    status = {"phase": "Ready", "observedGeneration": 1, "storageURI": f"s3://bucket/{operator.namespace}/orphan"}
    operator.kubectl("patch", "ckpt", "orphan", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    operator.kubectl("create", "-f", "-", stdin=json.dumps(forged_job(operator, "orphan", uid, owner=uid)))
    operator.start()
    until(lambda: kubelet.jobs("orphan") == [], "the Job to be deleted", operator)


def forged_job(operator: Operator, artifact: str, uid: str, *, owner: str | None = None) -> dict[str, Any]:
    """A Job that somebody of the namespace made, with the name and the labels of an artifact's first mover."""
    labels = {UID_LABEL: uid, NAME_LABEL: artifact}
    reference = {"apiVersion": "checkpoints.rlhf.dev/v1alpha1", "kind": "CheckpointArtifact", "name": artifact}
    container = {"name": "mover", "image": "evil", "command": ["true"]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"ckpt-{uid}-1",
            "labels": labels,
            "ownerReferences": [{**reference, "uid": owner, "controller": True}] if owner else [],
        },
        "spec": {
            "backoffLimit": 0,
            "template": {
                "metadata": {"labels": labels},
                "spec": {"restartPolicy": "Never", "containers": [container]},
            },
        },
    }


@pytest.mark.parametrize("owned", [False, True], ids=["nobody's", "as if the artifact owned it"])
def test_a_job_that_took_the_name_first_is_not_believed_but_deleted(
    operator: Operator, kubelet: HandKubelet, owned: bool
) -> None:
    name = f"foreign-{str(owned).lower()}"
    create(operator, name, suspend=True)
    operator.wait(name, "Suspended")
    uid = operator.get(name)["metadata"]["uid"]
    operator.kubectl("create", "-f", "-", stdin=json.dumps(forged_job(operator, name, uid, owner=uid if owned else None)))
    forged = kubelet.job(name)["metadata"]["uid"]
    pod = kubelet.pod(name)
    kubelet.run(pod)
    kubelet.end(pod, 0, stored(f"s3://bucket/{operator.namespace}/{name}"))
    operator.patch(name, {"spec": {"suspend": False}})
    until(lambda: any(job["metadata"]["uid"] != forged for job in kubelet.jobs(name)), "a Job of the operator", operator)
    assert operator.status(name)["phase"] != "Ready"
    kubelet_says_ready(operator, kubelet, name)
    assert ("Warning", "ForeignJob") in {event[:2] for event in operator.events(name)}


def kubelet_says_ready(operator: Operator, kubelet: HandKubelet, name: str) -> dict[str, Any]:
    """Let the mover of the newest launch commit; the artifact's status then."""

    def is_started(status: dict[str, Any]) -> bool:
        return "mover" in status and "done" not in status["mover"]

    kubelet.complete(name, operator.until(name, is_started, "a launch")["launches"])
    return operator.wait(name, "Ready")


def test_a_pod_with_our_labels_and_a_result_that_no_job_of_ours_made_is_not_believed(
    operator: Operator, kubelet: HandKubelet
) -> None:
    create(operator, "forged")
    pod = kubelet.pod("forged")
    kubelet.run(pod)
    uid = operator.get("forged")["metadata"]["uid"]
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"ckpt-{uid}-1-zzzzz", "labels": {UID_LABEL: uid, NAME_LABEL: "forged"}},
        "spec": {"restartPolicy": "Never", "containers": [{"name": "mover", "image": "evil"}]},
    }
    operator.kubectl("create", "-f", "-", stdin=json.dumps(body))
    kubelet.end(f"ckpt-{uid}-1-zzzzz", 0, stored(f"s3://bucket/{operator.namespace}/forged", sizeBytes=1))
    # What comes after it in the watch is acted upon; what it said was not.
    operator.patch("forged", {"spec": {"suspend": True}})
    operator.wait("forged", "Suspended")
    operator.kubectl("delete", "pod", f"ckpt-{uid}-1-zzzzz", "--force", "--grace-period=0")
    operator.patch("forged", {"spec": {"suspend": False}})
    assert kubelet_says_ready(operator, kubelet, "forged")["sizeBytes"] == 2048


URI = "s3://bucket/jobs/hostile"
HOSTILE = {
    "nothing": "",
    "noise": "\x00\x1b[31m\ud7ff{{{{" * 500,
    "another-place": stored("s3://other/place"),
    "too-long": json.dumps({"type": "result", "stored": {"storageURI": "s3://" + "x" * 4000}}),
    "negative": stored(URI, sizeBytes=-1),
    "huge": stored(URI, sizeBytes=10**30),
    "deep": "[" * 4000,
    "two-outcomes": json.dumps({**json.loads(stored(URI)), "deleted": "yes"}),
    "wrong-operation": json.dumps({"type": "result", "deleted": "everything"}),
    "no-schema": '{"type": "result"}',
    "unknown-reason": failed("NoSuchReason"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_termination_message_of_anything_is_no_result(operator: Operator, kubelet: HandKubelet, what: str) -> None:
    name = f"hostile-{what}"
    uri = f"s3://bucket/{operator.namespace}/{name}"
    create(operator, name)
    pod = kubelet.pod(name)
    kubelet.end(pod, 0, HOSTILE[what].replace(URI, uri))
    status = operator.until(name, lambda status: "failure" in status, "a failure")
    assert (status["failure"]["reason"], status["launches"] >= 1) == ("PodLost", True)
    assert kubelet_says_ready(operator, kubelet, name)["storageURI"] == uri


def test_a_message_for_people_cannot_forge_lines_of_a_log(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "multi-line")
    kubelet.end(
        kubelet.pod("multi-line"), 33, failed("SourceUnreadable", "no\n2026-01-01 INFO forged\x1b[2J\u202e" + "x" * 2000)
    )
    status = operator.wait("multi-line", "Failed")
    assert status["failure"]["reason"] == "SourceUnreadable"
    assert len(status["failure"]["message"]) <= 1024
    assert "\nforged" not in operator.log.read_text()
    assert not {"\n", "\x1b", "\u202e"} & set(status["failure"]["message"])


@pytest.mark.parametrize(
    ("name", "code", "reason", "phase", "attempts"),
    [
        ("exit-21", 21, "StoreUnavailable", "Waiting", 0),
        ("exit-31", 31, "CredentialsRefused", "Failed", 1),
        ("exit-70", 70, "InternalError", "Waiting", 1),
        ("exit-10", 10, "NotReady", "Waiting", 0),
    ],
)
def test_an_exit_without_a_result_is_judged_by_its_code(
    operator: Operator, kubelet: HandKubelet, name: str, code: int, reason: str, phase: str, attempts: int
) -> None:
    create(operator, name)
    kubelet.end(kubelet.pod(name), code)
    status = operator.until(name, lambda status: "failure" in status, "a failure")
    assert (status["failure"]["reason"], status["attempts"]) == (reason, attempts)
    assert status["failure"]["retryable"] is (phase == "Waiting")


def test_a_mover_that_is_out_of_memory_says_so_counts_and_is_cured_by_more(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "greedy")
    kubelet.end(kubelet.pod("greedy"), 137, reason="OOMKilled")
    status = operator.until("greedy", lambda status: "failure" in status, "a failure")
    assert (status["failure"]["reason"], status["attempts"]) == ("OutOfMemory", 1)
    operator.patch("greedy", {"spec": {"mover": {"resources": {"limits": {"memory": "1Gi"}}}}})
    until(lambda: "1Gi" in [memory_limit(job) for job in kubelet.jobs("greedy")], "a Job with more memory", operator)
    kubelet_says_ready(operator, kubelet, "greedy")


def memory_limit(job: dict[str, Any]) -> str:
    [container] = job["spec"]["template"]["spec"]["containers"]
    return str(container["resources"]["limits"]["memory"])


def test_a_mover_that_was_evicted_goes_on_and_counts_no_attempt(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "evicted")
    pod = kubelet.pod("evicted")
    kubelet.run(pod)
    kubelet.condition(pod, "DisruptionTarget", "True", "EvictionByEvictionAPI", "Eviction API: evicting")
    kubelet.end(pod, 143)
    status = operator.until("evicted", lambda status: "failure" in status, "a failure")
    assert (status["failure"]["reason"], status["attempts"]) == ("MoverDisrupted", 0)
    kubelet.complete("evicted", 2)
    assert operator.wait("evicted", "Ready")["attempts"] == 1


def test_a_job_that_is_deleted_by_hand_is_made_again(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "by-hand")
    kubelet.run(kubelet.pod("by-hand"))
    operator.kubectl("delete", "job", kubelet.job("by-hand")["metadata"]["name"])
    kubelet.complete("by-hand", 2)
    status = operator.wait("by-hand", "Ready")
    assert (status["launches"], status["attempts"]) == (2, 2)
    assert ("Warning", "PodLost") in {event[:2] for event in operator.events("by-hand")}


def test_a_quota_for_pods_is_waited_for(operator: Operator, kubelet: HandKubelet) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none"},
        "spec": {"hard": {"requests.memory": "1Mi"}},
    }
    operator.kubectl("create", "-f", "-", stdin=json.dumps(quota))
    try:
        create(operator, "no-quota")
        status = operator.wait("no-quota", "Waiting")
        assert reason_of(status) == "PodRefused"
        assert "ResourceQuota" in message_of(status)
        assert status["attempts"] == 0
    finally:
        operator.kubectl("delete", "resourcequota", "none")
    operator.patch("no-quota", {"metadata": {"annotations": {"checkpoints.rlhf.dev/retry": "now"}}})
    kubelet_says_ready(operator, kubelet, "no-quota")


def test_a_quota_for_jobs_is_waited_for(operator: Operator, kubelet: HandKubelet) -> None:
    hard = {"count/jobs.batch": "0"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "no-jobs"}, "spec": {"hard": hard}}
    operator.kubectl("create", "-f", "-", stdin=json.dumps(quota))
    operator.kubectl("wait", "--for=jsonpath={.status.hard}", "resourcequota/no-jobs", "--timeout=20s")
    try:
        create(operator, "no-jobs")
        status = operator.until("no-jobs", lambda status: "failure" in status, "a failure")
        assert (status["failure"]["reason"], status["attempts"]) == ("QuotaExceeded", 0)
    finally:
        operator.kubectl("delete", "resourcequota", "no-jobs")
    kubelet_says_ready(operator, kubelet, "no-jobs")


def test_a_claim_that_is_not_there_is_waited_for_and_no_launch_is_counted(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "early", source={"persistentVolumeClaim": {"claimName": "later"}})
    status = operator.wait("early", "Waiting")
    assert (reason_of(status), status["launches"]) == ("ClaimNotFound", 0)
    assert "later" in message_of(status)
    bound_claim(operator, "later")
    kubelet.complete("early")
    assert operator.wait("early", "Ready")["launches"] == 1


def test_a_claim_that_one_pod_alone_may_have_is_waited_for_with_the_name_of_who_has_it(
    operator: Operator, kubelet: HandKubelet
) -> None:
    bound_claim(operator, "single", "ReadWriteOncePod")
    volume = {"name": "v", "persistentVolumeClaim": {"claimName": "single"}}
    container = {"name": "train", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "trainer"},
        "spec": {"restartPolicy": "Never", "containers": [container], "volumes": [volume]},
    }
    operator.kubectl("create", "-f", "-", stdin=json.dumps(body))
    create(operator, "rwop", source={"persistentVolumeClaim": {"claimName": "single"}})
    status = operator.wait("rwop", "Waiting")
    assert (reason_of(status), status["launches"]) == ("ClaimInUse", 0)
    assert "trainer" in message_of(status)
    operator.kubectl("delete", "pod", "trainer", "--force", "--grace-period=0")
    kubelet.complete("rwop")
    operator.wait("rwop", "Ready")


def test_a_mover_that_no_node_takes_says_so_and_runs_when_one_does(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "nowhere")
    pod = kubelet.pod("nowhere")
    kubelet.condition(pod, "PodScheduled", "False", "Unschedulable", "0/3 nodes are available: 3 Insufficient cpu.")
    status = operator.wait("nowhere", "Waiting")
    assert reason_of(status) == "Unschedulable"
    assert "3 Insufficient cpu" in message_of(status)
    assert status["launches"] == 1
    kubelet.condition(pod, "PodScheduled", "True", "", "")
    kubelet.run(pod)
    operator.wait("nowhere", "Uploading")
    kubelet_says_ready(operator, kubelet, "nowhere")


def test_an_image_that_cannot_be_pulled_is_named(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "no-image")
    pod = kubelet.pod("no-image")
    kubelet.wait(pod, "ImagePullBackOff", "Back-off pulling image checkpoint-operator:dev")
    status = operator.wait("no-image", "Waiting")
    assert reason_of(status) == "ImagePullFailed"
    assert "checkpoint-operator:dev" in message_of(status)
    kubelet_says_ready(operator, kubelet, "no-image")


def test_a_retry_that_is_asked_for_does_not_wait_for_the_backoff(cluster: lc.Cluster, tmp_path: Path) -> None:
    operator = prepare(cluster, tmp_path, "jobs-retry")
    operator.flags = tuple(flag for flag in operator.flags if not flag.startswith("--backoff"))
    operator.start("--backoff-seconds=3600", "--backoff-max-seconds=3600")
    kubelet = HandKubelet(operator)
    try:
        create(operator, "outage")
        kubelet.end(kubelet.pod("outage"), 21, failed("StoreUnavailable"))
        status = operator.wait("outage", "Waiting")
        assert "nextRetryTime" in status
        operator.kubectl("annotate", "ckpt", "outage", "checkpoints.rlhf.dev/retry=now")
        kubelet.complete("outage", 2)
        status = operator.wait("outage", "Ready")
        assert status["retryHandled"] == "now"
    finally:
        operator.stop()


def test_a_mover_is_stopped_when_its_artifact_is_suspended_and_the_next_goes_on(
    operator: Operator, kubelet: HandKubelet
) -> None:
    create(operator, "paused")
    kubelet.run(kubelet.pod("paused"))
    operator.patch("paused", {"spec": {"suspend": True}})
    status = operator.wait("paused", "Suspended")
    assert status["attempts"] == 0
    assert kubelet.jobs("paused") == []
    operator.patch("paused", {"spec": {"suspend": False}})
    kubelet.complete("paused", 2)
    assert operator.wait("paused", "Ready")["attempts"] == 1


def test_an_artifact_that_is_deleted_while_it_uploads_is_cleaned_up_by_another_mover(
    operator: Operator, kubelet: HandKubelet
) -> None:
    create(operator, "dropped")
    kubelet.run(kubelet.pod("dropped"))
    operator.kubectl("delete", "ckpt", "dropped", "--wait=false")
    pod = kubelet.pod("dropped", 2)
    plan = json.loads(environment(kubelet.job("dropped", 2))["CHECKPOINT_PLAN"])
    assert (plan["operation"], plan["earlierMoverGone"]) == ("Delete", True)
    kubelet.run(pod)
    kubelet.end(pod, 0, json.dumps({"type": "result", "deleted": "nothing is left there"}))
    operator.wait_gone("dropped")
    until(lambda: kubelet.jobs("dropped") == [], "the Jobs to go", operator)


def test_a_foreground_deletion_does_not_take_the_mover_that_cleans_up(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "foreground", deletionPolicy="Delete")
    kubelet.complete("foreground")
    operator.wait("foreground", "Ready")
    operator.kubectl("delete", "ckpt", "foreground", "--cascade=foreground", "--wait=false")
    pod = kubelet.pod("foreground", 2)
    kubelet.run(pod)
    kubelet.end(pod, 0, json.dumps({"type": "result", "deleted": "2 objects"}))
    operator.wait_gone("foreground")
    assert ("Normal", "Cleaned") in {event[:2] for event in operator.events("foreground")}


def test_the_operator_made_no_request_that_its_rights_refuse(operator: Operator) -> None:
    log = operator.log.read_text()
    assert "cannot" not in [line for line in log.splitlines() if "HTTP 403" in line]
    assert "Traceback" not in log
