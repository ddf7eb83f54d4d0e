"""Verification finds whatever happened to an artifact behind our back, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from storage_world import MARKER, MIB, World, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage import StorageError
from checkpoint_operator.storage.manifest import FileTable, Link, content_digest
from checkpoint_operator.storage.marker import Manifest, encode

WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    made = make(tmp_path / "checkpoint", {"config.json": b"{}", "weights.bin": WEIGHTS, "sub/empty": b""})
    (made / "latest").symlink_to("sub")
    (made / "void").mkdir()
    return made


def problems(world: World, manifest_digest: str | None = None) -> str:
    """What the verification says."""
    with refused(Reason.INTEGRITY_MISMATCH) as caught:
        world.backend.verify_artifact(world.uri(), manifest_digest)
    return str(caught.value)


def test_what_nobody_touched_is_right(world: World, checkpoint: Path) -> None:
    stored = world.upload(checkpoint)
    manifest = world.backend.verify_artifact(world.uri(), stored.manifest_digest)
    assert manifest == world.backend.get_manifest(world.uri())
    assert manifest.content_digest == stored.content_digest


def test_what_is_not_there_cannot_be_verified(world: World) -> None:
    with refused(Reason.NOT_FOUND):
        world.backend.verify_artifact(world.uri())


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, tuple[str, Callable[[World], None]]] = {
    "a flipped bit": ("weights.bin", lambda world: world.put("run/weights.bin", _flip(WEIGHTS, 9000))),
    "a flipped bit in the last byte": (
        "weights.bin",
        lambda world: world.put("run/weights.bin", _flip(WEIGHTS, -1 % 16384)),
    ),
    "a truncated file": ("weights.bin", lambda world: world.put("run/weights.bin", WEIGHTS[:-1])),
    "a file cut to nothing": ("weights.bin", lambda world: world.put("run/weights.bin", b"")),
    "a file that has grown": ("weights.bin", lambda world: world.put("run/weights.bin", WEIGHTS + b"x")),
    "an empty file that has grown": ("sub/empty", lambda world: world.put("run/sub/empty", b"x")),
    "a missing file": ("weights.bin", lambda world: world.remove("run/weights.bin")),
    "a missing empty file": ("sub/empty", lambda world: world.remove("run/sub/empty")),
    "an extra file": ("stranger.py", lambda world: world.put("run/stranger.py", b"import os")),
    "an extra file in a folder": ("sub/stranger.py", lambda world: world.put("run/sub/stranger.py", b"")),
}


@pytest.mark.parametrize(("names", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_named(world: World, checkpoint: Path, names: str, damage: Callable[[World], None]) -> None:
    world.upload(checkpoint)
    damage(world)
    assert names in problems(world)


def test_several_problems_are_named_at_once(world: World, checkpoint: Path) -> None:
    world.upload(checkpoint)
    world.put("run/stranger.py", b"import os")
    world.remove("run/config.json")
    world.put("run/weights.bin", _flip(WEIGHTS, 1))
    said = problems(world)
    assert all(name in said for name in ("stranger.py", "config.json", "weights.bin"))


def test_a_nested_artifact_is_no_extra_file(world: World, checkpoint: Path) -> None:
    world.upload(checkpoint)
    world.upload(checkpoint, "run/sub/nested", uid="uid-b")
    world.backend.verify_artifact(world.uri())
    world.put("run/sub/nested/stranger.py", b"x")
    world.backend.verify_artifact(world.uri())
    with refused(Reason.INTEGRITY_MISMATCH):
        world.backend.verify_artifact(world.uri("run/sub/nested"))


def _without_weights(table: FileTable) -> FileTable:
    return table.replace(files=[file for file in table.files if file.path != "weights.bin"])


def _other_hash(table: FileTable) -> FileTable:
    return table.replace(files=[replace(file, sha256="0" * 64) for file in table.files])


def _other_link(table: FileTable) -> FileTable:
    return table.replace(links=[Link(path="latest", target="void")])


def _other_size(table: FileTable) -> FileTable:
    return table.replace(files=[replace(file, size=file.size + 1) for file in table.files])


EDITS: dict[str, Callable[[Manifest], Manifest]] = {
    "a file taken out": lambda manifest: manifest.replace(table=_without_weights(manifest.table)),
    "other hashes": lambda manifest: manifest.replace(table=_other_hash(manifest.table)),
    "other sizes": lambda manifest: manifest.replace(table=_other_size(manifest.table)),
    "another link": lambda manifest: manifest.replace(table=_other_link(manifest.table)),
    "another content digest": lambda manifest: manifest.replace(content_digest=f"sha256:{'0' * 64}"),
    "another sum of the sizes": lambda manifest: manifest.replace(metadata=manifest.metadata.replace(size_bytes=1)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_manifest_that_was_edited_by_hand_is_found(
    world: World, checkpoint: Path, edit: Callable[[Manifest], Manifest]
) -> None:
    world.upload(checkpoint)
    world.put(f"run/{MARKER}", encode(edit(world.backend.get_manifest(world.uri()))))
    assert problems(world)


def test_a_manifest_that_was_edited_with_care_is_found_by_its_digest(world: World, checkpoint: Path) -> None:
    stored = world.upload(checkpoint)
    honest = world.backend.get_manifest(world.uri())
    edited = honest.replace(metadata=honest.metadata.replace(base_model="another/model"))
    world.put(f"run/{MARKER}", encode(edited))
    world.backend.verify_artifact(world.uri())
    assert stored.manifest_digest in problems(world, stored.manifest_digest)


def test_a_careful_removal_of_a_file_leaves_it_behind_as_extra(world: World, checkpoint: Path) -> None:
    world.upload(checkpoint)
    manifest = world.backend.get_manifest(world.uri())
    table = _without_weights(manifest.table)
    careful = manifest.replace(
        table=table, content_digest=content_digest(table), metadata=manifest.metadata.replace(size_bytes=table.size)
    )
    world.put(f"run/{MARKER}", encode(careful))
    assert "weights.bin" in problems(world)


def test_a_flipped_bit_in_a_file_of_several_parts_is_found(world: World, tmp_path: Path) -> None:
    big = make(tmp_path / "big", {"model.bin": b"\0" * (20 * MIB)})
    world.upload(big)
    world.backend.verify_artifact(world.uri())
    world.put("run/model.bin", _flip(b"\0" * (20 * MIB), 17 * MIB))
    assert "model.bin" in problems(world)
    with pytest.raises(StorageError):
        world.download()


def test_verification_changes_nothing(world: World, checkpoint: Path) -> None:
    world.upload(checkpoint)
    world.put("run/stranger.py", b"x")
    before = world.paths()
    problems(world)
    assert world.paths() == before
    assert tree(world.download()) == tree(checkpoint)
