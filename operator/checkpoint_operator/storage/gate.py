"""How many requests one store gets at once: fewer when it says that they are too many, slowly more when it is calm again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

SLOW_DOWN = frozenset({429, 503})
"""The statuses by which a store says so, whatever its protocol: TooManyRequests, SlowDown, ServerBusy, backendError."""


class Gate:
    """How many requests may be under way at once: halved when the store says SlowDown, one more after each calm round."""

    def __init__(self, limit: int) -> None:
        self._most = self._limit = limit
        self._running = self._calm = 0
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        return self._limit

    @contextmanager
    def passed(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._running < self._limit)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify()

    def answered(self, status: int) -> None:
        """What the store said to one request."""
        if status in SLOW_DOWN:
            self.slow_down()
        else:
            self.went_well()

    def slow_down(self) -> None:
        with self._changed:
            self._limit, self._calm = max(1, self._limit // 2), 0

    def went_well(self) -> None:
        if self._limit == self._most:
            return
        with self._changed:
            self._calm += 1
            if self._calm >= 4 * self._limit:
                self._limit, self._calm = min(self._most, self._limit + 1), 0
                self._changed.notify()
