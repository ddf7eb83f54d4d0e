"""What the reconciler needs of whoever runs movers: Inline runs them as children, Jobs as pods of the cluster."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal, Protocol

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation, Progress, Result


class StopReason(StrEnum):
    """Why the operator itself stopped a mover; such an end is no failure of the mover."""

    SUSPENDED = "Suspended"
    DELETED = "Deleted"
    NO_PROGRESS = "NoProgress"
    SHUTDOWN = "Shutdown"
    REPLANNED = "Replanned"


@dataclass(frozen=True)
class NoMover:
    """Nothing runs that could be waited for: never started, or gone without a word.

    ``unseen``: an earlier mover (its pod and node) that may still run where nobody can see it. An upload may start beside
    it, since it joins; what needs the earlier mover to be gone (DESIGN §6) has to wait.
    """

    unseen: str | None = None


@dataclass(frozen=True)
class EarlierMover:
    """An earlier mover is still running, or still ending; what it is doing cannot be seen. It will be gone soon."""


@dataclass(frozen=True)
class PendingMover:
    """It was started, and does not run yet. ``reason`` None: it takes its time, nothing is known to be wrong.

    ``pinned``: it may run on one node only, where the claim is in use. ``patient``: somebody else decides when it starts
    (a queue), and another one would only have to wait longer. ``uid``: of the Job, where it is one; so below.
    """

    since: datetime
    reason: Reason | None = None
    message: str = ""
    pinned: bool = False
    patient: bool = False
    uid: str | None = None


@dataclass(frozen=True)
class RunningMover:
    """``moved_at``: when it last settled a byte or changed its stage; None: that cannot be seen.

    ``stopping``: it was asked to stop.
    """

    progress: Progress | None
    moved_at: datetime | None
    stopping: StopReason | None = None
    uid: str | None = None


@dataclass(frozen=True)
class FinishedMover:
    """It has ended. ``result`` is None where it died before it could say one; ``exit_code`` is negative for a signal.

    ``failure``: what was seen from outside (out of memory, its node was drained), where that says more than the code.
    ``ran``: False where it certainly never came to run, so that it left nothing to clean up.
    """

    exit_code: int
    result: Result | None
    stopped: StopReason | None = None
    failure: Failure | None = None
    ran: bool = True
    uid: str | None = None


MoverState = NoMover | EarlierMover | PendingMover | RunningMover | FinishedMover


@dataclass(frozen=True)
class Held:
    """A mover cannot start now, and nothing is wrong with the artifact; it is looked at again, no attempt is counted."""

    reason: str
    message: str


@dataclass(frozen=True)
class Prepared:
    """A mover may start. ``run_as_user``: as whom, where the executor chose; the next one may have to be the same."""

    run_as_user: int | None = None


Preparation = Prepared | Held | Failure


@dataclass(frozen=True)
class Notice:
    """What a start met that people should hear of."""

    reason: str
    message: str


class Executor(Protocol):
    """Starts, watches and stops movers. One artifact has at most one mover; names are given by the caller.

    For each look at an artifact the reconciler calls :meth:`look`, then decides by :meth:`state`. A start is
    :meth:`prepare`, then the name goes into the status, then :meth:`start`.

    Raises:
        KubeError: any of the coroutines, where the API server cannot be asked; all of it may be repeated.
    """

    @property
    def kind(self) -> Literal["Inline", "Job"]:
        """For ``status.mover.kind``."""

    async def resync(self) -> None:
        """Find out anew which movers there are: before anything is decided, and every few minutes."""

    def artifacts(self) -> Collection[tuple[str, str]]:
        """(namespace, name) of every artifact that a mover is known for."""

    def refuse(self, artifact: CheckpointArtifact) -> Failure | None:
        """Why this artifact cannot be served here, or None. Asked before every start, so that configuration may change."""

    def place(self, artifact: CheckpointArtifact) -> str:
        """A name for what the artifact writes to: two artifacts with the same one must not run at once."""

    async def look(self, artifact: CheckpointArtifact) -> None:
        """Read live what :meth:`state` should not believe a cache for."""

    def state(self, artifact: CheckpointArtifact) -> MoverState:
        """What is known of the artifact's mover now. No I/O."""

    async def prepare(self, name: str, artifact: CheckpointArtifact, operation: Operation) -> Preparation:
        """Whether the mover of this name could start now. Changes nothing in the cluster."""

    async def start(self, name: str, artifact: CheckpointArtifact, operation: Operation, now: datetime) -> Notice | None:
        """Start the mover that was prepared; one of that name that runs already is adopted."""

    async def stop(self, name: str, artifact: CheckpointArtifact, reason: StopReason) -> None:
        """Ask a mover to stop; its end is reported like any other."""

    async def stop_others(self, key: tuple[str, str], uid: str | None) -> bool:
        """Stop the movers of this name that belong to another object: theirs was deleted, finalizer or not.

        True while one of them is still running.
        """

    async def forget(self, key: tuple[str, str], uid: str, name: str | None = None) -> None:
        """The status has what the finished mover said: drop it. Without ``name``: whatever the artifact had started."""
