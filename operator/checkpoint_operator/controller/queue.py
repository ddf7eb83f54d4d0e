"""One keyed work queue: a key is worked on by one worker at a time, however many events came for it.

The semantics are client-go's (``util/workqueue``): adding a waiting key does nothing, adding a key that is being worked on
puts it back when the worker is done, a delayed add keeps the earliest time. Nothing is lost and nothing runs twice at once.
"""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class WorkQueue(Generic[Key]):
    """See the module. Belongs to one event loop; every method but :meth:`get` returns at once.

    ``backoff`` and ``backoff_max`` (seconds) are for :meth:`retry`, which is for errors of our own; failures of movers have
    their backoff in the status, where it survives a restart.
    """

    def __init__(self, *, backoff: float = 1.0, backoff_max: float = 300.0) -> None:
        self._backoff = backoff
        self._backoff_max = backoff_max
        self._ready: dict[Key, None] = {}  # a dict keeps the order of insertion
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._wakeup = asyncio.Event()

    def add(self, key: Key) -> None:
        """Have the key worked on as soon as a worker is free; a delayed add of it is no longer needed."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._working:
            self._again.add(key)
        else:
            self._ready[key] = None
            self._wakeup.set()

    def add_after(self, key: Key, delay: float) -> None:
        """Have the key worked on in ``delay`` seconds, or earlier if it is asked for earlier."""
        if delay <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + delay
        if (timer := self._timers.get(key)) and timer.when() <= due:
            return
        if timer:
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._fire, key)

    def _fire(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def retry(self, key: Key) -> float:
        """Have a key whose work failed worked on again, later each time; the delay in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(self._backoff * 2.0 ** min(failures - 1, 30), self._backoff_max)
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """The key's work succeeded: its next failure starts with the shortest delay again."""
        self._failures.pop(key, None)

    async def get(self) -> Key:
        """Wait for a key. The caller must call :meth:`done` with it, whatever happens."""
        while not self._ready:
            self._wakeup.clear()
            await self._wakeup.wait()
        key = next(iter(self._ready))
        del self._ready[key]
        self._working.add(key)
        return key

    def done(self, key: Key) -> None:
        """The work on a key has ended; what was added meanwhile comes up now."""
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
        elif self._ready:
            self._wakeup.set()

    def __len__(self) -> int:
        return len(self._ready) + len(self._working) + len(self._timers)
