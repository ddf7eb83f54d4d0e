"""A verification reads everything back and says what is wrong, for every backend; what it does not blame is as important."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from storage_world import MARKER, FileWorld, World, make, refused

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Progress, Stage
from checkpoint_operator.storage import StorageError
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.manifest import FileTable, StoredFile, content_digest
from checkpoint_operator.storage.marker import Manifest, encode


def problem(world: World, manifest_digest: str | None = None) -> str:
    with refused(Reason.INTEGRITY_MISMATCH) as caught:
        world.backend.verify_artifact(world.uri(), manifest_digest)
    assert caught.value.context["uri"] == str(world.uri())
    return caught.value.message


def rewrite(world: World, change: Callable[[Manifest], Manifest]) -> None:
    """Edit the manifest by hand."""
    world.put(f"run/{MARKER}", encode(change(world.backend.get_manifest(world.uri()))))


def changed(file: StoredFile, *, path: str | None = None, sha256: str | None = None) -> StoredFile:
    return StoredFile(
        path=path or file.path,
        size=file.size,
        sha256=sha256 or file.sha256,
        etag=file.etag,
        generation=file.generation,
    )


def test_a_checkpoint_that_is_as_it_was_stored_passes_and_its_manifest_is_returned(world: World, source: Path) -> None:
    make(source, {"empty": b""})
    (source / "void").mkdir()
    (source / "latest").symlink_to("sub")
    stored = world.upload(source)
    seen: list[Progress] = []
    manifest = world.backend.verify_artifact(world.uri(), stored.manifest_digest, seen.append)
    assert manifest == world.backend.get_manifest(world.uri())
    assert manifest.content_digest == stored.content_digest
    assert {progress.stage for progress in seen} == {Stage.VERIFYING}
    assert (seen[-1].bytes_done, seen[-1].files_done) == (seen[-1].bytes_total, seen[-1].files_total) == (14, 4)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b"wEights", "model.safetensors'"),
        (b"weight", "has 6 bytes, listed are 7"),
        (b"", "has 0 bytes, listed are 7"),
        (b"weights and more", "has 16 bytes, listed are 7"),
        (None, "'model.safetensors' is missing"),
    ],
    ids=["one bit flipped", "truncated", "emptied", "grown", "removed"],
)
def test_damage_is_found(world: World, source: Path, damage: bytes | None, words: str) -> None:
    world.upload(source)
    if damage is None:
        world.remove("run/model.safetensors")
    else:
        world.put("run/model.safetensors", damage)
    found = problem(world)
    assert "1 problem" in found
    assert words in found


def test_what_the_manifest_does_not_list_is_found(world: World, source: Path) -> None:
    world.upload(source)
    world.put("run/sub/modeling_evil.py", b"import os")
    assert "'sub/modeling_evil.py' is there and not listed" in problem(world)


def test_nested_artifacts_probes_and_the_marker_are_not_blamed(world: World, source: Path) -> None:
    world.upload(source)
    world.upload(source, "run/sub/nested", uid="uid-b")
    world.put("run/.probe-0123", b"x")
    world.put("run-2/x", b"a neighbour whose name begins like ours")
    world.backend.verify_artifact(world.uri())
    world.put("run/sub/nested/model.safetensors", b"damaged")
    world.backend.verify_artifact(world.uri())
    with refused(Reason.INTEGRITY_MISMATCH):
        world.backend.verify_artifact(world.uri("run/sub/nested"))


def test_a_manifest_whose_table_was_edited_is_found(world: World, source: Path) -> None:
    world.upload(source)
    rewrite(world, lambda old: old.replace(table=old.table.replace(files=old.table.files[:-1])))
    found = problem(world)
    assert "contentDigest" in found
    assert "size_bytes 14, its files have 9" in found
    assert "'sub/optimizer.pt' is there and not listed" in found


def test_a_manifest_that_was_edited_with_care_is_found_by_its_own_digest(world: World, source: Path) -> None:
    digest = world.upload(source).manifest_digest
    rewrite(world, lambda old: old.replace(metadata=old.metadata.replace(base_model="another")))
    world.backend.verify_artifact(world.uri())
    assert f"expected was {digest}" in problem(world, digest)


def test_a_hash_that_was_edited_is_found(world: World, source: Path) -> None:
    world.upload(source)

    def edit(old: Manifest) -> Manifest:
        first, *others = old.table.files
        table = old.table.replace(files=[changed(first, sha256="0" * 64), *others])
        return old.replace(table=table, content_digest=content_digest(table))

    rewrite(world, edit)
    assert "has sha256 44136fa355b3678a" in problem(world)


def test_names_that_lead_elsewhere_are_a_problem_and_nothing_is_read_by_them(world: World, source: Path) -> None:
    world.upload(source)
    world.put("precious", b"{}")

    def edit(old: Manifest) -> Manifest:
        table = FileTable(files=[changed(old.table.files[0], path="../precious")])
        return old.replace(
            table=table, content_digest=content_digest(table), metadata=old.metadata.replace(size_bytes=table.size)
        )

    rewrite(world, edit)
    assert "a '..' segment" in problem(world)


def test_of_many_problems_the_first_ten_are_listed_and_all_are_counted(world: World, tmp_path: Path) -> None:
    world.upload(make(tmp_path / "source", {f"{number:02}": b"x" for number in range(14)}))
    for number in range(13):
        world.put(f"run/{number:02}", b"longer")
    found = problem(world)
    assert "13 problems" in found
    assert found.count("has 6 bytes") == 10
    assert "and 3 more" in found


def test_nothing_there_is_not_found(world: World) -> None:
    with refused(Reason.NOT_FOUND):
        world.backend.verify_artifact(world.uri())


def test_a_verification_can_be_cancelled(world: World, source: Path) -> None:
    world.upload(source)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        world.backend.verify_artifact(world.uri(), cancelled=cancelled)


def test_a_marker_that_nests_without_end_is_refused(world: World) -> None:
    world.put(f"run/{MARKER}", json.dumps({"state": "Committed"})[:-1].encode() + b', "x": ' + b"[" * 100_000)
    with pytest.raises(StorageError) as caught:
        world.backend.verify_artifact(world.uri())
    assert not caught.value.retryable


# ---- What only a volume has


def test_links_folders_and_special_files_are_compared_as_well(file_world: FileWorld, source: Path) -> None:
    (source / "latest").symlink_to("sub")
    (source / "void").mkdir()
    file_world.upload(source)
    place = file_world.folder / "run"
    (place / "latest").unlink()
    (place / "latest").symlink_to("..")
    (place / "planted").symlink_to("config.json")
    (place / "void").rmdir()
    os.mkfifo(place / "pipe")
    found = problem(file_world)
    assert "4 problems" in found
    for words in (
        "'latest' is a symlink to '..', listed is a symlink to 'sub'",
        "'void' is missing",
        "'planted' is a symlink to 'config.json' and not listed",
        "'pipe' is a FIFO, socket or device and not listed",
    ):
        assert words in found


def test_a_link_in_the_place_of_a_file_is_found_whatever_it_leads_to(file_world: FileWorld, source: Path) -> None:
    file_world.upload(source)
    same = make(file_world.work / "outside", {"same": b"weights"}) / "same"
    file_world.remove("run/model.safetensors")
    (file_world.folder / "run" / "model.safetensors").symlink_to(same)
    assert "'model.safetensors' is missing" in problem(file_world)


def test_what_another_artifact_is_staging_below_is_not_blamed(file_world: FileWorld, source: Path) -> None:
    file_world.upload(source)
    file_world.put("run/sub/.partial-uid-b/config.json", b"{}")
    file_world.backend.verify_artifact(file_world.uri())
