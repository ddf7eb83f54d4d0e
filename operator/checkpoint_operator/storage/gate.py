"""From how many threads one store gets requests at once: fewer when it says that they are too many, slowly more again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from checkpoint_operator.storage.turn import TURN

SLOW_DOWN = frozenset({429, 503})
"""The statuses by which a store says so, whatever its protocol: TooManyRequests, SlowDown, ServerBusy, backendError."""


class Gate:
    """How many threads may have requests under way: half as many when the store says SlowDown, one more after each calm
    round.

    A thread that is inside may enter again without waiting, and leaves as often: it has sent several small bodies before it
    reads the first answer, and others could be waiting for what it holds.
    """

    def __init__(self, limit: int) -> None:
        self._most = self._limit = limit
        self._calm = 0
        self.slowdowns = 0
        """How often the limit was halved by now."""
        self._inside: dict[int, int] = {}
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def is_free(self) -> bool:
        """Whether this thread may send right now without waiting, and one request more than it has under way already."""
        with self._changed:
            if threading.get_ident() in self._inside:
                return self._limit == self._most
            return len(self._inside) < self._limit

    def enter(self) -> None:
        """Wait until this thread may send a request; whoever waits lets go of the turn."""
        me = threading.get_ident()
        with self._changed:
            if me in self._inside or len(self._inside) < self._limit:
                self._inside[me] = self._inside.get(me, 0) + 1
                return
        with TURN.let_go(), self._changed:
            self._changed.wait_for(lambda: len(self._inside) < self._limit)
            self._inside[me] = 1

    def leave(self) -> None:
        """The answer to one request is there, or nobody waits for it any more."""
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                self._changed.notify()

    @contextmanager
    def passed(self) -> Iterator[None]:
        """For the time of one request."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def answered(self, status: int) -> None:
        """What the store said to one request."""
        if status in SLOW_DOWN:
            self.slow_down()
        else:
            self.went_well()

    def slow_down(self, since: int | None = None) -> None:
        """The store said so, to a request that was sent when there had been ``since`` slowdowns: of several that were under
        way together the first is heard."""
        with self._changed:
            if since is None or since == self.slowdowns:
                self._limit, self._calm = max(1, self._limit // 2), 0
                self.slowdowns += 1

    def went_well(self) -> None:
        if self._limit == self._most:
            return
        with self._changed:
            self._calm += 1
            if self._calm >= 4 * self._limit:
                self._limit, self._calm = min(self._most, self._limit + 1), 0
                self._changed.notify()
