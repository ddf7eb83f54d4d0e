"""Downloads and lists, of what may be damaged or hostile: for every backend."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from storage_world import MARKER, World, make, refused, tree

from checkpoint_operator.api.errors import ErrorCode, Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.storage import StorageError
from checkpoint_operator.storage.manifest import FileTable, Link, StoredFile
from checkpoint_operator.storage.marker import encode

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
    if world.kind in ("gcs", "azure"):
        pytest.skip("a version that was replaced there never comes back, not even with the same bytes")
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
    assert manager.upload(source, uri, ArtifactMetadata(job_name="dpo")) == uri
    assert manager.upload(source, uri) == uri
    assert manager.download(uri, world.work / "restored") == manager.get_metadata(uri)
    assert tree(world.work / "restored") == tree(source)
    manager.delete(uri)
    with refused(Reason.NOT_FOUND):
        manager.get_metadata(uri)
