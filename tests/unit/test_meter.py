"""Progress: counted from any thread, told to somebody else's code, which may do what it likes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from checkpoint_operator.api.protocol import Progress, Stage
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.turn import TURN

SECONDS = 10


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_tells_once_a_second_and_at_the_end_of_a_stage() -> None:
    clock, told = Clock(), list[Progress]()
    meter = Meter(told.append, clock)
    meter.start(Stage.UPLOADING, 4, 400)
    for clock.now in (0.5, 0.9, 1.0, 1.5, 2.5):
        meter.add(80)
    meter.stage(Stage.VERIFYING)
    assert [progress.bytes_done for progress in told] == [0, 240, 400, 400]
    assert told[-1].stage is Stage.VERIFYING
    assert told[-1].bytes_per_second == 160


def test_what_is_told_never_goes_back_however_many_threads_count() -> None:
    told: list[int] = []
    meter = Meter(lambda progress: told.append(progress.bytes_done), clock=iter(range(1_000_000)).__next__)
    meter.start(Stage.UPLOADING, 0, 0)

    def count() -> None:
        for _ in range(500):
            meter.add(1)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(count)
    meter.stage(Stage.VERIFYING)
    assert told == sorted(told)
    assert told[-1] == 2000


def in_a_turn(work: Callable[[], object]) -> None:
    def run() -> None:
        with TURN.taken():
            work()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result(SECONDS)


def test_what_is_told_may_wait_for_a_thread_that_needs_the_turn_and_that_counts() -> None:
    """As a callback does that uploads something itself."""
    clock = Clock()

    def tell(progress: Progress) -> None:
        if progress.bytes_done == 1:
            in_a_turn(lambda: meter.add(1))

    meter = Meter(tell, clock)
    clock.now = 10.0
    in_a_turn(lambda: meter.add(1))
    assert meter._bytes == 2


def test_whoever_counts_in_a_turn_does_not_wait_for_who_tells() -> None:
    clock, telling, over = Clock(), threading.Event(), threading.Event()

    def tell(progress: Progress) -> None:
        telling.set()
        over.wait(SECONDS)

    meter = Meter(tell, clock)
    clock.now = 10.0
    with ThreadPoolExecutor(1) as pool:
        pool.submit(meter.add, 1)
        assert telling.wait(SECONDS)
        in_a_turn(lambda: meter.add(1))
        over.set()
    assert meter._bytes == 2
