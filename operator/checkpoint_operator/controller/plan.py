"""What to do about one artifact, decided from what is there now and nothing else. Pure; the clock is an argument.

Checks stand in a row; the first one that has something to say decides. What a decision needs is in it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.conditions import ConditionType, find_condition
from checkpoint_operator.api.errors import Reason, Retry, reason_for_exit
from checkpoint_operator.api.protocol import Failure, Operation, Progress
from checkpoint_operator.api.spec import DeletionPolicy, Readiness
from checkpoint_operator.api.status import ArtifactStatus, MoverStatus, Phase
from checkpoint_operator.controller import status as say
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

LOOK_AGAIN = 60.0
"""Seconds after which something is looked at again although an event should tell: events can be missed."""
EARLIER_MOVER_POLL = 2.0
REFUSED_DELETION_POLL = 60.0
PENDING_PATIENCE = 10.0
"""Seconds for which a mover that cannot start is given the benefit of the doubt: schedulers and quotas take a moment."""
STARTING_PATIENCE = 60.0
"""Seconds after which a mover that just does not start, for no known reason, is spoken of."""
PINNED_PATIENCE = 60.0
"""Seconds after which a mover that found no room on the one node that it was bound to is planned anew: the claim may have
moved on."""
REPLAN_AFTER = 600.0
"""Seconds after which a mover that cannot start is made anew: a Job keeps the image and the resources of its first day."""
HELD_POLL_MIN, HELD_POLL_MAX = 5.0, 60.0
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

    ``blocked``: why no mover may start now (caps, same target); ``look_again``: seconds after which to ask anew, although
    whoever gets a place is woken. ``refusal``: why the configuration does not allow this
    artifact. ``also_stored_by``: another Ready artifact that names the same stored data. ``preparation``: what came of the
    :class:`Prepare` that was decided on this very state; None before.
    ``namespace_terminating``: asked for only where the next step may be to remove data.
    """

    artifact: CheckpointArtifact
    mover: MoverState
    kind: str = "Inline"
    blocked: str | None = None
    refusal: Failure | None = None
    also_stored_by: str | None = None
    look_again: float = LOOK_AGAIN
    namespace_terminating: bool = False
    preparation: Preparation | None = None


@dataclass(frozen=True)
class Event:
    """What is said to whoever runs ``kubectl describe``.

    ``of_namespace``: it is said about the artifact's namespace, where it can be heard after that is gone.
    """

    reason: str
    message: str
    warning: bool = False
    of_namespace: bool = False


@dataclass(frozen=True)
class Wait:
    """There is nothing to do; look again after so many seconds (None: an event will tell)."""

    seconds: float | None


@dataclass(frozen=True)
class AddFinalizer:
    """Before anything is stored, so that nothing stored is ever forgotten."""


@dataclass(frozen=True)
class ReleaseDependents:
    """Undo a foreground deletion: under it the garbage collector deletes what the artifact owns, and so the very mover that
    removes its data."""


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
class Prepare:
    """Find out whether the mover of this name could start; then decide once more. Changes nothing."""

    name: str
    operation: Operation


@dataclass(frozen=True)
class Start:
    """Write the status, then start the mover that it names."""

    status: ArtifactStatus
    operation: Operation


@dataclass(frozen=True)
class Stop:
    """Ask the running mover to stop; its end will be reported."""

    reason: StopReason


Decision = Wait | AddFinalizer | ReleaseDependents | RemoveFinalizer | Record | Prepare | Start | Stop


def plan(seen: Observed, policy: Policy, now: datetime) -> Decision:
    """Decide the one next step."""
    decision = _decide(seen, policy, now)
    if isinstance(decision, Record) and (mover := decision.status.mover) is not None:
        if not isinstance(seen.mover, NoMover | EarlierMover) and seen.mover.uid:
            mover = mover.replace(uid=seen.mover.uid)
        if decision.forget:
            # Were the operator to die before it forgets the mover, the next one must not take its words for news.
            mover = mover.replace(done=True)
        return replace(decision, status=decision.status.replace(mover=mover))
    return decision


def _decide(seen: Observed, policy: Policy, now: datetime) -> Decision:
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
        case PendingMover() as mover:
            return _plan_pending(seen, mover, now)
        case EarlierMover():
            return _hold_back(
                seen,
                Phase.WAITING,
                Reason.EARLIER_MOVER_NOT_GONE,
                "an earlier mover of this artifact is still running; it stops by itself",
                EARLIER_MOVER_POLL,
                now,
            )
        case NoMover() as mover:
            return _plan_start(seen, mover, policy, now)


