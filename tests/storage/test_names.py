"""A name is stored exactly or refused before the first byte: the table, on every store."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import name_table
import pytest
from name_table import PLACES, TABLE
from storage_world import MARKER, ObjectWorld, World, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage.source import Selection

_WRITES = {"create marker", "swap marker", "put", "start_upload"}


def test_every_name_that_a_store_keeps_comes_back_exactly(world: World, tmp_path: Path) -> None:
    prefix = world.prefix_of_files()
    names = [name.below(prefix) for name in TABLE if world.uri().scheme not in name.refused]
    odd = make(tmp_path / "odd", {name: name.encode() for name in names})
    assert len([content for content in tree(odd).values() if content]) == len(names), "this file system folds names"
    world.upload(odd)
    assert world.paths() == sorted(f"run/{name}" for name in [*names, MARKER])
    assert [world.get(f"run/{name}") for name in names] == [name.encode() for name in names]
    assert tree(world.download()) == tree(odd)
    world.delete()
    assert world.paths() == []


def test_every_other_name_is_refused_before_the_first_byte(world: World, tmp_path: Path, subtests: pytest.Subtests) -> None:
    prefix = world.prefix_of_files()
    for number, name in enumerate(TABLE):
        if world.uri().scheme not in name.refused:
            continue
        path = name.below(prefix)
        with subtests.test(name.what):
            odd = make(tmp_path / str(number), {path: b"x", "a-good-name": b"x"})
            with refused(Reason.UNSUPPORTED_NAME) as caught:
                world.upload(odd)
            str(caught.value).encode()
            assert world.paths() == []
            if isinstance(world, ObjectWorld):
                assert not _WRITES & world.calls.keys()


def test_a_refused_name_can_be_left_out(world: World, source: Path) -> None:
    make(source, {"back\\slash": b"x"})
    assert world.upload(source, selection=Selection(exclude=("back*",))).file_count == 3


def test_every_place_is_kept_exactly(world: World, tmp_path: Path, subtests: pytest.Subtests) -> None:
    tiny = make(tmp_path / "tiny", {"x": b"x"})
    for what, place in PLACES.items():
        with subtests.test(what):
            assert world.upload(tiny, place, uid=f"uid-{zlib.crc32(what.encode())}").storage_uri == f"{world.base}/{place}"
    listed = [found.storage_path for found in world.backend.list_artifacts(world.uri("x").parse(world.base))]
    assert sorted(map(str, listed)) == sorted(f"{world.base}/{place}" for place in PLACES.values())
    assert world.paths() == sorted(f"{place}/{name}" for place in PLACES.values() for name in (MARKER, "x"))
    for what, place in PLACES.items():
        with subtests.test(f"and removed again: {what}"):
            assert tree(world.download(place)) == {"x": b"x"}
            world.delete(place, f"uid-{zlib.crc32(what.encode())}")
    assert world.paths() == []


def test_the_page_says_what_the_table_says() -> None:
    before = name_table.PAGE.read_text()
    assert name_table.page(before) == before, f"run python {os.path.relpath(name_table.__file__)} and commit the outcome"
