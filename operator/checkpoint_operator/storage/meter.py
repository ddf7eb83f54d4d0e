"""Counts what a transfer has settled, from any thread, and says so once in a while."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpoint_operator.api.protocol import Progress, Stage
from checkpoint_operator.storage.turn import TURN


@dataclass
class Meter:
    """Counts what is settled, from any thread, and reports at most once a second (and at the end of each stage).

    What reports is somebody else's code, and may wait for whom it likes: it is called by one thread at a time, which has
    neither the turn nor what counting needs.
    """

    report: Callable[[Progress], None] | None = None
    clock: Callable[[], float] = time.monotonic
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _reporting: threading.RLock = field(default_factory=threading.RLock)
    _total: Progress = field(default_factory=Progress)
    _bytes: int = 0
    _files: int = 0
    _started: float = 0.0
    _reported: float = float("-inf")

    def start(self, stage: Stage, files: int, size: int) -> None:
        with self._counting:
            self._started = self.clock()
            self._total = Progress(stage=stage, files_total=files, bytes_total=size)
            self._bytes = self._files = 0
        self._report(force=True)

    def add(self, size: int, files: int = 0) -> None:
        with self._counting:
            self._bytes += size
            self._files += files
            is_due = self.report is not None and self.clock() - self._reported >= 1.0
        if is_due:
            self._report(force=False)

    def stage(self, stage: Stage) -> None:
        with self._counting:
            self._total = self._total.replace(stage=stage)
        self._report(force=True)

    def _report(self, *, force: bool) -> None:
        if self.report is None:
            return
        with TURN.let_go(), self._reporting:
            with self._counting:
                now = self.clock()
                if not force and now - self._reported < 1.0:
                    return  # somebody else has, in the meantime
                self._reported = now
                seconds = max(now - self._started, 1e-3)
                progress = self._total.replace(
                    bytes_done=self._bytes, files_done=self._files, bytes_per_second=int(self._bytes / seconds)
                )
            self.report(progress)
