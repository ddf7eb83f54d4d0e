"""What an attacker tried, and got somewhere with once: each of these was a finding."""

import json
import os
from pathlib import Path

import pytest
from s3_world import S3World
from storage_world import MARKER, FileWorld, World, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.storage.manifest import FileTable, StoredFile
from checkpoint_operator.storage.marker import DELETING_NAME, MAX_BYTES, Manifest, encode


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source", {"config.json": b"{}", "sub/weights.bin": b"weights"})


def lying_manifest(path: str, size: int) -> bytes:
    """A manifest as nobody but a writer of the bucket would make it."""
    honest = Manifest(
        artifact_uid="uid-a",
        claim_id="c",
        source_fingerprint="f",
        content_digest="sha256:0",
        metadata=ArtifactMetadata(),
        table=FileTable(files=[StoredFile(path="PATH", size=1, sha256="0" * 64, etag='"0"')]),
    )
    body = json.loads(encode(honest))
    body["table"]["files"][0].update(path=path, size=size)
    return json.dumps(body).encode()


def test_an_artifact_at_a_parent_place_cannot_put_files_into_a_checkpoint_below(
    s3_world: S3World, source: Path, tmp_path: Path
) -> None:
    s3_world.upload(source, "team/victim")
    before = s3_world.paths()
    evil = make(tmp_path / "evil", {"victim/modeling_evil.py": b"import os", "weights.bin": b"x"})
    with refused(Reason.TARGET_NOT_EMPTY):
        s3_world.upload(evil, "team", uid="uid-evil")
    assert s3_world.paths() == before
    beside = make(tmp_path / "beside", {"weights.bin": b"x"})
    s3_world.upload(beside, "team", uid="uid-beside")
    assert s3_world.delete("team", uid="uid-beside") == "nothing is left there"
    assert s3_world.paths() == before


def test_a_marker_of_any_size_is_not_read(world: World, source: Path) -> None:
    world.put(f"run/{MARKER}", b"{" + b" " * MAX_BYTES)
    with refused(Reason.TARGET_NOT_EMPTY):
        world.upload(source)
    assert "left alone" in world.delete()


def test_a_manifest_with_sizes_that_no_store_has_is_not_believed(world: World, source: Path) -> None:
    world.put(f"run/{MARKER}", lying_manifest("a", 10**30))
    with refused(Reason.TARGET_NOT_EMPTY):
        world.upload(source)


def test_a_manifest_that_names_other_places_removes_nothing_there(s3_world: S3World, source: Path) -> None:
    s3_world.upload(source, "victim")
    before = s3_world.paths()
    s3_world.put(f"run/{MARKER}", lying_manifest("../victim/config.json", 2))
    with refused(Reason.UNSUPPORTED_NAME):
        s3_world.delete()
    assert set(before) <= set(s3_world.paths())


def test_a_file_that_no_store_takes_is_refused_before_its_first_byte(s3_world: S3World, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.mkdir()
    with (huge / "weights.bin").open("wb") as file:
        file.truncate((5 << 40) + 1)
    with refused(Reason.SOURCE_UNSUPPORTED):
        s3_world.upload(huge)
    assert s3_world.paths() == []


def test_a_chain_of_folders_that_outlives_the_stack_is_refused(world: World, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    (deep / "/".join("d" * 100)).mkdir(parents=True)
    (deep / "/".join("d" * 100) / "weights.bin").write_bytes(b"x")
    with refused(Reason.SOURCE_UNSUPPORTED):
        world.upload(deep)


def test_a_deletion_that_died_at_its_last_step_leaves_a_place_that_can_be_used_again(
    file_world: FileWorld, source: Path
) -> None:
    file_world.upload(source)
    place = file_world.folder / "run"
    os.rename(place / MARKER, place / DELETING_NAME)
    (place / "config.json").unlink()
    (place / "sub" / "weights.bin").unlink()
    assert file_world.delete() == "nothing is left there"
    assert tree(file_world.folder) == {}
    file_world.upload(source, uid="uid-b")
