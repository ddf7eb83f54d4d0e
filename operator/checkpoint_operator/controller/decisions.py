"""What can be seen of one artifact, what can be decided about it, and the measures that every plan takes. Pure."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.conditions import ConditionType, find_condition
from checkpoint_operator.api.errors import Reason, reason_for_exit
from checkpoint_operator.api.protocol import Failure, Operation
from checkpoint_operator.api.status import ArtifactStatus, MoverStatus
from checkpoint_operator.controller.executor import (
    FinishedMover,
    MoverState,
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


def retry_asked(annotations: Mapping[str, str]) -> str | None:
    """The value of the retry annotation, as much of it as the status can keep."""
    asked = annotations.get(names.ANNOTATION_RETRY)
    return asked[:RETRY_MAX] if asked is not None else None


def new_request(artifact: CheckpointArtifact) -> bool:
    """Whether a human asks for another try, and was not heard yet."""
    asked = retry_asked(artifact.metadata.annotations)
    return asked is not None and asked != artifact.status.retry_handled


def idle_seconds(mover: RunningMover, now: datetime) -> float:
    """Seconds since it moved anything; 0 where nobody can see that."""
    return (now - mover.moved_at).total_seconds() if mover.moved_at else 0.0


def trouble_of(mover: PendingMover, now: datetime) -> Stop | Wait | tuple[Reason, str]:
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


def failure_of(mover: FinishedMover, policy: Policy) -> Failure:
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


def backoff(uid: str, failures: int, policy: Policy) -> float:
    """Seconds before the next try: doubling, capped, spread by up to a fifth so that a thousand artifacts that met the
    same outage do not come back at the same second. Deterministic, so that a restart does not change it."""
    delay = min(policy.backoff * 2.0 ** min(failures - 1, 30), policy.backoff_max)
    spread = hashlib.sha256(f"{uid}/{failures}".encode()).digest()[0] / 255
    return delay * (1 - 0.2 * spread)


def held_poll(artifact: CheckpointArtifact, now: datetime) -> float:
    """Seconds: claims and pods are not watched. Who waits for days is not asked for every few seconds."""
    ready = find_condition(artifact.status.conditions, ConditionType.READY)
    held = (now - ready.last_transition_time).total_seconds() if ready else 0.0
    return min(max(HELD_POLL_MIN, held / 10), HELD_POLL_MAX)


def not_gone(unseen: str) -> str:
    return (
        f"an earlier mover may still be running: {unseen}; it goes on when that node answers, is deleted, or is tainted "
        "node.kubernetes.io/out-of-service"
    )


def next_mover(seen: Observed, operation: Operation) -> MoverStatus:
    artifact = seen.artifact
    name = names.mover_name(artifact.metadata.uid, artifact.status.launches + 1)
    user = seen.preparation.run_as_user if isinstance(seen.preparation, Prepared) else None
    return MoverStatus.model_validate({"kind": seen.kind, "name": name, "operation": operation, "runAsUser": user})
