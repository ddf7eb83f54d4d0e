"""What is visible is whole, and what is removed is gone: for every backend."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from storage_world import MARKER, MIB, SIX, ObjectWorld, OnLook, World, assert_nothing_committed, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Progress, Stage
from checkpoint_operator.storage.errors import Cancelled

# ---- Only what is whole is visible


@pytest.mark.usefixtures("sequential")
def test_nothing_is_visible_before_the_commit_and_another_artifact_finds_the_place_busy(world: World, source: Path) -> None:
    looked = False

    def look() -> None:
        nonlocal looked
        looked = True
        assert_nothing_committed(world)
        if world.is_bucket:  # on a file system both stage, and the rename decides
            with refused(Reason.TARGET_BUSY):
                world.upload(source, uid="uid-b")

    world.upload(source, cancelled=OnLook(2, look))
    assert looked
    assert world.backend.get_metadata(world.uri()).artifact_id == "uid-a"


def test_a_file_that_is_written_after_the_scan_is_noticed(world: World, source: Path) -> None:
    def write(progress: Progress) -> None:
        if progress.stage is Stage.UPLOADING and not progress.bytes_done:
            (source / "model.safetensors").write_bytes(b"WEIGHTS")

    with refused(Reason.SOURCE_CHANGED):
        world.upload(source, progress=write)
    assert_nothing_committed(world)


def test_a_file_that_grows_while_it_is_read_is_noticed(world: World, tmp_path: Path) -> None:
    big = make(tmp_path / "big", {"model.bin": b"x" * (20 * MIB)})

    def grow() -> None:
        with (big / "model.bin").open("ab") as file:
            file.write(b"more")

    with refused(Reason.SOURCE_CHANGED):
        world.upload(big, cancelled=OnLook(2, grow))
    assert_nothing_committed(world)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(world: World, tmp_path: Path) -> None:
    big = make(tmp_path / "big", {"model.bin": b"x" * (20 * MIB)})
    with refused(Reason.SOURCE_CHANGED):
        world.upload(big, cancelled=OnLook(2, lambda: os.truncate(big / "model.bin", 17 * MIB)))
    assert_nothing_committed(world)


@pytest.mark.parametrize("what", ["added", "removed", "linked"])
def test_a_folder_that_changes_after_its_last_byte_was_sent_is_not_committed(world: World, source: Path, what: str) -> None:
    def change(progress: Progress) -> None:
        if progress.stage is Stage.VERIFYING:
            match what:
                case "added":
                    (source / "late.bin").write_bytes(b"x")
                case "removed":
                    (source / "config.json").unlink()
                case "linked":
                    (source / "late").symlink_to("sub")

    with refused(Reason.SOURCE_CHANGED):
        world.upload(source, progress=change)
    assert_nothing_committed(world)


@pytest.mark.usefixtures("sequential")
def test_an_attempt_goes_on_where_a_cancelled_one_stopped(world: World, tmp_path: Path) -> None:
    source = make(tmp_path / "source", SIX)
    with pytest.raises(Cancelled):
        world.upload(source, cancelled=OnLook(4))
    assert_nothing_committed(world)
    left = [path for path in world.paths() if not path.endswith(MARKER)]
    assert len(left) >= 3
    assert world.upload(source).file_count == 6
    assert tree(world.download()) == tree(source)
    assert world.paths() == sorted(f"run/{name}" for name in [*SIX, MARKER])


@pytest.mark.usefixtures("sequential")
def test_after_a_change_of_the_source_only_the_new_state_is_committed(world: World, tmp_path: Path) -> None:
    source = make(tmp_path / "source", SIX)
    with pytest.raises(Cancelled):
        world.upload(source, cancelled=OnLook(5))
    (source / "0.bin").write_bytes(b"changed")
    (source / "1.bin").unlink()
    if world.kind != "versitygw":  # keeps objects as files: `a` and `a/b` cannot be there at once, not even for a moment
        (source / "2.bin").unlink()
        make(source, {"2.bin/now-a-folder": b"x"})
    if world.is_bucket:  # a lock tells the file backend that the earlier mover is gone; a bucket has none
        with refused(Reason.EARLIER_MOVER_NOT_GONE):
            world.upload(source)
        assert_nothing_committed(world)
    world.upload(source, force=True)
    assert tree(world.download()) == tree(source)
    assert world.paths() == sorted(f"run/{name}" for name in [*tree(source), MARKER])


# ---- Deletion


def test_a_deletion_removes_everything_and_can_be_repeated(world: World, source: Path) -> None:
    world.upload(source)
    assert world.delete() == "nothing is left there"
    assert world.paths() == []
    assert_nothing_committed(world)
    assert world.delete() == "nothing is left there"
    assert world.upload(source, uid="uid-b").data_owner


def test_a_deletion_of_many_files_removes_several_at_once_and_the_marker_last(world: World, tmp_path: Path) -> None:
    if not isinstance(world, ObjectWorld):
        pytest.skip("a volume has no round trips")
    world.upload(make(tmp_path / "many", {f"{number}.bin": b"x" for number in range(9)}))
    meeting, removed = threading.Barrier(4), list[str]()

    def meet(verb: str, key: str) -> None:
        if verb == "remove":
            removed.append(key.rpartition("/")[2])
            if 2 <= len(removed) <= 5:  # the first one is by itself
                meeting.wait(timeout=60)

    world.cues.append(meet)
    assert world.delete() == "nothing is left there"
    assert removed[-1] == MARKER
    assert sorted(removed[:-1]) == [f"{number}.bin" for number in range(9)]
    assert world.paths() == []


def test_a_deletion_in_the_library_needs_no_uid_for_what_is_committed(world: World, source: Path) -> None:
    world.upload(source)
    assert world.manager().delete(str(world.uri())) == "nothing is left there"
    assert world.paths() == []


def test_a_deletion_leaves_foreign_files_and_nested_artifacts_alone(world: World, source: Path) -> None:
    world.upload(source)
    world.upload(source, "run/sub/nested", uid="uid-b")
    world.put("run/sub/notes.txt", b"mine")
    world.delete()
    assert_paths = [f"run/sub/nested/{name}" for name in (MARKER, "config.json", "model.safetensors", "sub/optimizer.pt")]
    assert world.paths() == [*assert_paths, "run/sub/notes.txt"]
    assert tree(world.download("run/sub/nested")) == tree(source)


def test_a_deletion_leaves_the_data_of_another_artifact_alone(world: World, source: Path) -> None:
    world.upload(source)
    assert "belongs to artifact uid-a" in world.delete(uid="uid-b")
    assert tree(world.download()) == tree(source)


def test_retain_keeps_what_is_committed(world: World, source: Path) -> None:
    world.upload(source)
    assert "kept" in world.delete(keep=True)
    assert tree(world.download()) == tree(source)


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("keep", [True, False], ids=["Retain", "Delete"])
def test_what_was_never_committed_is_removed_whatever_the_policy(world: World, tmp_path: Path, keep: bool) -> None:
    source = make(tmp_path / "source", SIX)
    with pytest.raises(Cancelled):
        world.upload(source, cancelled=OnLook(3))
    assert world.paths() != []
    world.delete(keep=keep)
    assert world.paths() == []


def test_an_upload_that_is_cancelled_at_its_first_progress_can_be_deleted(world: World, source: Path) -> None:
    cancelled = OnLook(-1)
    with pytest.raises(Cancelled):
        world.upload(source, progress=lambda _: cancelled.set(), cancelled=cancelled)
    world.delete(keep=True)
    assert world.paths() == []
