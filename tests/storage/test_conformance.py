"""One suite for every backend: whatever it stands on, it keeps the promises of `storage/backend.py`."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from storage_world import CHECKPOINT, MARKER, MIB, SHARDED, OnLook, World, make, tree

from checkpoint_operator.api.errors import ErrorCode, Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, Progress, Stage
from checkpoint_operator.storage import StorageError, UploadRequest
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.manifest import FileTable, Link, StoredFile
from checkpoint_operator.storage.marker import encode
from checkpoint_operator.storage.source import Selection

NAMES = [
    "plain.bin",
    ".hidden",
    "with space",
    " leading space",
    "a+b",
    "100%20percent",
    "hash#tag",
    "what?",
    "quote'\"&<>",
    "colon:star*tilde~",
    "日本語.json",
    "🔥.bin",
    unicodedata.normalize("NFC", "é-composed"),
    unicodedata.normalize("NFD", "é-composed"),
    "deep/er/and/deeper/file",
    "deep/.metadata.jsonl",
]
SIX = {f"{number}.bin": bytes([number]) * 100 for number in range(6)}


def refused(reason: Reason) -> pytest.RaisesExc[StorageError]:
    return pytest.RaisesExc(StorageError, check=lambda error: error.reason is reason)


def assert_nothing_committed(world: World, name: str = "run") -> None:
    with refused(Reason.NOT_FOUND):
        world.backend.get_metadata(world.uri(name))
    assert list(world.backend.list_artifacts(world.uri(name))) == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source", {"config.json": b"{}", "model.safetensors": b"weights", "sub/optimizer.pt": b"state"})


# ---- Round trips


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, SHARDED], ids=["LoRA", "sharded"])
def test_a_real_checkpoint_comes_back_byte_for_byte_with_modes_and_times(world: World, checkpoint: Path) -> None:
    stored = world.upload(checkpoint)
    restored = world.download()
    assert tree(restored) == tree(checkpoint)
    assert stored.data_owner
    assert stored.storage_uri == str(world.uri())
    assert stored.file_count == len(tree(checkpoint))
    assert stored.size_bytes == sum(path.stat().st_size for path in checkpoint.iterdir())
    for path in checkpoint.iterdir():
        before, after = path.stat(), (restored / path.name).stat()
        assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_the_files_lie_in_the_store_as_they_are_with_one_manifest_beside_them(world: World, source: Path) -> None:
    world.upload(source)
    assert world.paths() == [f"run/{name}" for name in (MARKER, "config.json", "model.safetensors", "sub/optimizer.pt")]
    assert world.get("run/sub/optimizer.pt") == b"state"


def test_every_name_is_stored_exactly(world: World, tmp_path: Path) -> None:
    odd = make(tmp_path / "odd", {name: name.encode() for name in NAMES})
    assert len(tree(odd)) == len(NAMES), "this file system folds names"
    world.upload(odd)
    assert world.paths() == sorted(f"run/{name}" for name in [*NAMES, MARKER])
    assert tree(world.download()) == tree(odd)


def test_empty_files_empty_folders_and_inner_links_come_back(world: World, tmp_path: Path) -> None:
    odd = make(tmp_path / "odd", {"empty": b"", "deep/data": b"x", "deep/empty": b""})
    (odd / "void" / "inside").mkdir(parents=True)
    (odd / "latest").symlink_to("deep")
    (odd / "deep" / "up").symlink_to("../empty")
    (odd / "deep" / "dangling").symlink_to("gone")
    stored = world.upload(odd)
    assert stored.file_count == 3
    assert tree(world.download()) == tree(odd)


def test_a_single_file_lies_below_the_uri_under_its_own_name(world: World, tmp_path: Path) -> None:
    file = make(tmp_path, {"adapter.safetensors": b"weights"}) / "adapter.safetensors"
    stored = world.upload(file)
    assert stored.file_count == 1
    assert world.paths() == [f"run/{MARKER}", "run/adapter.safetensors"]
    assert tree(world.download()) == {"adapter.safetensors": b"weights"}


def test_a_file_of_several_parts_has_the_hash_of_the_whole_file(world: World, tmp_path: Path) -> None:
    content = os.urandom(MIB) * 35 + b"tail"
    big = make(tmp_path / "big", {"model.bin": content, "exactly-one-part": content[: 16 * MIB]})
    world.upload(big)
    one, many = world.backend.get_manifest(world.uri()).table.files
    assert many.sha256 == hashlib.sha256(content).hexdigest()
    assert one.parts == 1
    assert many.parts == (3 if world.is_bucket else 1)
    restored = world.download()
    assert (restored / "model.bin").read_bytes() == content


def test_metadata_survives_with_keys_that_this_version_does_not_know(world: World, source: Path) -> None:
    metadata = ArtifactMetadata.from_dict(
        {"job_name": "dpo-7b", "metrics": {"loss": 0.25}, "tags": {"team": "grün"}, "future": {"nested": [1, None]}}
    )
    world.upload(source, metadata=metadata)
    found = world.backend.get_metadata(world.uri())
    assert found.to_dict()["future"] == {"nested": [1, None]}
    assert (found.job_name, found.metrics, found.tags) == ("dpo-7b", {"loss": "0.25"}, {"team": "grün"})
    assert (found.artifact_id, found.size_bytes, found.storage_path) == ("uid-a", 14, str(world.uri()))
    assert found.created_at is not None
    assert world.backend.download_artifact(world.uri(), world.work / "restored") == found


def test_progress_counts_every_byte_and_ends_with_verifying(world: World, source: Path) -> None:
    seen: list[Progress] = []
    world.upload(source, progress=seen.append)
    assert seen[0] == Progress(stage=Stage.UPLOADING, bytes_total=14, files_total=3)
    assert (seen[-1].stage, seen[-1].bytes_done, seen[-1].files_done) == (Stage.VERIFYING, 14, 3)


def test_it_is_said_before_anything_is_written(world: World, source: Path) -> None:
    """The operator cleans up only after movers that may have written."""
    written: list[list[str]] = []
    request = UploadRequest(
        root=str(source.parent),
        path=source.name,
        uri=world.uri(),
        metadata=ArtifactMetadata(),
        uid="uid-a",
        selection=Selection(include=("*.gguf",)),
        on_write=lambda: written.append(world.paths()),
    )
    with refused(Reason.SOURCE_EMPTY):
        world.backend.upload_artifact(request)
    assert written == []
    world.backend.upload_artifact(dataclasses.replace(request, selection=Selection()))
    assert written[0] == []
    said = len(written)
    world.backend.upload_artifact(request)
    assert len(written) == said, "what is committed needs no write"


# ---- Who gets the place


def test_a_second_upload_of_the_same_artifact_does_nothing_even_when_the_source_is_gone(world: World, source: Path) -> None:
    first = world.upload(source)
    before = world.get(f"run/{MARKER}")
    assert world.upload(source) == first
    shutil.rmtree(source)
    assert world.upload(source) == first
    assert world.get(f"run/{MARKER}") == before


def test_without_a_uid_the_second_run_finds_the_first(world: World, source: Path) -> None:
    first = world.upload(source, uid=None)
    assert world.upload(source, uid=None) == first
    assert first.data_owner


def test_the_same_content_of_another_artifact_is_shared(world: World, source: Path) -> None:
    first = world.upload(source)
    before = world.paths()
    second = world.upload(source, uid="uid-b")
    assert not second.data_owner
    assert second.content_digest == first.content_digest
    assert second.manifest_digest == first.manifest_digest
    assert world.paths() == before
    assert world.backend.get_metadata(world.uri()).artifact_id == "uid-a"


@pytest.mark.parametrize("change", ["content", "name", "folder", "link"])
def test_other_content_of_another_artifact_is_refused_and_the_first_stays(world: World, source: Path, change: str) -> None:
    world.upload(source)
    expected = tree(world.download())
    other = source.parent / "other"
    shutil.copytree(source, other)
    match change:
        case "content":
            (other / "config.json").write_bytes(b"[]")
        case "name":
            (other / "config.json").rename(other / "config.yaml")
        case "folder":
            (other / "void").mkdir()
        case "link":
            (other / "l").symlink_to("sub")
    with refused(Reason.TARGET_EXISTS):
        world.upload(other, uid="uid-b")
    assert tree(world.download()) == expected


def test_foreign_files_at_the_place_are_never_touched(world: World, source: Path) -> None:
    world.put("run/notes.txt", b"mine")
    world.put("run/config.json", b"also mine")
    with refused(Reason.TARGET_NOT_EMPTY):
        world.upload(source)
    assert (world.get("run/notes.txt"), world.get("run/config.json")) == (b"mine", b"also mine")
    assert world.paths() == ["run/config.json", "run/notes.txt"]
    world.delete()
    assert world.paths() == ["run/config.json", "run/notes.txt"]


@pytest.mark.parametrize("content", [b'{"mine": true}', b"not json", b"", b'{"state": "Committed"}'])
def test_a_foreign_metadata_file_is_neither_overwritten_nor_listed_nor_removed(
    world: World, source: Path, content: bytes
) -> None:
    world.put(f"run/{MARKER}", content)
    with refused(Reason.TARGET_NOT_EMPTY):
        world.upload(source)
    assert list(world.backend.list_artifacts(world.uri())) == []
    assert "left alone" in world.delete()
    assert "left alone" in world.delete(uid=None)
    assert world.paths() == [f"run/{MARKER}"]
    assert world.get(f"run/{MARKER}") == content


def test_a_checkpoint_of_a_newer_version_is_not_touched_by_this_one(world: World, source: Path) -> None:
    world.put(f"run/{MARKER}", b'{"schemaVersion": 2, "artifactUID": "uid-a", "claimID": "c", "state": "Frozen"}')
    for act in (lambda: world.upload(source), world.delete):
        with pytest.raises(StorageError, match="upgrade it"):
            act()
    assert world.paths() == [f"run/{MARKER}"]


def test_two_artifacts_of_layout_unique_share_a_uri(world: World, source: Path) -> None:
    other = make(source.parent / "other", {"x": b"other"})
    first = world.upload(source, layout=Layout.UNIQUE)
    second = world.upload(other, uid="uid-b", layout=Layout.UNIQUE)
    third = world.upload(other, uid="uid", layout=Layout.UNIQUE)  # a beginning of the other uids
    assert len({first.storage_uri, second.storage_uri, third.storage_uri}) == 3
    assert all(one.data_owner and one.storage_uri.startswith(f"{world.uri()}/") for one in (first, second, third))
    shutil.rmtree(source)
    assert world.upload(source, layout=Layout.UNIQUE) == first
    world.delete(layout=Layout.UNIQUE)
    assert sorted(str(found.artifact_id) for found in world.backend.list_artifacts(world.uri())) == ["uid", "uid-b"]
    world.delete(uid="uid", layout=Layout.UNIQUE)
    world.delete(uid="uid-b", layout=Layout.UNIQUE)
    assert world.paths() == []


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("force", [True, False])
def test_layout_unique_cleans_what_attempts_with_another_state_of_the_source_left(
    world: World, tmp_path: Path, force: bool
) -> None:
    changing = make(tmp_path / "changing", SIX)
    with pytest.raises(Cancelled):
        world.upload(changing, layout=Layout.UNIQUE, cancelled=OnLook(4))
    (changing / "0.bin").write_bytes(b"new")
    (changing / "1.bin").unlink()
    stored = world.upload(changing, layout=Layout.UNIQUE, force=force)
    folder = stored.storage_uri.rpartition("/")[2]
    if force or not world.is_bucket:  # a lock tells the file backend that the earlier mover is gone
        assert {path.split("/")[1] for path in world.paths()} == {folder}
    assert stored.file_count == 5
    world.delete(layout=Layout.UNIQUE)
    assert world.paths() == []


def test_a_uri_as_long_as_allowed_has_room_for_layout_unique_or_is_refused_by_length(world: World, source: Path) -> None:
    name = "/".join(["n" * 200] * 4)
    name += "/" + "m" * (1020 - len(f"{world.base}/{name}/"))
    uid = "7b0e4b4e-27f4-4c27-9d0a-1f3f4d4b8c11"
    if not world.is_bucket:
        assert world.upload(source, name, uid=uid, layout=Layout.UNIQUE).file_count == 3
        world.delete(name, uid, layout=Layout.UNIQUE)
    else:
        with pytest.raises(StorageError) as caught:
            world.upload(source, name, uid=uid, layout=Layout.UNIQUE)
        assert not caught.value.retryable
    assert world.paths() == []


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
    (source / "2.bin").unlink()
    make(source, {"2.bin/now-a-folder": b"x"})
    if world.is_bucket:  # a lock tells the file backend that the earlier mover is gone; a bucket has none
        with refused(Reason.EARLIER_MOVER_NOT_GONE):
            world.upload(source)
        assert_nothing_committed(world)
    world.upload(source, force=True)
    assert tree(world.download()) == tree(source)
    assert world.paths() == sorted(f"run/{name}" for name in [*tree(source), MARKER])


# ---- Selection


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), ["config.json", "global_step9/mp_rank_00.pt", "global_step9/zero.pt", "latest", "optimizer.pt"]),
        (("*.pt",), (), ["global_step9/mp_rank_00.pt", "global_step9/zero.pt", "optimizer.pt"]),
        (("global_step*/**",), ("zero.pt",), ["global_step9/mp_rank_00.pt"]),
        (("global_step9",), (), ["global_step9/mp_rank_00.pt", "global_step9/zero.pt"]),
        ((), ("global_step*", "optimizer.pt"), ["config.json", "latest"]),
        (("config.json", "latest"), ("latest",), ["config.json"]),
    ],
    ids=["everything", "names at any depth", "exclude after include", "a folder's name", "exclude a folder", "both"],
)
def test_include_and_exclude_decide_what_is_stored(
    world: World, tmp_path: Path, include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]
) -> None:
    names = ["config.json", "global_step9/mp_rank_00.pt", "global_step9/zero.pt", "latest", "optimizer.pt"]
    source = make(tmp_path / "source", dict.fromkeys(names, b"x"))
    world.upload(source, selection=Selection(include, exclude))
    assert [file.path for file in world.backend.get_manifest(world.uri()).table.files] == expected


def test_a_selection_that_leaves_nothing_over_is_refused_and_claims_nothing(world: World, source: Path) -> None:
    with refused(Reason.SOURCE_EMPTY):
        world.upload(source, selection=Selection(include=("*.gguf",)))
    assert world.paths() == []


def test_the_marker_of_the_checkpoint_that_a_folder_was_copied_from_is_left_out(world: World, source: Path) -> None:
    make(source, {MARKER: b'{"state": "Committed"}'})
    assert world.upload(source).file_count == 3
    assert MARKER not in tree(world.download())


@pytest.mark.parametrize("name", [f"sub/{MARKER}", f"{MARKER}/inside", ".metadata.deleting.json", ".probe-x"])
def test_a_name_that_would_be_taken_for_a_marker_is_refused_before_the_first_byte(
    world: World, source: Path, name: str
) -> None:
    make(source, {name: b"{}"})
    with refused(Reason.UNSUPPORTED_NAME):
        world.upload(source)
    assert world.paths() == []
    assert world.upload(source, selection=Selection(exclude=(name,))).file_count == 3


# ---- Deletion


def test_a_deletion_removes_everything_and_can_be_repeated(world: World, source: Path) -> None:
    world.upload(source)
    assert world.delete() == "nothing is left there"
    assert world.paths() == []
    assert_nothing_committed(world)
    assert world.delete() == "nothing is left there"
    assert world.upload(source, uid="uid-b").data_owner


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


# ---- Download


def test_an_existing_destination_is_refused(world: World, source: Path, tmp_path: Path) -> None:
    world.upload(source)
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("there", "dangling"):
        with refused(Reason.DESTINATION_EXISTS):
            world.backend.download_artifact(world.uri(), tmp_path / name)
    assert list((tmp_path / "there").iterdir()) == []


def test_what_is_not_there_cannot_be_downloaded(world: World, tmp_path: Path) -> None:
    with refused(Reason.NOT_FOUND) as caught:
        world.backend.download_artifact(world.uri(), tmp_path / "restored")
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert not caught.value.retryable
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize(
    "damage",
    [b"WEIGHTS", b"short", b"much longer than before", None],
    ids=["other bytes", "cut off", "grown", "removed"],
)
def test_a_damaged_file_is_noticed_and_the_destination_does_not_appear(
    world: World, source: Path, damage: bytes | None
) -> None:
    world.upload(source)
    if damage is None:
        world.remove("run/model.safetensors")
    else:
        world.put("run/model.safetensors", damage)
    with refused(Reason.INTEGRITY_MISMATCH):
        world.backend.download_artifact(world.uri(), world.work / "restored")
    assert not (world.work / "restored").exists()


def test_a_second_download_keeps_what_the_first_had_fetched(world: World, source: Path) -> None:
    world.upload(source)
    restored, staging = world.work / "restored", world.work / "restored.partial"
    world.put("run/sub/optimizer.pt", b"STATE")
    with refused(Reason.INTEGRITY_MISMATCH):
        world.backend.download_artifact(world.uri(), restored)
    before = (staging / "model.safetensors").stat()
    (staging / "config.json").write_bytes(b"??")  # of the right size, and wrong
    world.put("run/sub/optimizer.pt", b"state")
    world.backend.download_artifact(world.uri(), restored)
    after = (restored / "model.safetensors").stat()
    assert tree(restored) == tree(source)
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns), "it was fetched again"
    assert not staging.exists()


def test_a_folder_that_merely_has_the_name_of_the_staging_folder_is_left_alone(world: World, source: Path) -> None:
    world.upload(source)
    make(world.work, {"restored.partial/precious": b"x"})
    with refused(Reason.DESTINATION_EXISTS):
        world.backend.download_artifact(world.uri(), world.work / "restored")
    assert (world.work / "restored.partial" / "precious").read_bytes() == b"x"


def test_a_disk_that_refuses_the_download_is_a_storage_error(world: World, source: Path) -> None:
    world.upload(source)
    (world.work / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="writing to"):
        world.backend.download_artifact(world.uri(), world.work / "file" / "restored")


def line(path: str) -> StoredFile:
    return StoredFile(path=path, size=7, sha256=hashlib.sha256(b"weights").hexdigest(), etag='"x"')


HOSTILE = {
    "a file above": FileTable(files=[line("../evil")]),
    "an absolute file": FileTable(files=[line("/tmp/evil")]),
    "a file above, through a folder": FileTable(files=[line("sub/../../evil")]),
    "an empty name": FileTable(files=[line("")]),
    "the marker itself": FileTable(files=[line(MARKER)]),
    "a file twice": FileTable(files=[line("x"), line("x")]),
    "a folder above": FileTable(files=[line("x")], empty_directories=["../evil"]),
    "a link to above": FileTable(files=[line("x")], links=[Link(path="l", target="../evil")]),
    "an absolute link": FileTable(files=[line("x")], links=[Link(path="l", target="/etc")]),
    "a link that lies above": FileTable(files=[line("x")], links=[Link(path="../evil", target="x")]),
    "two links that leave together": FileTable(
        files=[line("x")], links=[Link(path="a/l", target=".."), Link(path="m", target="a/l/..")]
    ),
    "a link below a link": FileTable(files=[line("x")], links=[Link(path="d", target="."), Link(path="d/l", target="..")]),
    "a file below a link": FileTable(files=[line("d/x")], links=[Link(path="d", target=".")]),
    "a folder below a file": FileTable(files=[line("x")], empty_directories=["x/y"]),
}


@pytest.mark.parametrize("table", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_that_would_write_outside_the_destination_is_refused(
    world: World, source: Path, table: FileTable
) -> None:
    world.upload(source)
    manifest = world.backend.get_manifest(world.uri())
    world.put(f"run/{MARKER}", encode(manifest.replace(table=table)))
    yard = world.work / "yard" / "inner"
    yard.mkdir(parents=True)
    with refused(Reason.UNSUPPORTED_NAME):
        world.backend.download_artifact(world.uri(), yard / "restored")
    assert tree(yard.parent) == {"inner": None}


# ---- Lists


def test_lists_filter_by_prefix_and_type(world: World, source: Path) -> None:
    for name, kind in (("a/one", "checkpoint"), ("a/two", "merged"), ("ab/three", "checkpoint"), ("a/one/in", "merged")):
        world.upload(source, name, uid=f"uid-{name.replace('/', '-')}", metadata=ArtifactMetadata(artifact_type=kind))

    def listed(prefix: str, kind: str | None = None) -> list[str]:
        found = world.backend.list_artifacts(world.uri(prefix), kind)
        return sorted(str(metadata.storage_path).removeprefix(f"{world.base}/") for metadata in found)

    assert listed("a") == ["a/one", "a/one/in", "a/two"]
    assert listed("a", "merged") == ["a/one/in", "a/two"]
    assert listed("a/one") == ["a/one", "a/one/in"]
    assert listed("a/on") == []
    assert listed("nothing") == []
    everywhere = [found.storage_path for found in world.manager().list(world.base.rpartition("/")[0] + "/")]
    assert set(everywhere) >= {str(world.uri(name)) for name in ("a/one", "a/two", "ab/three", "a/one/in")}


def test_a_whole_bucket_or_volume_is_refused_as_a_place(world: World, source: Path) -> None:
    root = "file:///" if not world.is_bucket else f"{world.base.rpartition('/')[0]}/"
    manager = world.manager()
    for act in (
        lambda: manager.upload(source, root),
        lambda: manager.delete(root),
        lambda: manager.delete(root, force=True),
        lambda: manager.download(root, world.work / "restored"),
        lambda: manager.get_metadata(root),
    ):
        with refused(Reason.UNSUPPORTED_URI):
            act()


def test_the_manager_does_the_whole_round(world: World, source: Path) -> None:
    manager, uri = world.manager(), str(world.uri())
    stored = manager.upload(source, uri, ArtifactMetadata(job_name="dpo"))
    assert manager.upload(source, uri) == stored
    assert manager.download(uri, world.work / "restored") == manager.get_metadata(uri)
    assert tree(world.work / "restored") == tree(source)
    manager.delete(uri)
    with refused(Reason.NOT_FOUND):
        manager.get_metadata(uri)