def _plan_ready(seen: Observed) -> Decision:
    forget = isinstance(seen.mover, FinishedMover)
    if forget or seen.artifact.status.observed_generation != seen.artifact.metadata.generation:
        return Record(say.observed(seen.artifact), forget=forget)
    return Wait(None)


def retry_asked(annotations: Mapping[str, str]) -> str | None:
    """The value of the retry annotation, as much of it as the status can keep."""
    asked = annotations.get(names.ANNOTATION_RETRY)
    return asked[:RETRY_MAX] if asked is not None else None


def _new_request(artifact: CheckpointArtifact) -> bool:
    """Whether a human asks for another try, and was not heard yet."""
    asked = retry_asked(artifact.metadata.annotations)
    return asked is not None and asked != artifact.status.retry_handled


def _plan_failed(seen: Observed, now: datetime) -> Decision:
    artifact = seen.artifact
    asked = retry_asked(artifact.metadata.annotations)
    # What may be changed in a spec is what may cure: a Secret's name, the mover's memory. So a change is a request too.
    changed = artifact.status.observed_generation != artifact.metadata.generation
    if changed or _new_request(artifact):
        return Record(say.revived(artifact, asked, now), seconds=0, forget=isinstance(seen.mover, FinishedMover))
    return Wait(None)


def _plan_running(seen: Observed, mover: RunningMover, policy: Policy, now: datetime) -> Decision:
    artifact = seen.artifact
    if mover.stopping:
        return Wait(LOOK_AGAIN)
    if artifact.spec.suspend:
        return Stop(StopReason.SUSPENDED)
    idle = _idle(mover, now)
    if idle >= policy.no_progress:
        return Stop(StopReason.NO_PROGRESS)
    if artifact.status.phase not in (Phase.UPLOADING, Phase.VERIFYING):
        # It had trouble to start, and that was said.
        return Record(say.running(artifact, now), seconds=0)
    if mover.progress and _is_news(artifact, mover.progress):
        last = artifact.status.progress.last_update_time if artifact.status.progress else None
        due = (last + timedelta(seconds=policy.progress_every) - now).total_seconds() if last else 0.0
        if due <= 0:
            return Record(say.progressed(artifact, mover.progress, now), seconds=policy.no_progress - idle)
        return Wait(due)
    return Wait(min(LOOK_AGAIN, policy.no_progress - idle))


def _idle(mover: RunningMover, now: datetime) -> float:
    """Seconds since it moved anything; 0 where nobody can see that."""
    return (now - mover.moved_at).total_seconds() if mover.moved_at else 0.0


def _plan_pending(seen: Observed, mover: PendingMover, now: datetime) -> Decision:
    artifact = seen.artifact
    if artifact.spec.suspend:
        return Stop(StopReason.SUSPENDED)
    # Its Job is as it was made: what a human changed, or asks for, needs another one. Nothing is lost, it never ran.
    if artifact.status.observed_generation != artifact.metadata.generation or _new_request(artifact):
        return Stop(StopReason.REPLANNED)
    match _trouble_of(mover, now):
        case Stop() | Wait() as decision:
            return decision
        case (reason, message):
            status = say.held_back(artifact, Phase.WAITING, reason, message, now)
            return Wait(LOOK_AGAIN) if status == artifact.status else Record(status, seconds=LOOK_AGAIN)


def _trouble_of(mover: PendingMover, now: datetime) -> Stop | Wait | tuple[Reason, str]:
    """What is to be said of a mover that does not start, and of when that is too long."""
    age = (now - mover.since).total_seconds()
    if mover.reason is Reason.UNSCHEDULABLE and mover.pinned and age >= PINNED_PATIENCE:
        return Stop(StopReason.REPLANNED)
    if age >= REPLAN_AFTER and not mover.patient:
        return Stop(StopReason.REPLANNED)
    patience = PENDING_PATIENCE if mover.reason else STARTING_PATIENCE
    if age < patience:
        return Wait(patience - age)
    return mover.reason or Reason.MOVER_NOT_STARTED, mover.message


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
        status = say.stopped(artifact, mover.stopped, message, now, ran=mover.ran)
        return Record(status, seconds=0, forget=True)
    return _plan_after_failure(seen, _failure_of(mover, policy), policy, now)


