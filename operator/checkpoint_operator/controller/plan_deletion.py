"""What becomes of an artifact that is being deleted, and of what it stored. Pure; see :mod:`.plan`."""

from datetime import datetime, timedelta

from checkpoint_operator.api import names
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation
from checkpoint_operator.api.spec import DeletionPolicy
from checkpoint_operator.api.status import Phase
from checkpoint_operator.controller import status as say
from checkpoint_operator.controller.decisions import (
    EARLIER_MOVER_POLL,
    LOOK_AGAIN,
    REFUSED_DELETION_POLL,
    Decision,
    Event,
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
    failure_of,
    held_poll,
    idle_seconds,
    new_request,
    next_mover,
    not_gone,
    retry_asked,
    trouble_of,
)
from checkpoint_operator.controller.executor import (
    EarlierMover,
    FinishedMover,
    Held,
    NoMover,
    PendingMover,
    Prepared,
    RunningMover,
    StopReason,
)


def plan_deletion(seen: Observed, policy: Policy, now: datetime) -> Decision:
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
            idle = idle_seconds(running, now)
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
            return _retry_deletion(seen, failure_of(mover, policy), policy, now)
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
        message = _with_way_out(not_gone(seen.mover.unseen))
        return _say_deleting(seen, message, LOOK_AGAIN, now, Reason.EARLIER_MOVER_NOT_GONE)
    if seen.refusal:
        return _refused_deletion(seen, seen.refusal, now)
    retry_at = artifact.status.next_retry_time if artifact.status.phase == Phase.DELETING else None
    asked = new_request(artifact)
    if retry_at and retry_at > now and not asked:
        return Wait((retry_at - now).total_seconds())
    if seen.blocked:
        return _say_deleting(seen, seen.blocked, seen.look_again, now)
    following = next_mover(seen, Operation.DELETE)
    match seen.preparation:
        case None:
            return Prepare(following.name, Operation.DELETE)
        case Held(reason, message):
            return _say_deleting(seen, _with_way_out(message), held_poll(artifact, now), now, reason)
        case Failure() as failure:
            return _refused_deletion(seen, failure, now)
        case Prepared():
            handled = retry_asked(artifact.metadata.annotations) if asked else artifact.status.retry_handled
            return Start(say.deletion_started(artifact, following, now, retry_handled=handled), Operation.DELETE)


def _plan_pending_deletion(seen: Observed, mover: PendingMover, now: datetime) -> Decision:
    if new_request(seen.artifact):
        return Stop(StopReason.REPLANNED)
    match trouble_of(mover, now):
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
