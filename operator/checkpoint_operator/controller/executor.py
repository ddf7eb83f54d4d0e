"""What the reconciler needs of whoever runs movers; Inline implements it, and the Job executor will."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal, Protocol

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.protocol import Failure, Operation, Progress, Result


class StopReason(StrEnum):
    """Why the operator itself stopped a mover; such an end is no failure of the mover."""

    SUSPENDED = "Suspended"
    DELETED = "Deleted"
    NO_PROGRESS = "NoProgress"
    SHUTDOWN = "Shutdown"


@dataclass(frozen=True)
class NoMover:
    """Nothing is known of the mover, and none can be running: never started, or gone without a word."""


@dataclass(frozen=True)
class EarlierMover:
    """A mover that an earlier operator started is still running; what it is doing cannot be seen."""


@dataclass(frozen=True)
class RunningMover:
    """``moved_at``: when it last settled a byte or changed its stage. ``stopping``: it was asked to stop."""

    progress: Progress | None
    moved_at: datetime
    stopping: StopReason | None = None


@dataclass(frozen=True)
class FinishedMover:
    """It has ended. ``result`` is None where it died before it could say one; ``exit_code`` is negative for a signal."""

    exit_code: int
    result: Result | None
    stopped: StopReason | None = None


MoverState = NoMover | EarlierMover | RunningMover | FinishedMover


class Executor(Protocol):
    """Starts, watches and stops movers. One artifact has at most one mover; names are given by the caller."""

    @property
    def kind(self) -> Literal["Inline", "Job"]:
        """For ``status.mover.kind``."""

    def refuse(self, artifact: CheckpointArtifact) -> Failure | None:
        """Why this artifact cannot be served here, or None. Asked before every start, so that configuration may change."""

    def place(self, artifact: CheckpointArtifact) -> str:
        """A name for what the artifact writes to: two artifacts with the same one must not run at once."""

    def state(self, name: str | None, uid: str) -> MoverState:
        """What is known of a mover now. No I/O that waits."""

    async def start(self, name: str, artifact: CheckpointArtifact, operation: Operation, now: datetime) -> None:
        """Start a mover; one of that name that runs already is adopted."""

    def stop(self, name: str, reason: StopReason) -> None:
        """Ask a mover to stop; its end is reported like any other."""

    def stop_others(self, key: tuple[str, str], uid: str | None) -> bool:
        """Stop the movers of this name that belong to another object: theirs was deleted, finalizer or not.

        True while one of them is still running.
        """

    def forget(self, name: str) -> None:
        """The status has what the finished mover said: drop it."""
