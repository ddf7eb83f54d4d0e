"""An upload keeps to its pace: all its threads together, from the first second, and a cancelled one does not wait."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint_operator.storage import StorageManager, TargetOptions
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.pace import Pace


class Waits(threading.Event):
    """Takes note of how long it was to wait, instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return self.is_set()


def test_the_first_bytes_go_at_once_and_the_next_wait_for_their_time() -> None:
    waits = Waits()
    pace = Pace(100, waits, clock=lambda: 7.0)
    for size in (50, 200, 10):
        pace.spend(size)
    assert waits.seconds == pytest.approx([0.5, 2.5])


def test_time_in_which_nothing_was_read_is_not_saved_up() -> None:
    waits, now = Waits(), [0.0]
    pace = Pace(100, waits, clock=lambda: now[0])
    pace.spend(100)
    now[0] = 1000.0
    pace.spend(100)
    pace.spend(100)
    assert waits.seconds == pytest.approx([1.0])


def test_threads_share_one_budget() -> None:
    waits = Waits()
    pace = Pace(100, waits, clock=lambda: 0.0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pace.spend, [100] * 50))
    assert sorted(waits.seconds) == pytest.approx([float(number) for number in range(1, 50)])


def test_without_a_limit_nobody_waits() -> None:
    waits = Waits()
    Pace(None, waits).spend(1 << 60)
    assert waits.seconds == []


def test_who_is_cancelled_does_not_wait_for_the_end_of_its_turn() -> None:
    cancelled = threading.Event()
    pace = Pace(1, cancelled)
    pace.spend(10**9)
    cancelled.set()
    with pytest.raises(Cancelled):
        pace.spend(1)


@pytest.mark.parametrize("size", [3 << 20, 300_000])
def test_an_upload_reads_its_source_at_the_pace_that_its_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    spent: list[tuple[int | None, int]] = []
    monkeypatch.setattr(Pace, "spend", lambda self, count: spent.append((self.bytes_per_second, count)))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_bytes(b"w" * size)
    StorageManager(TargetOptions(max_bytes_per_second=123)).upload(tmp_path / "source", f"file://{tmp_path}/there/it")
    assert {limit for limit, _ in spent} == {123}
    assert sum(count for _, count in spent) >= size
