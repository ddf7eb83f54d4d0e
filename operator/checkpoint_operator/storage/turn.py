"""One thread at a time computes for small files, so that Python's lock changes hands now and then, not at each system call.

Of small files there are thousands, and each costs half a millisecond of Python between some system calls. At each of those
a thread lets go of the interpreter's lock and must get it back from others that want it as well; that cost as much again as
the work itself. Whoever has the turn goes on undisturbed to the point where it has to wait for the store, and with an upload
it has a handful of files on their way by then (``BATCH`` in :mod:`checkpoint_operator.storage.transfer`).

The interpreter has one lock, so the process has one turn. It protects nothing: code is right without it. But who has it must
not wait for another thread.
"""

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

SMALL = 96 << 10
"""Bytes of a body below which a turn is worth taking: above, the copies and hashes take longer than the handing over."""


class Turn:
    """Held by one thread while it computes (:meth:`taken`), and by none while it waits for others (:meth:`let_go`)."""

    def __init__(self) -> None:
        self.forget()
        self._taken, self._let_go, self._nothing = (
            _Scope(self._take, self._give),
            _Scope(self._give, self._take),
            nullcontext(),
        )

    def taken(self) -> AbstractContextManager[None]:
        """Wait for the turn and have it; nothing where this thread has it already, and nothing for the main thread.

        Into that one a Ctrl-C may break between any two lines, also between those that take a lock and that note it.
        """
        me = threading.get_ident()
        return self._nothing if me in (self._holder, threading.main_thread().ident) else self._taken

    def let_go(self) -> AbstractContextManager[None]:
        """For the time of a call that waits; nothing where this thread has no turn."""
        return self._let_go if self._holder == threading.get_ident() else self._nothing

    def forget(self) -> None:
        """In the child of a fork the thread that had the turn does not exist."""
        self._lock = threading.Lock()
        self._holder: int | None = None

    def _take(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def _give(self) -> None:
        self._holder = None
        self._lock.release()


class _Scope(AbstractContextManager[None]):
    """A block between two calls; a generator would cost more than what it brackets, eight times for each file."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._end()


TURN = Turn()
os.register_at_fork(after_in_child=TURN.forget)
