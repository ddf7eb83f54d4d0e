"""What to do about one artifact, decided from what is there now and nothing else. Pure; the clock is an argument.

Checks stand in a row; the first one that has something to say decides. What a decision needs is in it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import Reason, Retry, reason_for_exit
from checkpoint_operator.api.protocol import Failure, Operation, Progress
from checkpoint_operator.api.spec import DeletionPolicy, Readiness
from checkpoint_operator.api.status import ArtifactStatus, MoverStatus, Phase
from checkpoint_operator.controller import status as say
from checkpoint_operator.controller.executor import (
    EarlierMover,
    FinishedMover,
    MoverState,
    NoMover,
    RunningMover,
    StopReason,
)

LOOK_AGAIN = 60.0
"""Seconds after which something is looked at again although an event should tell: events can be missed."""
EARLIER_MOVER_POLL = 2.0
REFUSED_DELETION_POLL = 60.0
RETRY_MAX = 256
"""Length of status.retryHandled in the schema."""
LOST_FACTOR = 2
"""A mover that vanishes with its operator counts no attempt, but after so many times ``max_attempts`` in a row it is the
likely cause (memory), and must not take the operator down for ever."""


@dataclass(frozen=True)
class Policy:
    """How patient the operator is. Seconds."""

    max_attempts: int = 5
    backoff: float = 10.0
    backoff_max: float = 600.0
    progress_every: float = 5.0
    no_progress: float = 900.0


@dataclass(frozen=True)
class Observed:
    """Everything that a decision depends on.

    ``blocked``: why no mover may start now (caps, same target). ``refusal``: why the configuration does not allow this
    artifact. ``also_stored_by``: another Ready artifact that names the same stored data.
    """

    artifact: CheckpointArtifact
    mover: MoverState
    kind: str = "Inline"
    blocked: str | None = None
    refusal: Failure | None = None
    also_stored_by: str | None = None


@dataclass(frozen=True)
class Event:
    """What is said to whoever runs ``kubectl describe``."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Wait:
    """There is nothing to do; look again after so many seconds (None: an event will tell)."""

    seconds: float | None


@dataclass(frozen=True)
class AddFinalizer:
    """Before anything is stored, so that nothing stored is ever forgotten."""


@dataclass(frozen=True)
class RemoveFinalizer:
    """Nothing of ours is left to do; the object may go."""

    event: Event | None = None


@dataclass(frozen=True)
class Record:
    """Write a status. ``forget``: it has what the finished mover said. Look again after ``seconds``."""

    status: ArtifactStatus
    event: Event | None = None
    seconds: float | None = None
    forget: bool = False


@dataclass(frozen=True)
class Start:
    """Write the status, then start the mover that it names."""

    status: ArtifactStatus
    operation: Operation


@dataclass(frozen=True)
class Stop:
    """Ask the running mover to stop; its end will be reported."""

    reason: StopReason


Decision = Wait | AddFinalizer | RemoveFinalizer | Record | Start | Stop


def plan(seen: Observed, policy: Policy, now: datetime) -> Decision:
    """Decide the one next step."""
    artifact = seen.artifact
    if artifact.metadata.deletion_timestamp is not None:
        return _plan_deletion(seen, policy, now)
    if names.FINALIZER not in artifact.metadata.finalizers:
        return AddFinalizer()
    if artifact.status.phase == Phase.READY:
        return _plan_ready(seen)
    if artifact.status.phase == Phase.FAILED:
        return _plan_failed(seen, now)
    match seen.mover:
        case FinishedMover() as mover:
            return _plan_finished(seen, mover, policy, now)
        case RunningMover() as mover:
            return _plan_running(seen, mover, policy, now)
        case EarlierMover():
            return _hold_back(
                seen,
                Phase.WAITING,
                Reason.EARLIER_MOVER_NOT_GONE,
                "a mover of an earlier operator is still running; it stops by itself",
                EARLIER_MOVER_POLL,
                now,
            )
        case NoMover():
            return _plan_start(seen, policy, now)


