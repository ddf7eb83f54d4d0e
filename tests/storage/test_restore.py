"""A restore ends with the whole checkpoint or with nothing to be seen, on every backend and on disks that refuse."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from storage_world import MARKER, MIB, FileWorld, OnLook, World, make, refused, tree

from checkpoint_operator.api.errors import ErrorCode, Reason
from checkpoint_operator.api.protocol import Progress
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.manifest import StoredFile
from checkpoint_operator.storage.marker import encode
from checkpoint_operator.storage.ranges import RANGE


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Files of several ranges, and many of none."""
    return make(
        tmp_path / "large",
        {
            "model.bin": os.urandom(MIB) * 26 + b"tail",
            "exactly-two-ranges": os.urandom(MIB) * (2 * RANGE // MIB),
            **{f"small/{number}": bytes([number]) * number for number in range(40)},
        },
    )


def test_files_of_any_size_come_back_as_they_were_and_are_counted(world: World, large: Path) -> None:
    world.upload(large)
    seen: list[Progress] = []
    assert tree(world.download(progress=seen.append)) == tree(large)
    last = seen[-1]
    assert (last.bytes_done, last.files_done) == (last.bytes_total, last.files_total)
    assert last.files_total == 42


def test_a_cancelled_restore_shows_nothing_and_the_next_one_goes_on(world: World, large: Path) -> None:
    world.upload(large)
    destination = world.work / "restored"
    with pytest.raises(Cancelled):
        world.backend.download_artifact(world.uri(), destination, None, OnLook(4))
    assert not destination.exists()
    assert (world.work / "restored.partial").is_dir()
    world.backend.download_artifact(world.uri(), destination, None, threading.Event())
    assert tree(destination) == tree(large)
    assert not (world.work / "restored.partial").exists()


@pytest.mark.parametrize("size", [6, 8, 1 << 40], ids=["a shorter one", "a longer one", "one of a terabyte"])
def test_a_manifest_that_claims_another_size_gives_nothing(world: World, source: Path, size: int) -> None:
    world.upload(source)
    manifest = world.backend.get_manifest(world.uri())
    files = list(manifest.table.files)
    lie = files[1]
    files[1] = StoredFile(path=lie.path, size=size, sha256=lie.sha256, etag=lie.etag, generation=lie.generation)
    world.put(f"run/{MARKER}", encode(manifest.replace(table=manifest.table.replace(files=files))))
    with refused(Reason.INTEGRITY_MISMATCH):
        world.backend.download_artifact(world.uri(), world.work / "restored")
    assert not (world.work / "restored").exists()


def test_a_file_that_is_replaced_during_the_restore_is_noticed(world: World, source: Path) -> None:
    world.upload(source)

    def damage(progress: Progress) -> None:
        if not progress.bytes_done:
            world.put("run/model.safetensors", b"WEIGHTS")

    with refused(Reason.INTEGRITY_MISMATCH):
        world.backend.download_artifact(world.uri(), world.work / "restored", damage)
    assert not (world.work / "restored").exists()


# ---- Disks

DOWNLOAD = """
import sys
from checkpoint_operator.storage import StorageError, StorageManager, TargetOptions
manager = StorageManager(TargetOptions(file_root=sys.argv[1]))
try:
    manager.download(sys.argv[2], sys.argv[3])
except StorageError as error:
    print(error.code, error.retryable, error.message)
"""


def on_disk(options: str, world: FileWorld, between: str = ":") -> subprocess.CompletedProcess[str]:
    """Restore to a disk of its own, mounted with these options; ``between`` is run on it after the first attempt."""
    disk = world.work / "disk"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=1m,{options} small {disk} || exit 77
        "$@"; ls -A {disk}; {between}; "$@"; ls -A {disk}
    """
    command = [sys.executable, "-c", DOWNLOAD, str(world.root), str(world.uri()), str(disk / "restored")]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    return done


def test_a_disk_that_is_full_says_so_and_the_restore_goes_on_when_there_is_room(
    file_world: FileWorld, tmp_path: Path
) -> None:
    file_world.upload(make(tmp_path / "big", {"a": os.urandom(MIB // 2), "b": os.urandom(MIB)}))
    done = on_disk("mode=0755", file_world, between=f"mount -o remount,size=4m {file_world.work / 'disk'}")
    first, *listed = done.stdout.splitlines()
    assert first.startswith(f"{ErrorCode.DOWNLOAD} False writing to"), done.stderr
    assert "No space left on device" in first
    assert "free some space" in first
    assert listed == ["restored.partial", "restored"]


def test_a_disk_that_is_read_only_says_so(file_world: FileWorld, source: Path) -> None:
    file_world.upload(source)
    done = on_disk("ro", file_world)
    assert done.stdout.count("Read-only file system: choose a destination that can be written") == 2, done.stderr
    assert "restored" not in [line for line in done.stdout.splitlines() if not line.startswith("RLHF")]
