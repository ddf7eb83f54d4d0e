"""One suite for every backend: whatever it stands on, it keeps the promises of `storage/backend.py`."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from storage_world import CHECKPOINT, MARKER, MIB, SHARDED, SIX, OnLook, World, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, Progress, Stage
from checkpoint_operator.storage import StorageError, UploadRequest
from checkpoint_operator.storage.errors import Cancelled
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
    big = make(tmp_path / "big", {"model.bin": content, "exactly-one-part": content[: 8 * MIB]})
    world.upload(big)
    one, many = world.backend.get_manifest(world.uri()).table.files
    assert many.sha256 == hashlib.sha256(content).hexdigest()
    assert one.parts == 1
    assert (many.parts > 1) == world.is_bucket
    assert many.part_size is None or many.parts == -(-len(content) // many.part_size)
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
    assert all(one.data_owner and one.storage_uri.startswith(f"{world.place()}/") for one in (first, second, third))
    shutil.rmtree(source)
    assert world.upload(source, layout=Layout.UNIQUE) == first
    world.delete(layout=Layout.UNIQUE)
    assert sorted(str(found.artifact_id) for found in world.backend.list_artifacts(world.place())) == ["uid", "uid-b"]
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
        assert {path.split("/")[1] for path in world.real_paths()} == {folder}
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
