"""One thread computes at a time, and nobody keeps the turn while waiting."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoint_operator.storage.buffers import Buffers
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.pace import Pace
from checkpoint_operator.storage.turn import TURN, Turn

SECONDS = 10.0


def test_one_thread_has_it_at_a_time() -> None:
    turn, inside, most = Turn(), 0, 0

    def work(_: int) -> None:
        nonlocal inside, most
        for _ in range(200):
            with turn.taken():
                inside += 1
                most = max(most, inside)
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (most, inside) == (1, 0)


def in_a_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(SECONDS)


def test_who_has_it_may_ask_again_and_lets_go_as_a_whole() -> None:
    turn, had_it = Turn(), threading.Event()

    def other() -> None:
        with turn.taken():
            had_it.set()

    def first() -> None:
        with turn.taken(), turn.taken():
            thread = threading.Thread(target=other)
            thread.start()
            assert not had_it.wait(0.05)
            with turn.let_go(), turn.let_go():
                assert had_it.wait(SECONDS)
        thread.join(SECONDS)
        with turn.let_go():  # who has none lets nothing go
            pass
        with turn.taken():  # and it is free again
            pass

    in_a_thread(first)


def test_the_main_thread_takes_none_so_that_a_ctrl_c_cannot_leave_it_taken() -> None:
    turn = Turn()
    with turn.taken(), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: turn.taken().__enter__()).result(SECONDS)


def test_it_is_free_again_after_a_failure() -> None:
    turn = Turn()

    def fails() -> None:
        with turn.taken(), turn.let_go():
            raise OSError("of this test")

    with pytest.raises(OSError, match="of this test"):
        in_a_thread(fails)
    in_a_thread(lambda: turn.taken().__enter__())


def assert_frees(waiter: Callable[[], None], waits: threading.Event, frees: Callable[[], object]) -> None:
    """Another thread gets the turn while ``waiter`` waits, and ends its waiting."""

    def other() -> None:
        with TURN.taken():
            frees()

    thread = threading.Thread(target=waiter)
    thread.start()
    assert waits.wait(SECONDS)
    in_a_thread(other)
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_nobody_waits_for_memory_in_a_turn() -> None:
    """Whoever holds the memory may need the turn to give it back."""
    buffers, waits = Buffers(10), threading.Event()
    first = buffers.take(8)

    def second() -> None:
        with TURN.taken():
            waits.set()
            with buffers.lent(4):
                pass

    assert_frees(second, waits, lambda: buffers.give(first))


def test_nobody_is_slowed_down_in_a_turn() -> None:
    pace, waits = Pace(1), threading.Event()
    pace.spend(1000)

    def slow() -> None:
        with TURN.taken():
            waits.set()
            try:
                pace.spend(1)
            except Cancelled:
                return

    assert_frees(slow, waits, pace.cancelled.set)


FORKS = """
import os, threading
from checkpoint_operator.storage.turn import TURN

def take():
    with TURN.taken():
        has_it.set()
        over.wait(10)

has_it, over = threading.Event(), threading.Event()
threading.Thread(target=take).start()
assert has_it.wait(10)
child = os.fork()
if child == 0:
    mine = threading.Thread(target=lambda: TURN.taken().__enter__(), daemon=True)
    mine.start()
    mine.join(5)
    os._exit(mine.is_alive())
over.set()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_the_child_of_a_fork_has_its_own() -> None:
    """Whoever had the turn does not exist there, as in the worker of a DataLoader."""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], timeout=30, check=False).returncode == 0