def _plan_ready(seen: Observed) -> Decision:
    forget = isinstance(seen.mover, FinishedMover)
    if forget or seen.artifact.status.observed_generation != seen.artifact.metadata.generation:
        return Record(say.observed(seen.artifact), forget=forget)
    return Wait(None)


def retry_asked(annotations: Mapping[str, str]) -> str | None:
    """The value of the retry annotation, as much of it as the status can keep."""
    asked = annotations.get(names.ANNOTATION_RETRY)
    return asked[:RETRY_MAX] if asked is not None else None


def _plan_failed(seen: Observed, now: datetime) -> Decision:
    artifact = seen.artifact
    asked = retry_asked(artifact.metadata.annotations)
    # What may be changed in a spec is what may cure: a Secret's name, the mover's memory. So a change is a request too.
    changed = artifact.status.observed_generation != artifact.metadata.generation
    if changed or (asked is not None and asked != artifact.status.retry_handled):
        return Record(say.revived(artifact, asked, now), seconds=0, forget=isinstance(seen.mover, FinishedMover))
    return Wait(None)


def _plan_running(seen: Observed, mover: RunningMover, policy: Policy, now: datetime) -> Decision:
    artifact = seen.artifact
    if mover.stopping:
        return Wait(LOOK_AGAIN)
    if artifact.spec.suspend:
        return Stop(StopReason.SUSPENDED)
    idle = (now - mover.moved_at).total_seconds()
    if idle >= policy.no_progress:
        return Stop(StopReason.NO_PROGRESS)
    if mover.progress and _is_news(artifact, mover.progress):
        last = artifact.status.progress.last_update_time if artifact.status.progress else None
        due = (last + timedelta(seconds=policy.progress_every) - now).total_seconds() if last else 0.0
        if due <= 0:
            return Record(say.progressed(artifact, mover.progress, now), seconds=policy.no_progress - idle)
        return Wait(due)
    return Wait(min(LOOK_AGAIN, policy.no_progress - idle))


def _is_news(artifact: CheckpointArtifact, progress: Progress) -> bool:
    written = artifact.status.progress
    return written is None or (progress.bytes_done, progress.files_done, progress.bytes_total, str(progress.stage)) != (
        written.bytes_done,
        written.files_done,
        written.bytes_total,
        artifact.status.phase,
    )


def _plan_finished(seen: Observed, mover: FinishedMover, policy: Policy, now: datetime) -> Decision:
    artifact = seen.artifact
    if mover.result and mover.result.stored:
        stored = mover.result.stored
        status = say.ready(artifact, stored, now)
        return Record(status, Event("Committed", f"stored {status.size} at {stored.storage_uri}"), forget=True)
    if mover.stopped and mover.stopped is not StopReason.NO_PROGRESS:
        # Suspended or shut down by us: no attempt is counted; what comes next is decided as if none had run.
        message = "the mover was stopped; what it had stored is kept for the next one"
        status = say.held_back(artifact, Phase.PENDING, mover.stopped, message, now)
        return Record(status, seconds=0, forget=True)
    return _plan_after_failure(seen, _failure_of(mover, policy), policy, now)


def _failure_of(mover: FinishedMover, policy: Policy) -> Failure:
    if mover.stopped is StopReason.NO_PROGRESS:
        return Failure(
            reason=Reason.NO_PROGRESS, message=f"the mover moved nothing for {policy.no_progress:.0f} s and was stopped"
        )
    if mover.result and mover.result.failure:
        return mover.result.failure
    reason = reason_for_exit(mover.exit_code)
    how = f"signal {-mover.exit_code}" if mover.exit_code < 0 else f"exit code {mover.exit_code}"
    return Failure(reason=reason, message=f"the mover ended without a result ({how})")