def _failure_of(mover: FinishedMover, policy: Policy) -> Failure:
    if mover.stopped is StopReason.NO_PROGRESS:
        return Failure(
            reason=Reason.NO_PROGRESS, message=f"the mover moved nothing for {policy.no_progress:.0f} s and was stopped"
        )
    if mover.result and mover.result.failure:
        return mover.result.failure
    if mover.failure:
        return mover.failure
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
        case Retry.OUTAGE | Retry.HELD:
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


def _plan_start(seen: Observed, mover: NoMover, policy: Policy, now: datetime) -> Decision:
    artifact, before = seen.artifact, seen.artifact.status
    if artifact.spec.suspend:
        return _hold_back(seen, Phase.SUSPENDED, "Suspended", "spec.suspend is true", None, now)
    if seen.refusal:
        status = say.failed(artifact, seen.refusal, now, counts=False, ran=False)
        return Record(status, Event(seen.refusal.reason, seen.refusal.message, warning=True))
    job = before.mover if before.mover and before.mover.kind == "Job" and not before.mover.done else None
    if job and before.phase in (Phase.UPLOADING, Phase.VERIFYING):
        # An operator ended between the status and the Job; or somebody deleted it while there was no operator.
        gone = Failure(reason=Reason.MOVER_DISRUPTED, message=f"there is no Job {job.name} (any more); another one is made")
        return _plan_after_failure(seen, gone, policy, now)
    asked = _new_request(artifact)
    if (retry_at := before.next_retry_time) and before.phase == Phase.WAITING and retry_at > now and not asked:
        return Wait((retry_at - now).total_seconds())
    if mover.unseen and before.failure and before.failure.reason == Reason.EARLIER_MOVER_NOT_GONE:
        return _hold_back(seen, Phase.WAITING, Reason.EARLIER_MOVER_NOT_GONE, _not_gone(mover.unseen), LOOK_AGAIN, now)
    if before.lost >= LOST_FACTOR * policy.max_attempts:
        times = f"{before.lost} times in a row"
        failure = Failure(reason=Reason.MOVER_KILLED, message=f"the mover vanished together with the operator {times}")
        status = say.failed(artifact, failure, now, counts=False, ran=False)
        return Record(status, Event(failure.reason, failure.message, warning=True))
    if seen.blocked:
        return _hold_back(seen, Phase.QUEUED, "Queued", seen.blocked, seen.look_again, now)
    following = _next_mover(seen, Operation.UPLOAD)
    match seen.preparation:
        case None:
            return Prepare(following.name, Operation.UPLOAD)
        case Held(reason, message):
            return _hold_back(seen, Phase.WAITING, reason, message, _held_poll(artifact, now), now)
        case Failure() as failure:
            return _plan_unprepared(seen, failure, now)
        case Prepared():
            handled = retry_asked(artifact.metadata.annotations) if asked else before.retry_handled
            return Start(say.started(artifact, following, now, retry_handled=handled), Operation.UPLOAD)


def _plan_unprepared(seen: Observed, failure: Failure, now: datetime) -> Decision:
    """What the cluster does not allow to start (a user, a ServiceAccount) is for a human to change."""
    status = say.failed(seen.artifact, failure, now, counts=False, ran=False)
    return Record(status, Event(failure.reason, failure.message, warning=True))


def _held_poll(artifact: CheckpointArtifact, now: datetime) -> float:
    """Seconds: claims and pods are not watched. Who waits for days is not asked for every few seconds."""
    ready = find_condition(artifact.status.conditions, ConditionType.READY)
    held = (now - ready.last_transition_time).total_seconds() if ready else 0.0
    return min(max(HELD_POLL_MIN, held / 10), HELD_POLL_MAX)


def _not_gone(unseen: str) -> str:
    return (
        f"an earlier mover may still be running: {unseen}; it goes on when that node answers, is deleted, or is tainted "
        "node.kubernetes.io/out-of-service"
    )


def _next_mover(seen: Observed, operation: Operation) -> MoverStatus:
    artifact = seen.artifact
    name = names.mover_name(artifact.metadata.uid, artifact.status.launches + 1)
    user = seen.preparation.run_as_user if isinstance(seen.preparation, Prepared) else None
    return MoverStatus.model_validate({"kind": seen.kind, "name": name, "operation": operation, "runAsUser": user})


def _hold_back(seen: Observed, phase: Phase, reason: str, message: str, seconds: float | None, now: datetime) -> Decision:
    """Say why nothing is running, once."""
    status = say.held_back(seen.artifact, phase, reason, message, now)
    return Wait(seconds) if status == seen.artifact.status else Record(status, seconds=seconds)


