"""Private memory for bodies, within a budget that holds for a whole transfer, however many threads it has."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap

from checkpoint_operator.storage.turn import TURN

_REUSED = 512 << 10
"""Larger buffers are kept for the next body: fresh memory costs the kernel a page fault for every 4 KiB. They are mapped and
not allocated: an allocator that has seen a few of them keeps the next ones for itself."""


class Buffers:
    """Lends buffers that hold at most ``budget`` bytes together; whoever asks for more than is left waits.

    A single buffer may exceed the budget: then it is the only one. Nobody may ask for a second one while holding one.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lent = 0
        self._kept: list[mmap] = []
        self._changed = threading.Condition()

    def take(self, size: int) -> memoryview:
        """A buffer of exactly this size, with anything in it; waits until the budget allows it."""
        with self._changed:
            if self._has_room(size):
                return self._lend(size)
        with TURN.let_go(), self._changed:
            self._changed.wait_for(lambda: self._has_room(size))
            return self._lend(size)

    def _has_room(self, size: int) -> bool:
        return not self._lent or self._lent + size <= self._budget

    def _lend(self, size: int) -> memoryview:
        self._lent += size
        if size < _REUSED:
            return memoryview(bytearray(size))
        fitting = next((kept for kept in self._kept if len(kept) == size), None)
        if fitting is not None:
            self._kept.remove(fitting)
        else:
            while self._kept and self._lent + sum(map(len, self._kept)) > self._budget:
                self._kept.pop()
            fitting = mmap(-1, size)
        return memoryview(fitting)

    def give(self, buffer: memoryview) -> None:
        """Hand a buffer back; nobody may look at it any more."""
        whole = buffer.obj
        with self._changed:
            self._lent -= len(buffer)
            if isinstance(whole, mmap):
                self._kept.append(whole)
            self._changed.notify_all()

    @contextmanager
    def lent(self, size: int) -> Iterator[memoryview]:
        """A buffer for the time of a block."""
        buffer = self.take(size)
        try:
            yield buffer
        finally:
            self.give(buffer)