def _plan_after_failure(seen: Observed, failure: Failure, policy: Policy, now: datetime) -> Decision:
    artifact = seen.artifact
    counted = say.counts(failure)
    attempts = artifact.status.attempts + (1 if counted else 0)
    give_up = False
    match failure.retry:
        case Retry.NEVER:
            give_up = True
        case Retry.COUNTED:
            give_up = attempts >= policy.max_attempts
            if give_up:
                failure = failure.replace(message=f"{failure.message} (gave up after {attempts} attempts)")
        case Retry.UNTIL_TIMEOUT:
            timeout = (artifact.spec.source.readiness or Readiness()).timeout_seconds
            since = artifact.status.start_time or now
            give_up = (now - since).total_seconds() >= timeout
        case Retry.OUTAGE:
            pass
    if give_up:
        status = say.failed(artifact, failure, now, counts=counted)
        return Record(status, Event(failure.reason, failure.message, warning=True), forget=True)
    delay = backoff(artifact.metadata.uid, artifact.status.retries + 1, policy)
    status = say.waiting(artifact, failure, now + timedelta(seconds=delay), now, counts=counted)
    return Record(status, _event_of_retry(artifact, failure), seconds=delay, forget=True)


def _event_of_retry(artifact: CheckpointArtifact, failure: Failure) -> Event | None:
    """One event for each cause, not for each try."""
    before = artifact.status.failure
    if before and before.reason == failure.reason:
        return None
    return Event(failure.reason, f"will try again: {failure.message}", warning=True)


def backoff(uid: str, failures: int, policy: Policy) -> float:
    """Seconds before the next try: doubling, capped, spread by up to a fifth so that a thousand artifacts that met the
    same outage do not come back at the same second. Deterministic, so that a restart does not change it."""
    delay = min(policy.backoff * 2.0 ** min(failures - 1, 30), policy.backoff_max)
    spread = hashlib.sha256(f"{uid}/{failures}".encode()).digest()[0] / 255
    return delay * (1 - 0.2 * spread)


def _plan_start(seen: Observed, policy: Policy, now: datetime) -> Decision:
    artifact = seen.artifact
    if artifact.spec.suspend:
        return _hold_back(seen, Phase.SUSPENDED, "Suspended", "spec.suspend is true", None, now)
    if seen.refusal:
        status = say.failed(artifact, seen.refusal, now, counts=False, ran=False)
        return Record(status, Event(seen.refusal.reason, seen.refusal.message, warning=True))
    if (retry_at := artifact.status.next_retry_time) and artifact.status.phase == Phase.WAITING and retry_at > now:
        return Wait((retry_at - now).total_seconds())
    if artifact.status.lost >= LOST_FACTOR * policy.max_attempts:
        times = f"{artifact.status.lost} times in a row"
        failure = Failure(reason=Reason.MOVER_KILLED, message=f"the mover vanished together with the operator {times}")
        status = say.failed(artifact, failure, now, counts=False, ran=False)
        return Record(status, Event(failure.reason, failure.message, warning=True))
    if seen.blocked:
        return _hold_back(seen, Phase.QUEUED, "Queued", seen.blocked, LOOK_AGAIN, now)
    return Start(say.started(artifact, _next_mover(seen, Operation.UPLOAD), now), Operation.UPLOAD)


def _next_mover(seen: Observed, operation: Operation) -> MoverStatus:
    artifact = seen.artifact
    name = names.mover_name(artifact.metadata.uid, artifact.status.launches + 1)
    return MoverStatus.model_validate({"kind": seen.kind, "name": name, "operation": operation})


def _hold_back(seen: Observed, phase: Phase, reason: str, message: str, seconds: float | None, now: datetime) -> Decision:
    """Say why nothing is running, once."""
    status = say.held_back(seen.artifact, phase, reason, message, now)
    return Wait(seconds) if status == seen.artifact.status else Record(status, seconds=seconds)