def _plan_deletion(seen: Observed, policy: Policy, now: datetime) -> Decision:
    artifact = seen.artifact
    if names.FINALIZER not in artifact.metadata.finalizers:
        return Wait(None)
    if names.FOREGROUND_DELETION in artifact.metadata.finalizers:
        return ReleaseDependents()
    abandoned = artifact.metadata.annotations.get(names.ANNOTATION_ABANDON_DATA) == "true"
    uploading = artifact.status.mover is None or artifact.status.mover.operation == "Upload"
    match seen.mover:
        case PendingMover() | RunningMover(stopping=None) if uploading or abandoned:
            return Stop(StopReason.DELETED)
        case PendingMover() as pending:
            return _plan_pending_deletion(seen, pending, now)
        case RunningMover(stopping=None) as running:
            idle = _idle(running, now)
            return Stop(StopReason.NO_PROGRESS) if idle >= policy.no_progress else Wait(policy.no_progress - idle)
        case RunningMover():
            return Wait(LOOK_AGAIN)
        case EarlierMover() if not abandoned:
            return _say_deleting(seen, "an earlier mover of this artifact is still running", EARLIER_MOVER_POLL, now)
    if abandoned:
        return RemoveFinalizer(Event("DataAbandoned", "the data was left where it is, as the annotation asks", warning=True))
    match seen.mover:
        case FinishedMover(result=result) as mover if not uploading:
            if result and result.deleted is not None:
                return RemoveFinalizer(Event("Cleaned", result.deleted))
            if mover.stopped is StopReason.REPLANNED:
                status = say.deleting(artifact, "the mover could not start, another one is planned", now)
                return Record(status, seconds=0, forget=True)
            return _retry_deletion(seen, _failure_of(mover, policy), policy, now)
        case FinishedMover(ran=ran):
            # The upload ended (or was ended) under us; the deletion finds out itself what it had stored.
            return Record(say.deleting(artifact, "the upload was stopped", now, ran=ran), seconds=0, forget=True)
    if kept := _why_keep(seen, started=not uploading):
        return RemoveFinalizer(Event("DataKept", kept))
    if artifact.status.launches == artifact.status.clean_launches:
        return RemoveFinalizer()
    if seen.namespace_terminating:
        # Nobody who deletes a namespace meant the checkpoints in a store; and no mover could be created there any more.
        where = artifact.status.storage_uri or artifact.spec.target.uri
        message = f"{artifact.metadata.name}: {where} was left as it is, since a whole namespace is being deleted"
        return RemoveFinalizer(Event("DataKept", message, warning=True, of_namespace=True))
    if isinstance(seen.mover, NoMover) and seen.mover.unseen:
        message = _with_way_out(_not_gone(seen.mover.unseen))
        return _say_deleting(seen, message, LOOK_AGAIN, now, Reason.EARLIER_MOVER_NOT_GONE)
    if seen.refusal:
        return _refused_deletion(seen, seen.refusal, now)
    retry_at = artifact.status.next_retry_time if artifact.status.phase == Phase.DELETING else None
    asked = _new_request(artifact)
    if retry_at and retry_at > now and not asked:
        return Wait((retry_at - now).total_seconds())
    if seen.blocked:
        return _say_deleting(seen, seen.blocked, seen.look_again, now)
    following = _next_mover(seen, Operation.DELETE)
    match seen.preparation:
        case None:
            return Prepare(following.name, Operation.DELETE)
        case Held(reason, message):
            return _say_deleting(seen, _with_way_out(message), _held_poll(artifact, now), now, reason)
        case Failure() as failure:
            return _refused_deletion(seen, failure, now)
        case Prepared():
            handled = retry_asked(artifact.metadata.annotations) if asked else artifact.status.retry_handled
            return Start(say.deletion_started(artifact, following, now, retry_handled=handled), Operation.DELETE)


def _plan_pending_deletion(seen: Observed, mover: PendingMover, now: datetime) -> Decision:
    if _new_request(seen.artifact):
        return Stop(StopReason.REPLANNED)
    match _trouble_of(mover, now):
        case Stop() | Wait() as decision:
            return decision
        case (reason, message):
            return _say_deleting(seen, _with_way_out(message), LOOK_AGAIN, now, reason)


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


def _say_deleting(seen: Observed, message: str, seconds: float, now: datetime, reason: str = "Deleting") -> Decision:
    status = say.deleting(seen.artifact, message, now, reason=reason)
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
