"""How the files of an upload are shared out: small ones by the handful, in their order, and enough for every thread."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from checkpoint_operator.storage.source import SourceFile
from checkpoint_operator.storage.transfer import BATCH, _batches
from checkpoint_operator.storage.turn import SMALL


def files(*sizes: int) -> list[SourceFile]:
    return [SourceFile(f"{number:04}", size, 0, number, 0o644) for number, size in enumerate(sizes)]


@given(st.lists(st.sampled_from([0, 1, SMALL - 1, SMALL, SMALL + 1]), max_size=200), st.integers(1, 8))
def test_every_file_is_in_one_batch_in_its_order_and_large_ones_are_alone(sizes: list[int], workers: int) -> None:
    given_files = files(*sizes)
    batches = _batches(given_files, workers)
    assert [file for batch in batches for file in batch] == given_files
    for batch in batches:
        assert 1 <= len(batch) <= BATCH
        assert len(batch) == 1 or all(file.size < SMALL for file in batch)


def test_a_few_small_files_are_shared_by_all_threads_and_many_come_by_the_handful() -> None:
    assert [len(batch) for batch in _batches(files(*[1] * 6), 6)] == [1] * 6
    assert [len(batch) for batch in _batches(files(*[1] * 24), 6)] == [4] * 6
    assert [len(batch) for batch in _batches(files(*[1] * 100), 6)] == [BATCH] * 12 + [4]


def test_large_files_stand_between_the_small_ones() -> None:
    batches = _batches(files(*[1] * 10, SMALL, *[1] * 10), 1)
    assert [len(batch) for batch in batches] == [8, 2, 1, 8, 2]