def _plan_deletion(seen: Observed, policy: Policy, now: datetime) -> Decision:
    artifact = seen.artifact
    if names.FINALIZER not in artifact.metadata.finalizers:
        return Wait(None)
    abandoned = artifact.metadata.annotations.get(names.ANNOTATION_ABANDON_DATA) == "true"
    uploading = artifact.status.mover is None or artifact.status.mover.operation == "Upload"
    match seen.mover:
        case RunningMover(stopping=None) if uploading or abandoned:
            return Stop(StopReason.DELETED)
        case RunningMover(stopping=None, moved_at=moved_at):
            idle = (now - moved_at).total_seconds()
            return Stop(StopReason.NO_PROGRESS) if idle >= policy.no_progress else Wait(policy.no_progress - idle)
        case RunningMover():
            return Wait(LOOK_AGAIN)
        case EarlierMover() if not abandoned:
            return _say_deleting(seen, "a mover of an earlier operator is still running", EARLIER_MOVER_POLL, now)
    if abandoned:
        return RemoveFinalizer(Event("DataAbandoned", "the data was left where it is, as the annotation asks", warning=True))
    match seen.mover:
        case FinishedMover(result=result) as mover if not uploading:
            if result and result.deleted is not None:
                return RemoveFinalizer(Event("Cleaned", result.deleted))
            return _retry_deletion(seen, _failure_of(mover, policy), policy, now)
        case FinishedMover():
            # The upload ended (or was ended) under us; the deletion finds out itself what it had stored.
            return Record(say.deleting(artifact, "the upload was stopped", now), seconds=0, forget=True)
    if kept := _why_keep(seen, started=not uploading):
        return RemoveFinalizer(Event("DataKept", kept))
    if artifact.status.launches == artifact.status.clean_launches:
        return RemoveFinalizer()
    if seen.refusal:
        return _refused_deletion(seen, seen.refusal, now)
    retry_at = artifact.status.next_retry_time if artifact.status.phase == Phase.DELETING else None
    if retry_at and retry_at > now:
        return Wait((retry_at - now).total_seconds())
    if seen.blocked:
        return _say_deleting(seen, seen.blocked, LOOK_AGAIN, now)
    return Start(say.deletion_started(artifact, _next_mover(seen, Operation.DELETE), now), Operation.DELETE)


def _why_keep(seen: Observed, *, started: bool) -> str | None:
    """Why stored data stays; None where there is something to remove, or to find out.

    ``started``: a mover for the deletion ran already. Then the policy that it was started under holds, since half of the
    data may be gone; but another artifact that became Ready meanwhile has seen the checkpoint whole, so it still is.
    """
    artifact = seen.artifact
    where = artifact.status.storage_uri or artifact.spec.target.uri
    if artifact.status.storage_uri is not None:
        if artifact.spec.deletion_policy is DeletionPolicy.RETAIN and not started:
            return f"{where} was kept (deletionPolicy: Retain)"
        if artifact.status.data_owner is False:
            return f"{where} was kept: another artifact has stored it"
    if seen.also_stored_by:
        return f"{where} was kept: {seen.also_stored_by} names it too"
    return None


def _say_deleting(seen: Observed, message: str, seconds: float, now: datetime) -> Decision:
    status = say.deleting(seen.artifact, message, now)
    return Wait(seconds) if status == seen.artifact.status else Record(status, seconds=seconds)


def _retry_deletion(seen: Observed, failure: Failure, policy: Policy, now: datetime) -> Decision:
    """A deletion is never given up: the object stays until its data is gone, or until a human abandons the data."""
    delay = backoff(seen.artifact.metadata.uid, seen.artifact.status.retries + 1, policy)
    status = say.deleting(
        seen.artifact, _with_way_out(failure.message), now, failure=failure, retry_at=now + timedelta(seconds=delay)
    )
    before = seen.artifact.status.failure
    event: Event | None = Event("DeletionFailed", _with_way_out(failure.message), warning=True)
    if before and before.reason == failure.reason and seen.artifact.status.phase == Phase.DELETING:
        event = None
    return Record(status, event, seconds=delay, forget=True)


def _refused_deletion(seen: Observed, refusal: Failure, now: datetime) -> Decision:
    message = _with_way_out(refusal.message)
    before = seen.artifact.status
    if before.phase == Phase.DELETING and before.failure and before.failure.reason == refusal.reason:
        return Wait(REFUSED_DELETION_POLL)
    status = say.deleting(seen.artifact, message, now, failure=refusal)
    return Record(status, Event("DeletionFailed", message, warning=True), seconds=REFUSED_DELETION_POLL)


def _with_way_out(message: str) -> str:
    return f"{message}; to delete the object and leave the data, annotate it with {names.ANNOTATION_ABANDON_DATA}=true"
