"""Every branch of the plan, each as a sentence: what is there, and the one thing that is done about it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact, parse_artifact
from checkpoint_operator.api.conditions import ConditionType, find_condition
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation, Progress, Result, Stage, Stored
from checkpoint_operator.controller.decisions import (
    LOOK_AGAIN,
    AddFinalizer,
    Decision,
    Observed,
    Policy,
    Prepare,
    Record,
    ReleaseDependents,
    RemoveFinalizer,
    Start,
    Stop,
    Wait,
    backoff,
)
from checkpoint_operator.controller.executor import (
    EarlierMover,
    FinishedMover,
    Held,
    MoverState,
    NoMover,
    PendingMover,
    Preparation,
    Prepared,
    RunningMover,
    StopReason,
)
from checkpoint_operator.controller.plan import plan

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
POLICY = Policy(max_attempts=3, backoff=10, backoff_max=600, progress_every=5, no_progress=900)
UID = "11111111-2222-3333-4444-555555555555"
STORED = Stored(
    storage_uri="s3://bucket/c",
    size_bytes=2048,
    file_count=2,
    manifest_digest="sha256:m",
    content_digest="sha256:c",
    data_owner=True,
)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def wire(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def artifact(
    status: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
    *,
    finalizer: bool = True,
    deleted: bool = False,
    generation: int = 1,
    annotations: dict[str, str] | None = None,
) -> CheckpointArtifact:
    return parse_artifact(
        {
            "metadata": {
                "name": "c",
                "namespace": "ns",
                "uid": UID,
                "resourceVersion": "1",
                "generation": generation,
                "creationTimestamp": wire(ago(3600)),
                "finalizers": [names.FINALIZER] if finalizer else [],
                "annotations": annotations or {},
                **({"deletionTimestamp": wire(ago(1))} if deleted else {}),
            },
            "spec": {
                "source": {"persistentVolumeClaim": {"claimName": "v"}, "path": "c"},
                "target": {"uri": "s3://bucket/c"},
                **(spec or {}),
            },
            "status": {"observedGeneration": 1, **(status or {})},
        }
    )


def launched(phase: str = "Uploading", operation: str = "Upload", **more: Any) -> dict[str, Any]:
    mover = {"kind": "Inline", "name": f"ckpt-{UID}-1", "operation": operation}
    return {"phase": phase, "launches": 1, "mover": mover, "startTime": wire(ago(60)), **more}


def foreground(deleted: CheckpointArtifact) -> CheckpointArtifact:
    """As ``kubectl delete --cascade=foreground`` leaves it."""
    finalizers = [*deleted.metadata.finalizers, "foregroundDeletion"]
    return deleted.replace(metadata=deleted.metadata.replace(finalizers=finalizers))


def ended(reason: Reason, message: str = "why", *, wrote: bool = True) -> FinishedMover:
    return FinishedMover(1, Result(failure=Failure(reason=reason, message=message, wrote=wrote)))


def running(progress: Progress | None = None, moved: float = 1, stopping: StopReason | None = None) -> RunningMover:
    return RunningMover(progress, ago(moved), stopping)


def pending(reason: Reason | None = None, age: float = 0, *, pinned: bool = False, patient: bool = False) -> PendingMover:
    return PendingMover(ago(age), reason, "no node takes it", pinned, patient)


def with_condition(status: dict[str, Any], reason: str, message: str, since: float = 60) -> dict[str, Any]:
    """A status that says so in its condition Ready."""
    condition = {
        "type": "Ready",
        "status": "False",
        "reason": reason,
        "message": message,
        "observedGeneration": 1,
        "lastTransitionTime": wire(ago(since)),
    }
    return {"summary": {}, **status, "conditions": [condition]}


def job(phase: str = "Uploading", operation: str = "Upload", *, done: bool | None = None, **more: Any) -> dict[str, Any]:
    mover = {"kind": "Job", "name": f"ckpt-{UID}-1", "operation": operation, **({"done": done} if done is not None else {})}
    return {**launched(phase, operation, **more), "mover": mover}


def seen_from_outside(reason: Reason) -> FinishedMover:
    return FinishedMover(137, None, failure=Failure(reason=reason, message="as seen"))


DONE = FinishedMover(0, Result(stored=STORED))
HALF = Progress(bytes_done=1024, bytes_total=2048, files_done=1, files_total=2)
READY = launched("Ready", storageURI="s3://bucket/c", dataOwner=True)
NOT_SERVED = Failure(reason=Reason.CLAIM_NOT_SERVED, message="not listed")


@dataclass(frozen=True)
class Case:
    """What is there, the class of the decision, and facts about it (attribute path → value)."""

    artifact: CheckpointArtifact
    expect: type[Any]
    mover: MoverState = NoMover()  # noqa: RUF009 - a frozen value
    blocked: str | None = None
    refusal: Failure | None = None
    also_stored_by: str | None = None
    preparation: Preparation | None = Prepared()  # noqa: RUF009 - a frozen value
    kind: str = "Inline"
    namespace_terminating: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    # Nothing is running.
    "a new artifact gets the finalizer before anything else": Case(artifact(finalizer=False), AddFinalizer),
    "a new artifact with the finalizer starts a mover": Case(
        artifact(),
        Start,
        facts={
            "operation": Operation.UPLOAD,
            "status.phase": "Uploading",
            "status.launches": 1,
            "status.attempts": 0,
            "status.mover.name": f"ckpt-{UID}-1",
            "status.start_time": NOW,
            "status.progress.display": "0%",
        },
    ),
    "whom a mover runs as is written before it is started": Case(
        artifact(), Start, preparation=Prepared(1000), facts={"status.mover.run_as_user": 1000}
    ),
    "a suspended artifact says so, once": Case(
        artifact(spec={"suspend": True}), Record, facts={"status.phase": "Suspended", "seconds": None}
    ),
    "a suspended artifact that has said so is left alone": Case(
        artifact(
            {
                "phase": "Suspended",
                "summary": {},
                "conditions": [
                    {
                        "type": "Ready",
                        "status": "False",
                        "reason": "Suspended",
                        "message": "spec.suspend is true",
                        "observedGeneration": 1,
                        "lastTransitionTime": wire(ago(60)),
                    }
                ],
            },
            {"suspend": True},
        ),
        Wait,
        facts={"seconds": None},
    ),
    "an artifact that the configuration does not allow fails at once, with the reason": Case(
        artifact(),
        Record,
        refusal=NOT_SERVED,
        facts={
            "status.phase": "Failed",
            "status.failure.reason": "ClaimNotServed",
            "status.failure.retryable": False,
            "status.attempts": 0,
            "event.warning": True,
        },
    ),
    "an artifact for which no mover is free is Queued, and says why": Case(
        artifact(), Record, blocked="8 movers are running", facts={"status.phase": "Queued", "seconds": LOOK_AGAIN}
    ),
    "a failed try is not repeated before its time": Case(
        artifact(launched("Waiting", nextRetryTime=wire(NOW + timedelta(seconds=7)))), Wait, facts={"seconds": 7}
    ),
    "a failed try is repeated when its time has come": Case(
        artifact(launched("Waiting", nextRetryTime=wire(NOW), attempts=1)),
        Start,
        facts={"status.launches": 2, "status.attempts": 1, "status.mover.name": f"ckpt-{UID}-2"},
    ),
    "a mover that is gone without a word (an operator restarted) is started again, and no attempt is counted": Case(
        artifact(launched()), Start, facts={"status.launches": 2, "status.attempts": 0, "status.start_time": ago(60)}
    ),
    "a start that follows a vanished mover counts it as lost": Case(
        artifact(launched(lost=3)), Start, facts={"status.lost": 4}
    ),
    "a start that follows anything else begins to count anew": Case(
        artifact(launched("Waiting", nextRetryTime=wire(NOW), lost=3)), Start, facts={"status.lost": 0}
    ),
    "a mover that takes the operator down with it again and again is given up": Case(
        artifact(launched(lost=6)),
        Record,
        facts={"status.phase": "Failed", "status.failure.reason": "MoverKilled", "status.attempts": 0},
    ),
    "a mover of an earlier operator is waited for": Case(
        artifact(launched()), Record, mover=EarlierMover(), facts={"status.phase": "Waiting", "seconds": 2}
    ),
    # Before a start: may it start, and where.
    "before a start is written it is found out whether a mover could start": Case(
        artifact(),
        Prepare,
        preparation=None,
        facts={"name": f"ckpt-{UID}-1", "operation": Operation.UPLOAD},
    ),
    "nothing is asked for an artifact that has to wait for its place": Case(
        artifact(), Record, preparation=None, blocked="8 movers are running", facts={"status.phase": "Queued"}
    ),
    "a claim that is not there is waited for, and nothing is counted": Case(
        artifact(),
        Record,
        preparation=Held("ClaimNotFound", "there is no claim 'v'"),
        facts={"status.phase": "Waiting", "status.launches": 0, "status.attempts": 0, "seconds": 5, "event": None},
    ),
    "who has waited for a claim for long is asked for less often": Case(
        artifact(with_condition({"phase": "Waiting"}, "ClaimNotFound", "there is no claim 'v'", since=300)),
        Wait,
        preparation=Held("ClaimNotFound", "there is no claim 'v'"),
        facts={"seconds": 30},
    ),
    "what the namespace does not allow fails at once": Case(
        artifact(),
        Record,
        preparation=Failure(reason=Reason.SERVICE_ACCOUNT_NOT_ALLOWED, message="no"),
        facts={"status.phase": "Failed", "status.attempts": 0, "status.launches": 0, "event.warning": True},
    ),
    # A Job was made, and nothing runs yet.
    "a pod that takes a moment is not spoken of": Case(artifact(job()), Wait, mover=pending(age=5), facts={"seconds": 55}),
    "a pod that no node takes is given a moment": Case(
        artifact(job()), Wait, mover=pending(Reason.UNSCHEDULABLE, 4), facts={"seconds": 6}
    ),
    "a pod that no node takes is Waiting, with the scheduler's words": Case(
        artifact(job()),
        Record,
        mover=pending(Reason.UNSCHEDULABLE, 10),
        facts={"status.phase": "Waiting", "status.next_retry_time": None, "seconds": LOOK_AGAIN, "forget": False},
    ),
    "a pod that no node takes is spoken of once": Case(
        artifact(with_condition(job("Waiting"), "Unschedulable", "no node takes it")),
        Wait,
        mover=pending(Reason.UNSCHEDULABLE, 50),
    ),
    "a pod that does not start for no known reason is spoken of after a minute": Case(
        artifact(job()), Record, mover=pending(age=61), facts={"status.phase": "Waiting"}
    ),
    "a mover that is bound to one node and finds no room there is planned anew after a minute": Case(
        artifact(job()),
        Stop,
        mover=pending(Reason.UNSCHEDULABLE, 60, pinned=True),
        facts={"reason": StopReason.REPLANNED},
    ),
    "a mover that may run anywhere is made anew after ten minutes": Case(
        artifact(job()), Stop, mover=pending(Reason.IMAGE_PULL_FAILED, 600), facts={"reason": StopReason.REPLANNED}
    ),
    "a mover that waits in somebody's queue keeps its place there": Case(
        artifact(job()), Record, mover=pending(Reason.MOVER_NOT_STARTED, 6000, patient=True)
    ),
    "a mover that could not start is made anew when its artifact has changed": Case(
        artifact(job(), generation=2), Stop, mover=pending(), facts={"reason": StopReason.REPLANNED}
    ),
    "a mover that could not start is made anew when somebody asks": Case(
        artifact(job(), annotations={names.ANNOTATION_RETRY: "now"}), Stop, mover=pending()
    ),
    "a mover that could not start is stopped when its artifact is suspended": Case(
        artifact(job(), {"suspend": True}), Stop, mover=pending(), facts={"reason": StopReason.SUSPENDED}
    ),
    "a mover that was planned anew counts no attempt, and is known to have written nothing": Case(
        artifact(job()),
        Record,
        mover=FinishedMover(143, None, StopReason.REPLANNED, ran=False),
        facts={"status.phase": "Pending", "status.attempts": 0, "status.clean_launches": 1, "seconds": 0, "forget": True},
    ),
    "a mover that runs after trouble is Uploading again": Case(
        artifact(job("Waiting")), Record, mover=running(), facts={"status.phase": "Uploading", "seconds": 0}
    ),
    "a mover whose progress cannot be seen is not accused of standing still": Case(
        artifact(job()), Wait, mover=RunningMover(None, None)
    ),
    # A Job has ended, or is gone.
    "what was recorded of a mover is marked, so that the next operator does not count it again": Case(
        artifact(job()),
        Record,
        kind="Job",
        mover=FinishedMover(1, None, failure=Failure(reason=Reason.OUT_OF_MEMORY, message="m"), uid="job-uid"),
        facts={"status.mover.done": True, "status.mover.uid": "job-uid"},
    ),
    "a mover that ran out of memory says so, and counts": Case(
        artifact(job()),
        Record,
        mover=seen_from_outside(Reason.OUT_OF_MEMORY),
        facts={"status.phase": "Waiting", "status.failure.reason": "OutOfMemory", "status.attempts": 1},
    ),
    "a mover whose node was drained is tried again for ever, and counts no attempt": Case(
        artifact(job(attempts=2, retries=100)),
        Record,
        mover=seen_from_outside(Reason.MOVER_DISRUPTED),
        facts={"status.phase": "Waiting", "status.attempts": 2},
    ),
    "a Job that was never made, or is gone since before this operator, is made again, later, and nothing is counted": Case(
        artifact(job()),
        Record,
        kind="Job",
        facts={
            "status.phase": "Waiting",
            "status.failure.reason": "MoverDisrupted",
            "status.attempts": 0,
            "status.mover.done": True,
        },
    ),
    "a Job that is gone after its end was recorded is nothing new": Case(
        artifact(job("Waiting", done=True, nextRetryTime=wire(NOW))), Start, kind="Job", facts={"status.launches": 2}
    ),
    "an upload starts beside a mover that cannot be seen, since it joins": Case(
        artifact(job("Waiting", done=True)), Start, kind="Job", mover=NoMover(unseen="pod p on node 'n'")
    ),
    "an upload that has to swap the claim waits until the mover that cannot be seen is gone": Case(
        artifact(
            job(
                "Waiting",
                done=True,
                failure={"code": "x", "reason": "EarlierMoverNotGone", "message": "x", "retryable": True},
            )
        ),
        Record,
        kind="Job",
        mover=NoMover(unseen="pod p on node 'n', which does not answer"),
        facts={"status.phase": "Waiting", "status.launches": 1, "seconds": LOOK_AGAIN},
    ),
    # A human does not want to wait for the backoff.
    "a try that is asked for does not wait for the backoff, and the request is noted": Case(
        artifact(
            launched("Waiting", nextRetryTime=wire(NOW + timedelta(hours=1))), annotations={names.ANNOTATION_RETRY: "now"}
        ),
        Start,
        facts={"status.retry_handled": "now", "status.launches": 2},
    ),
    "a changed spec may be the cure, so it does not wait for the backoff either": Case(
        artifact(launched("Waiting", nextRetryTime=wire(NOW + timedelta(hours=1))), generation=2),
        Start,
        facts={"status.observed_generation": 2, "status.launches": 2},
    ),
    "the same request does not skip the backoff twice": Case(
        artifact(
            launched("Waiting", nextRetryTime=wire(NOW + timedelta(seconds=9)), retryHandled="now"),
            annotations={names.ANNOTATION_RETRY: "now"},
        ),
        Wait,
        facts={"seconds": 9},
    ),
    "a request that was heard stays noted at the next start": Case(
        artifact(
            launched("Waiting", nextRetryTime=wire(NOW), retryHandled="now"), annotations={names.ANNOTATION_RETRY: "now"}
        ),
        Start,
        facts={"status.retry_handled": "now"},
    ),
    # A mover is running.
    "progress is written when the last was long enough ago": Case(
        artifact(launched(progress={"display": "0%", "lastUpdateTime": wire(ago(5))})),
        Record,
        mover=running(HALF),
        facts={
            "status.phase": "Uploading",
            "status.progress.display": "50%",
            "status.size": "2Ki",
            "status.progress.last_update_time": NOW,
            "event": None,
        },
    ),
    "progress is not written more often than every five seconds": Case(
        artifact(launched(progress={"display": "0%", "lastUpdateTime": wire(ago(3))})),
        Wait,
        mover=running(HALF),
        facts={"seconds": 2},
    ),
    "progress that was written already is not written again": Case(
        artifact(
            launched(progress={"bytesDone": 1024, "bytesTotal": 2048, "filesDone": 1, "lastUpdateTime": wire(ago(50))})
        ),
        Wait,
        mover=running(HALF),
        facts={"seconds": LOOK_AGAIN},
    ),
    "a mover that verifies is shown as Verifying": Case(
        artifact(launched(progress={"display": "0%", "lastUpdateTime": wire(ago(9))})),
        Record,
        mover=running(HALF.replace(stage=Stage.VERIFYING)),
        facts={"status.phase": "Verifying"},
    ),
    "a mover that has said nothing yet is left alone": Case(artifact(launched()), Wait, mover=running()),
    "a mover that moves nothing for too long is stopped": Case(
        artifact(launched()), Stop, mover=running(HALF, moved=900), facts={"reason": StopReason.NO_PROGRESS}
    ),
    "a mover of an artifact that is suspended is stopped": Case(
        artifact(launched(), {"suspend": True}), Stop, mover=running(HALF), facts={"reason": StopReason.SUSPENDED}
    ),
    "a mover that was asked to stop is not asked again": Case(
        artifact(launched(), {"suspend": True}), Wait, mover=running(stopping=StopReason.SUSPENDED)
    ),
    # A mover has ended.
    "a committed checkpoint makes the artifact Ready": Case(
        artifact(launched(failure={"code": "x", "reason": "x", "message": "x", "retryable": True}, retries=3)),
        Record,
        mover=DONE,
        facts={
            "status.phase": "Ready",
            "status.storage_uri": "s3://bucket/c",
            "status.size": "2Ki",
            "status.file_count": 2,
            "status.manifest_digest": "sha256:m",
            "status.content_digest": "sha256:c",
            "status.data_owner": True,
            "status.failure": None,
            "status.retries": 0,
            "status.attempts": 1,
            "status.progress.display": "100%",
            "status.completion_time": NOW,
            "event.reason": "Committed",
            "forget": True,
        },
    ),
    "content that another artifact has stored makes the artifact Ready without owning it": Case(
        artifact(launched()),
        Record,
        mover=FinishedMover(0, Result(stored=STORED.replace(data_owner=False))),
        facts={"status.phase": "Ready", "status.data_owner": False},
    ),
    "a wrong key fails at once": Case(
        artifact(launched()),
        Record,
        mover=ended(Reason.CREDENTIALS_REFUSED),
        facts={"status.phase": "Failed", "status.failure.code": "RLHF058", "event.warning": True, "forget": True},
    ),
    "a source that changed is tried again, and counted": Case(
        artifact(launched()),
        Record,
        mover=ended(Reason.SOURCE_CHANGED),
        facts={
            "status.phase": "Waiting",
            "status.attempts": 1,
            "status.retries": 1,
            "status.failure.retryable": True,
            "seconds": backoff(UID, 1, POLICY),
            "event.reason": "SourceChanged",
        },
    ),
    "a source that keeps changing fails after the last attempt": Case(
        artifact(launched(attempts=2)),
        Record,
        mover=ended(Reason.SOURCE_CHANGED),
        facts={"status.phase": "Failed", "status.attempts": 3, "status.failure.message": "why (gave up after 3 attempts)"},
    ),
    "an outage of the store is waited out, however often it was met, and counts no attempt": Case(
        artifact(launched(attempts=2, retries=400)),
        Record,
        mover=ended(Reason.STORE_UNAVAILABLE),
        facts={"status.phase": "Waiting", "status.attempts": 2, "status.retries": 401},
    ),
    "the same outage again makes no second event": Case(
        artifact(
            launched(failure={"code": "RLHF059", "reason": "StoreUnavailable", "message": "x", "retryable": True}, retries=1)
        ),
        Record,
        mover=ended(Reason.STORE_UNAVAILABLE),
        facts={"status.phase": "Waiting", "event": None},
    ),
    "a source that is not ready is waited for, and counts no attempt": Case(
        artifact(launched()),
        Record,
        mover=ended(Reason.NOT_READY),
        facts={"status.phase": "Waiting", "status.attempts": 0},
    ),
    "a source that is not ready in time fails": Case(
        artifact(launched(startTime=wire(ago(1800)))),
        Record,
        mover=ended(Reason.NOT_READY),
        facts={"status.phase": "Failed", "status.failure.reason": "NotReady"},
    ),
    "a mover that was killed is tried again, and counted": Case(
        artifact(launched()),
        Record,
        mover=FinishedMover(-9, None),
        facts={
            "status.phase": "Waiting",
            "status.failure.reason": "MoverKilled",
            "status.failure.message": "the mover ended without a result (signal 9)",
            "status.attempts": 1,
        },
    ),
    "a mover whose result was lost is judged by its exit code": Case(
        artifact(launched()),
        Record,
        mover=FinishedMover(21, None),
        facts={"status.failure.reason": "StoreUnavailable", "status.attempts": 0},
    ),
    "a mover that was stopped for standing still is tried again, and counted": Case(
        artifact(launched()),
        Record,
        mover=FinishedMover(143, None, StopReason.NO_PROGRESS),
        facts={"status.phase": "Waiting", "status.failure.reason": "NoProgress", "status.attempts": 1},
    ),
    "a mover that was stopped for a suspension is no failure": Case(
        artifact(launched(), {"suspend": True}),
        Record,
        mover=FinishedMover(143, None, StopReason.SUSPENDED),
        facts={"status.phase": "Pending", "status.attempts": 0, "status.failure": None, "seconds": 0, "forget": True},
    ),
    "a mover that committed although it was asked to stop has committed": Case(
        artifact(launched(), {"suspend": True}),
        Record,
        mover=FinishedMover(0, Result(stored=STORED), StopReason.SUSPENDED),
        facts={"status.phase": "Ready"},
    ),
    "a try that certainly wrote nothing is remembered as such": Case(
        artifact(launched()),
        Record,
        mover=ended(Reason.CREDENTIALS_REFUSED, wrote=False),
        facts={"status.clean_launches": 1},
    ),
    # It has ended for good.
    "a Ready artifact is left alone": Case(artifact(READY), Wait, facts={"seconds": None}),
    "a Ready artifact that got new tags has its generation noted, and nothing else": Case(
        artifact(READY, generation=2),
        Record,
        facts={"status.phase": "Ready", "status.observed_generation": 2, "event": None},
    ),
    "a result that was recorded before a crash is forgotten now": Case(
        artifact(READY), Record, mover=DONE, facts={"forget": True}
    ),
    "a Ready artifact does not mind being suspended": Case(artifact(READY, {"suspend": True}), Wait),
    "a Failed artifact is left alone": Case(artifact(launched("Failed")), Wait, facts={"seconds": None}),
    "a Failed artifact is tried again when the annotation asks": Case(
        artifact(launched("Failed", attempts=3), annotations={names.ANNOTATION_RETRY: "1"}),
        Record,
        facts={"status.phase": "Pending", "status.attempts": 0, "status.retry_handled": "1", "seconds": 0},
    ),
    "the same annotation does not ask twice": Case(
        artifact(launched("Failed", retryHandled="1"), annotations={names.ANNOTATION_RETRY: "1"}), Wait
    ),
    "a Failed artifact is tried again when its spec was changed": Case(
        artifact(launched("Failed", attempts=3), generation=2), Record, facts={"status.attempts": 0, "seconds": 0}
    ),
    # It is being deleted.
    "an object without our finalizer is not ours to hold": Case(artifact(deleted=True, finalizer=False), Wait),
    "an artifact that never started a mover just goes": Case(artifact(deleted=True), RemoveFinalizer, facts={"event": None}),
    "an artifact all of whose movers wrote nothing just goes": Case(
        artifact(launched("Failed", cleanLaunches=1), deleted=True), RemoveFinalizer, facts={"event": None}
    ),
    "a running upload is stopped first": Case(
        artifact(launched(), deleted=True), Stop, mover=running(HALF), facts={"reason": StopReason.DELETED}
    ),
    "an upload that is stopping is waited for": Case(
        artifact(launched(), deleted=True), Wait, mover=running(stopping=StopReason.DELETED)
    ),
    "an upload that has ended is recorded before the deletion starts": Case(
        artifact(launched(), deleted=True),
        Record,
        mover=FinishedMover(143, None, StopReason.DELETED),
        facts={"status.phase": "Deleting", "forget": True, "seconds": 0},
    ),
    "a mover of an earlier operator is waited for before anything is removed": Case(
        artifact(launched(), deleted=True), Record, mover=EarlierMover(), facts={"status.phase": "Deleting", "seconds": 2}
    ),
    "committed data is kept under Retain": Case(
        artifact(READY, deleted=True), RemoveFinalizer, facts={"event.reason": "DataKept"}
    ),
    "committed data is removed under Delete": Case(
        artifact(READY, {"deletionPolicy": "Delete"}, deleted=True),
        Start,
        facts={"operation": Operation.DELETE, "status.phase": "Deleting", "status.launches": 2},
    ),
    "data that another artifact has stored is not removed": Case(
        artifact({**READY, "dataOwner": False}, {"deletionPolicy": "Delete"}, deleted=True),
        RemoveFinalizer,
        facts={"event.reason": "DataKept"},
    ),
    "data that another Ready artifact names is not removed": Case(
        artifact(READY, {"deletionPolicy": "Delete"}, deleted=True),
        RemoveFinalizer,
        also_stored_by="ns/other",
        facts={"event.message": "s3://bucket/c was kept: ns/other names it too"},
    ),
    "data that was never committed is cleaned up under Retain as well": Case(
        artifact(launched("Waiting"), deleted=True), Start, facts={"operation": Operation.DELETE}
    ),
    "the backoff of the upload does not hold up the deletion": Case(
        artifact(launched("Waiting", nextRetryTime=wire(NOW + timedelta(hours=1))), deleted=True), Start
    ),
    "a suspended artifact can be deleted": Case(
        artifact(launched("Suspended"), {"suspend": True}, deleted=True), Start, facts={"operation": Operation.DELETE}
    ),
    "a running deletion is left alone": Case(
        artifact(launched("Deleting", "Delete"), deleted=True), Wait, mover=running(), facts={"seconds": 899}
    ),
    "a deletion that stands still is stopped": Case(
        artifact(launched("Deleting", "Delete"), deleted=True),
        Stop,
        mover=running(moved=900),
        facts={"reason": StopReason.NO_PROGRESS},
    ),
    "a deletion that is done lets the object go, and says what it did": Case(
        artifact(launched("Deleting", "Delete"), deleted=True),
        RemoveFinalizer,
        mover=FinishedMover(0, Result(deleted="nothing is left there")),
        facts={"event.reason": "Cleaned", "event.message": "nothing is left there"},
    ),
    "a deletion that is done says so, although another artifact names the place by now": Case(
        artifact(launched("Deleting", "Delete", storageURI="s3://bucket/c"), {"deletionPolicy": "Delete"}, deleted=True),
        RemoveFinalizer,
        mover=FinishedMover(0, Result(deleted="nothing is left there")),
        also_stored_by="other",
        facts={"event.reason": "Cleaned"},
    ),
    "a deletion that has begun goes on, although the policy was changed to Retain": Case(
        artifact(launched("Deleting", "Delete", storageURI="s3://bucket/c"), deleted=True),
        Start,
        facts={"operation": Operation.DELETE},
    ),
    "a deletion that has begun stops before data that another artifact became Ready with": Case(
        artifact(launched("Deleting", "Delete", storageURI="s3://bucket/c"), {"deletionPolicy": "Delete"}, deleted=True),
        RemoveFinalizer,
        also_stored_by="other",
        facts={"event.reason": "DataKept"},
    ),
    "data whose commit was never written into the status is kept where another artifact names it": Case(
        artifact(launched(), deleted=True), RemoveFinalizer, also_stored_by="other", facts={"event.reason": "DataKept"}
    ),
    "a deletion that failed is tried again, whatever the class of the failure, and names the way out": Case(
        artifact(launched("Deleting", "Delete"), deleted=True),
        Record,
        mover=ended(Reason.CREDENTIALS_REFUSED),
        facts={
            "status.phase": "Deleting",
            "status.retries": 1,
            "status.next_retry_time": NOW + timedelta(seconds=backoff(UID, 1, POLICY)),
            "event.message": "why; to delete the object and leave the data, annotate it with "
            f"{names.ANNOTATION_ABANDON_DATA}=true",
        },
    ),
    "a deletion that failed is not repeated before its time": Case(
        artifact(launched("Deleting", "Delete", nextRetryTime=wire(NOW + timedelta(seconds=9))), deleted=True),
        Wait,
        facts={"seconds": 9},
    ),
    "a deletion waits for a free mover": Case(
        artifact(launched("Waiting"), deleted=True), Record, blocked="8 movers", facts={"status.phase": "Deleting"}
    ),
    "a deletion that the configuration does not allow says so and is looked at again": Case(
        artifact(launched("Waiting"), deleted=True),
        Record,
        refusal=NOT_SERVED,
        facts={"status.phase": "Deleting", "status.failure.reason": "ClaimNotServed", "seconds": 60, "event.warning": True},
    ),
    "a foreground deletion is undone before anything else": Case(
        foreground(artifact(READY, {"deletionPolicy": "Delete"}, deleted=True)), ReleaseDependents
    ),
    "a deletion finds out first whether its mover could start": Case(
        artifact(READY, {"deletionPolicy": "Delete"}, deleted=True),
        Prepare,
        preparation=None,
        facts={"operation": Operation.DELETE, "name": f"ckpt-{UID}-2"},
    ),
    "a deletion whose target claim is not there says so, with the way out": Case(
        artifact(READY, {"deletionPolicy": "Delete"}, deleted=True),
        Record,
        preparation=Held("ClaimNotFound", "there is no claim 'archive'"),
        facts={"status.phase": "Deleting", "status.launches": 1, "seconds": 5},
    ),
    "a deletion that the cluster does not allow says so and is looked at again": Case(
        artifact(READY, {"deletionPolicy": "Delete"}, deleted=True),
        Record,
        preparation=Failure(reason=Reason.SERVICE_ACCOUNT_NOT_ALLOWED, message="no"),
        facts={"status.phase": "Deleting", "status.failure.reason": "ServiceAccountNotAllowed", "seconds": 60},
    ),
    "a deletion waits until a mover that cannot be seen is gone": Case(
        artifact(job("Waiting", done=True), deleted=True),
        Record,
        kind="Job",
        mover=NoMover(unseen="pod p on node 'n', which does not answer"),
        facts={"status.phase": "Deleting", "status.launches": 1},
    ),
    "an upload that could not start is stopped for the deletion": Case(
        artifact(job(), deleted=True), Stop, mover=pending(), facts={"reason": StopReason.DELETED}
    ),
    "a deletion of what never came to run needs no mover": Case(
        artifact(job("Deleting", done=True, cleanLaunches=1), deleted=True), RemoveFinalizer, kind="Job"
    ),
    "an upload that never came to run is remembered as such when it is deleted": Case(
        artifact(job(), deleted=True),
        Record,
        mover=FinishedMover(143, None, StopReason.DELETED, ran=False),
        facts={"status.clean_launches": 1, "status.phase": "Deleting"},
    ),
    "a deletion whose mover does not start says why": Case(
        artifact(job("Deleting", "Delete"), deleted=True),
        Record,
        mover=pending(Reason.UNSCHEDULABLE, 30),
        facts={"status.phase": "Deleting", "seconds": LOOK_AGAIN},
    ),
    "a deletion that was planned anew is no failure": Case(
        artifact(job("Deleting", "Delete"), deleted=True),
        Record,
        mover=FinishedMover(143, None, StopReason.REPLANNED, ran=False),
        facts={"status.retries": 0, "status.failure": None, "seconds": 0, "forget": True},
    ),
    "a deletion that is asked for again does not wait for its backoff": Case(
        artifact(
            job("Deleting", "Delete", done=True, nextRetryTime=wire(NOW + timedelta(hours=1))),
            deleted=True,
            annotations={names.ANNOTATION_RETRY: "now"},
        ),
        Start,
        facts={"status.retry_handled": "now"},
    ),
    # Its whole namespace is being deleted.
    "a namespace that is deleted keeps its checkpoints, whatever their policy": Case(
        artifact(READY, {"deletionPolicy": "Delete"}, deleted=True),
        RemoveFinalizer,
        namespace_terminating=True,
        facts={
            "event.reason": "DataKept",
            "event.warning": True,
            "event.of_namespace": True,
            "event.message": "c: s3://bucket/c was left as it is, since a whole namespace is being deleted",
        },
    ),
    "a namespace that is deleted does not wait for a store that is away": Case(
        artifact(launched("Deleting", "Delete", nextRetryTime=wire(NOW + timedelta(seconds=9))), deleted=True),
        RemoveFinalizer,
        namespace_terminating=True,
        facts={"event.reason": "DataKept"},
    ),
    "a namespace that is deleted does not wait for a place of a mover": Case(
        artifact(READY, {"deletionPolicy": "Delete"}, deleted=True),
        RemoveFinalizer,
        blocked="8 movers",
        namespace_terminating=True,
    ),
    "a namespace that is deleted does not wait for a configuration that allows": Case(
        artifact(launched("Waiting"), deleted=True), RemoveFinalizer, refusal=NOT_SERVED, namespace_terminating=True
    ),
    "a namespace that is deleted does not wait for a node that is lost": Case(
        artifact(launched("Waiting"), deleted=True),
        RemoveFinalizer,
        mover=NoMover(unseen="pod p on node n"),
        namespace_terminating=True,
    ),
    "an upload in a namespace that is deleted is stopped first": Case(
        artifact(launched(), deleted=True), Stop, mover=running(HALF), namespace_terminating=True
    ),
    "a deletion that was asked for before its namespace was deleted may end": Case(
        artifact(launched("Deleting", "Delete"), deleted=True), Wait, mover=running(), namespace_terminating=True
    ),
    "an artifact that stored nothing goes with its namespace without a word": Case(
        artifact(launched("Failed", cleanLaunches=1), deleted=True),
        RemoveFinalizer,
        namespace_terminating=True,
        facts={"event": None},
    ),
    "data that is kept anyway is kept for its own reason": Case(
        artifact(READY, deleted=True),
        RemoveFinalizer,
        namespace_terminating=True,
        facts={"event.message": "s3://bucket/c was kept (deletionPolicy: Retain)"},
    ),
    "abandoned data lets the object go at once": Case(
        artifact(launched("Deleting"), deleted=True, annotations={names.ANNOTATION_ABANDON_DATA: "true"}),
        RemoveFinalizer,
        facts={"event.reason": "DataAbandoned"},
    ),
    "abandoned data stops a running deletion first": Case(
        artifact(launched("Deleting", "Delete"), deleted=True, annotations={names.ANNOTATION_ABANDON_DATA: "true"}),
        Stop,
        mover=running(),
    ),
}


def decide(case: Case) -> Decision:
    seen = Observed(
        case.artifact,
        case.mover,
        case.kind,
        case.blocked,
        case.refusal,
        case.also_stored_by,
        preparation=case.preparation,
        namespace_terminating=case.namespace_terminating,
    )
    return plan(seen, POLICY, NOW)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_plan(case: Case) -> None:
    decision = decide(case)
    assert isinstance(decision, case.expect), decision
    for path, expected in case.facts.items():
        value: Any = decision
        for part in path.split("."):
            value = getattr(value, part)
        assert value == expected, path


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_look_gives_the_same_decision(case: Case) -> None:
    assert decide(case) == decide(case)


def test_phase_ready_condition_and_failure_never_contradict_each_other() -> None:
    for name, case in CASES.items():
        decision = decide(case)
        if isinstance(decision, Record | Start):
            ready = find_condition(decision.status.conditions, ConditionType.READY)
            stalled = find_condition(decision.status.conditions, ConditionType.STALLED)
            if case.artifact.status.phase != "Ready":  # those cases were given no conditions
                assert (ready is not None and ready.status == "True") == (decision.status.phase == "Ready"), name
            assert (stalled is not None and stalled.status == "True") == (decision.status.phase == "Failed"), name
            assert decision.status.phase != "Ready" or decision.status.failure is None, name


def test_a_transition_time_moves_only_when_the_status_of_its_condition_does() -> None:
    first = decide(CASES["a source that changed is tried again, and counted"])
    assert isinstance(first, Record)
    later = Observed(
        artifact().replace(status=first.status), FinishedMover(0, Result(stored=STORED)), "Inline", None, None, None
    )
    second = plan(later, POLICY, NOW + timedelta(minutes=1))
    assert isinstance(second, Record)
    before = find_condition(first.status.conditions, ConditionType.READY)
    after = find_condition(second.status.conditions, ConditionType.READY)
    assert before is not None
    assert after is not None
    assert (before.status, before.last_transition_time) == ("False", NOW)
    assert (after.status, after.last_transition_time) == ("True", NOW + timedelta(minutes=1))


def test_the_backoff_doubles_up_to_its_limit_and_is_spread_but_never_longer() -> None:
    delays = [backoff(UID, failures, POLICY) for failures in range(1, 40)]
    for failures, delay in enumerate(delays, 1):
        full = min(10 * 2 ** (failures - 1), 600)
        assert 0.8 * full <= delay <= full
    assert len({backoff(f"{number}", 1, POLICY) for number in range(50)}) > 20
