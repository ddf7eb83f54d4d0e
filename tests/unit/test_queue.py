"""The work queue's promises, on a clock that jumps: nothing sleeps, nothing is lost, nothing runs twice at once."""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from checkpoint_operator.controller.queue import WorkQueue


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the clock to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout:
            self.now += timeout
        return super().select(0)


def on_a_jumping_clock(scenario: Callable[[WorkQueue[str]], Awaitable[None]]) -> None:
    selector = _JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]

    async def run() -> None:
        await asyncio.wait_for(scenario(WorkQueue(backoff=1, backoff_max=10)), timeout=3600)

    try:
        loop.run_until_complete(run())
    finally:
        loop.close()


def now() -> float:
    return asyncio.get_running_loop().time()


def test_keys_come_out_in_the_order_in_which_they_were_added_and_once() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        for key in ("a", "b", "a", "c", "b"):
            queue.add(key)
        got = [await queue.get() for _ in range(3)]
        assert got == ["a", "b", "c"]
        for key in got:
            queue.done(key)
        assert len(queue) == 0

    on_a_jumping_clock(scenario)


def test_a_key_that_is_being_worked_on_is_not_given_out_again_before_it_is_done() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        queue.add("a")
        assert await queue.get() == "a"
        queue.add("a")
        queue.add("b")
        assert await queue.get() == "b"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get(), timeout=1)
        queue.done("a")
        assert await queue.get() == "a"
        queue.done("a")
        queue.done("b")
        assert len(queue) == 0

    on_a_jumping_clock(scenario)


def test_a_delayed_key_comes_at_its_earliest_time() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        queue.add_after("a", 30)
        queue.add_after("a", 10)
        queue.add_after("a", 20)
        assert await queue.get() == "a"
        assert now() == pytest.approx(10, abs=0.01)
        queue.done("a")
        assert len(queue) == 0

    on_a_jumping_clock(scenario)


def test_an_immediate_add_overtakes_a_delayed_one_and_replaces_it() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        queue.add_after("a", 30)
        queue.add("a")
        assert await queue.get() == "a"
        assert now() == 0
        queue.done("a")
        assert len(queue) == 0

    on_a_jumping_clock(scenario)


def test_retries_come_later_each_time_until_a_success() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        assert [queue.retry("a") for _ in range(6)] == [1, 2, 4, 8, 10, 10]
        queue.forget("a")
        assert queue.retry("a") == 1

    on_a_jumping_clock(scenario)


def test_every_key_is_worked_on_by_one_worker_at_a_time_and_none_is_lost() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        working: set[str] = set()
        seen: dict[str, int] = {}
        at_once = 0

        async def worker() -> None:
            nonlocal at_once
            while True:
                key = await queue.get()
                assert key not in working
                working.add(key)
                at_once = max(at_once, len(working))
                await asyncio.sleep(0.01 * (len(key) % 3))
                seen[key] = seen.get(key, 0) + 1
                working.discard(key)
                queue.done(key)

        workers = [asyncio.create_task(worker()) for _ in range(4)]
        for round_ in range(20):
            for number in range(10):
                queue.add("k" * (number + 1))
            await asyncio.sleep(0.013 * (round_ % 4))
        while len(queue):  # noqa: ASYNC110 - the clock jumps
            await asyncio.sleep(0.1)
        for task in workers:
            assert not task.done(), task.exception()
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        assert set(seen) == {"k" * (number + 1) for number in range(10)}
        assert at_once == 4

    on_a_jumping_clock(scenario)
