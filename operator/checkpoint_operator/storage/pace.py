"""Keeps an upload below so many bytes a second, so that the training has the volume and the network for itself."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.turn import TURN


@dataclass
class Pace:
    """One budget for all threads of an upload; None: no limit. Nothing is saved up, so there is never a burst.

    What is counted is what is read from the source for the first time. What is sent of that, or sent again after a failure,
    or read again for it (:mod:`.slices`), is not counted anew.
    """

    bytes_per_second: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free: float = float("-inf")
    """When the bytes that were granted so far will have taken their time."""

    def spend(self, size: int) -> None:
        """Wait until so many bytes may be read. Raises :class:`Cancelled` as soon as the event is set."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            now = self.clock()
            begins = max(self._free, now)
            self._free = begins + size / self.bytes_per_second
        with TURN.let_go():
            if begins > now and self.cancelled.wait(begins - now):
                raise Cancelled
