"""What to do about one artifact, decided from what is there now and nothing else. Pure; the clock is an argument.

Checks stand in a row; the first one that has something to say decides. What a decision needs is in it.
"""

from dataclasses import replace
from datetime import datetime, timedelta

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import Reason, Retry
from checkpoint_operator.api.protocol import Failure, Operation, Progress
from checkpoint_operator.api.spec import Readiness
from checkpoint_operator.api.status import Phase
from checkpoint_operator.controller import status as say
from checkpoint_operator.controller.decisions import (
    EARLIER_MOVER_POLL,
    LOOK_AGAIN,
    LOST_FACTOR,
    AddFinalizer,
    Decision,
    Event,
    Observed,
    Policy,
    Prepare,
    Record,
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
from checkpoint_operator.controller.plan_deletion import plan_deletion


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
        return plan_deletion(seen, policy, now)
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


def _plan_failed(seen: Observed, now: datetime) -> Decision:
    artifact = seen.artifact
    asked = retry_asked(artifact.metadata.annotations)
    # What may be changed in a spec is what may cure: a Secret's name, the mover's memory. So a change is a request too.
    changed = artifact.status.observed_generation != artifact.metadata.generation
    if changed or new_request(artifact):
        return Record(say.revived(artifact, asked, now), seconds=0, forget=isinstance(seen.mover, FinishedMover))
    return Wait(None)


def _plan_running(seen: Observed, mover: RunningMover, policy: Policy, now: datetime) -> Decision:
    artifact = seen.artifact
    if mover.stopping:
        return Wait(LOOK_AGAIN)
    if artifact.spec.suspend:
        return Stop(StopReason.SUSPENDED)
    idle = idle_seconds(mover, now)
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


def _plan_pending(seen: Observed, mover: PendingMover, now: datetime) -> Decision:
    artifact = seen.artifact
    if artifact.spec.suspend:
        return Stop(StopReason.SUSPENDED)
    # Its Job is as it was made: what a human changed, or asks for, needs another one. Nothing is lost, it never ran.
    if artifact.status.observed_generation != artifact.metadata.generation or new_request(artifact):
        return Stop(StopReason.REPLANNED)
    match trouble_of(mover, now):
        case Stop() | Wait() as decision:
            return decision
        case (reason, message):
            status = say.held_back(artifact, Phase.WAITING, reason, message, now)
            return Wait(LOOK_AGAIN) if status == artifact.status else Record(status, seconds=LOOK_AGAIN)


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
    return _plan_after_failure(seen, failure_of(mover, policy), policy, now)


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
    asked = new_request(artifact)
    # A change may be what cures: more memory for a mover that had too little.
    changed = before.observed_generation != artifact.metadata.generation
    if (retry_at := before.next_retry_time) and before.phase == Phase.WAITING and retry_at > now and not (asked or changed):
        return Wait((retry_at - now).total_seconds())
    if mover.unseen and before.failure and before.failure.reason == Reason.EARLIER_MOVER_NOT_GONE:
        return _hold_back(seen, Phase.WAITING, Reason.EARLIER_MOVER_NOT_GONE, not_gone(mover.unseen), LOOK_AGAIN, now)
    if before.lost >= LOST_FACTOR * policy.max_attempts:
        times = f"{before.lost} times in a row"
        failure = Failure(reason=Reason.MOVER_KILLED, message=f"the mover vanished together with the operator {times}")
        status = say.failed(artifact, failure, now, counts=False, ran=False)
        return Record(status, Event(failure.reason, failure.message, warning=True))
    if seen.blocked:
        return _hold_back(seen, Phase.QUEUED, "Queued", seen.blocked, seen.look_again, now)
    following = next_mover(seen, Operation.UPLOAD)
    match seen.preparation:
        case None:
            return Prepare(following.name, Operation.UPLOAD)
        case Held(reason, message):
            return _hold_back(seen, Phase.WAITING, reason, message, held_poll(artifact, now), now)
        case Failure() as failure:
            return _plan_unprepared(seen, failure, now)
        case Prepared():
            handled = retry_asked(artifact.metadata.annotations) if asked else before.retry_handled
            return Start(say.started(artifact, following, now, retry_handled=handled), Operation.UPLOAD)


def _plan_unprepared(seen: Observed, failure: Failure, now: datetime) -> Decision:
    """What the cluster does not allow to start (a user, a ServiceAccount) is for a human to change."""
    status = say.failed(seen.artifact, failure, now, counts=False, ran=False)
    return Record(status, Event(failure.reason, failure.message, warning=True))


def _hold_back(seen: Observed, phase: Phase, reason: str, message: str, seconds: float | None, now: datetime) -> Decision:
    """Say why nothing is running, once."""
    status = say.held_back(seen.artifact, phase, reason, message, now)
    return Wait(seconds) if status == seen.artifact.status else Record(status, seconds=seconds)
