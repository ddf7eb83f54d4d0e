"""Disks that are full or read-only, and stores that refuse: a clear error, and nothing that anybody could see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from storage_world import MIB, Fault, FileWorld, World, assert_nothing_committed, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage import StorageError, local

EXPECTED = {
    Fault.WRONG_CREDENTIALS: Reason.CREDENTIALS_REFUSED,
    Fault.READ_ONLY: Reason.CREDENTIALS_REFUSED,
}


@pytest.mark.parametrize("fault", Fault)
def test_a_store_that_refuses_is_a_verdict_with_a_sentence(world: World, source: Path, fault: Fault) -> None:
    world.suffer(fault)
    # A volume is mounted or the mover does not start: a root that is missing has no reason of its own.
    missing = Reason.BUCKET_NOT_FOUND if world.is_bucket else Reason.REQUEST_REJECTED
    with refused(missing if fault is Fault.MISSING_BUCKET else EXPECTED[fault]) as caught:
        world.upload(source)
    assert not caught.value.retryable
    assert caught.value.context["backend"]
    if fault is not Fault.MISSING_BUCKET:
        assert world.paths() == []


def test_who_may_only_read_can_restore_and_not_remove(world: World, source: Path) -> None:
    world.upload(source)
    world.suffer(Fault.READ_ONLY)
    assert tree(world.download()) == tree(source)
    assert [found.artifact_id for found in world.backend.list_artifacts(world.uri())] == ["uid-a"]
    with refused(Reason.CREDENTIALS_REFUSED):
        world.delete()
    assert tree(world.download()) == tree(source)


SCRIPT = """
import sys
from checkpoint_operator.storage import StorageError, StorageManager, TargetOptions
storage = StorageManager(TargetOptions(file_root=sys.argv[1]))
act, one, other = sys.argv[2:]
try:
    getattr(storage, act)(one, other)
except StorageError as error:
    print(error.reason, error.retryable)
if act == "upload":
    print([found.artifact_id for found in storage.list(other)])
"""


def on_a_disk(mount: str, root: Path, *arguments: str) -> list[str]:
    """What the script prints in a namespace of its own where something is mounted; skips where that is not allowed."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} || exit 77; shift; exec "$@"', "sh", root, *command],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_volume_that_is_full_is_no_verdict_and_shows_nothing(file_world: FileWorld, tmp_path: Path) -> None:
    big = make(tmp_path / "big", {"big": b"x" * (3 * MIB)})
    said = on_a_disk(
        'mount -t tmpfs -o size=1m small "$1"',
        file_world.root,
        str(file_world.root),
        "upload",
        str(big),
        str(file_world.uri()),
    )
    assert said == ["StoreUnavailable True", "[]"]


def test_a_volume_that_is_read_only_is_a_verdict(file_world: FileWorld, source: Path) -> None:
    said = on_a_disk(
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"',
        file_world.root,
        str(file_world.root),
        "upload",
        str(source),
        str(file_world.uri()),
    )
    assert said == ["CredentialsRefused False", "[]"]
    assert file_world.root.exists()
    assert tree(file_world.root) == {}


def test_a_disk_that_is_too_small_for_the_restore_shows_nothing(file_world: FileWorld, tmp_path: Path) -> None:
    big = make(tmp_path / "big", {"big": b"x" * (3 * MIB)})
    file_world.upload(big)
    here = tmp_path / "here"
    here.mkdir()
    said = on_a_disk(
        'mount -t tmpfs -o size=1m small "$1"',
        here,
        str(file_world.root),
        "download",
        str(file_world.uri()),
        str(here / "restored"),
    )
    assert len(said) == 1
    assert said[0].split()[0] in ("RequestRejected", "StoreUnavailable")


def test_a_prefix_of_another_artifacts_name_is_another_place(world: World, source: Path) -> None:
    names = ["ckpt-1", "ckpt-10", "ckpt-1.bak", "ckpt-1 ", "ckpt-"]
    if world.uri().scheme == "file":
        names.append(f"ckpt-1{local.PARTIAL}")
    for number, name in enumerate(names, 1):
        world.upload(source, name, uid=f"uid-{number}")
    assert [found.storage_path for found in world.backend.list_artifacts(world.uri("ckpt-1"))] == [str(world.uri("ckpt-1"))]
    assert world.delete("ckpt-1", "uid-1", force=True) == "nothing is left there"
    for name in names[1:]:
        assert tree(world.download(name)) == tree(source)
        assert "belongs to" in world.delete(name, "uid-1")
    with pytest.raises(StorageError):
        world.download("ckpt-1")


def test_a_deletion_of_what_never_was_is_success_and_removes_nothing(world: World, source: Path) -> None:
    world.upload(source, "ckpt-10")
    before = world.paths()
    for uid in ("uid-a", None):
        assert world.delete("ckpt-1", uid) == "nothing is left there"
    assert world.paths() == before
    assert_nothing_committed(world, "ckpt-1")
