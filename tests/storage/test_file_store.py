"""What only a volume does: links that somebody planted, staging folders, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from storage_world import CHECKPOINT, MARKER, MIB, FileWorld, OnLook, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Layout, Progress, Stage
from checkpoint_operator.storage import StorageError, folders, volume
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.manifest import FileTable, Link, StoredFile
from checkpoint_operator.storage.marker import encode

STAGING = ".partial-uid-a"


# ---- Links that somebody planted


@pytest.mark.parametrize("where", ["team", "team/test", "team/test/run", "team/test/run/deep"])
def test_a_link_in_the_way_to_the_target_is_not_followed(file_world: FileWorld, source: Path, where: str) -> None:
    outside = make(file_world.work / "outside", {"precious": b"x"})
    link = file_world.root / where
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(StorageError) as caught:
        file_world.upload(source, "run/deep")
    assert caught.value.reason in (Reason.REQUEST_REJECTED, Reason.TARGET_NOT_EMPTY)
    assert file_world.delete("run/deep") == "nothing is left there"
    with refused(Reason.NOT_FOUND):
        file_world.backend.get_metadata(file_world.uri("run/deep"))
    assert tree(outside) == {"precious": b"x"}


def test_lists_and_downloads_follow_no_link(file_world: FileWorld, source: Path) -> None:
    file_world.upload(source)
    secret = make(file_world.work / "outside", {"model.safetensors": b"WEIGHTS"})
    shutil.copytree(file_world.place / "run", secret / "checkpoint")
    (file_world.place / "linked").symlink_to(secret / "checkpoint")
    listed = [found.storage_path for found in file_world.backend.list_artifacts(file_world.uri("run"))]
    assert listed == [str(file_world.uri())]
    assert list(file_world.backend.list_artifacts(file_world.uri("linked"))) == []
    file_world.remove("run/model.safetensors")
    (file_world.place / "run" / "model.safetensors").symlink_to(secret / "model.safetensors")
    with refused(Reason.INTEGRITY_MISMATCH):
        file_world.download()


def test_a_fifo_in_the_place_of_a_file_blocks_nobody(file_world: FileWorld, source: Path) -> None:
    file_world.upload(source)
    file_world.remove("run/model.safetensors")
    os.mkfifo(file_world.place / "run" / "model.safetensors")
    with refused(Reason.INTEGRITY_MISMATCH):
        file_world.download()
    file_world.remove(f"run/{MARKER}")
    os.mkfifo(file_world.place / "run" / MARKER)
    with refused(Reason.TARGET_NOT_EMPTY):
        file_world.upload(source)


@pytest.mark.parametrize(
    "table",
    [
        FileTable(files=[StoredFile(path="../../../outside/precious", size=1, sha256="")]),
        FileTable(files=[], links=[Link(path="../../../outside/precious", target="x")]),
        FileTable(files=[], empty_directories=["../../../outside/void"]),
    ],
    ids=["file", "link", "folder"],
)
def test_a_deletion_does_not_follow_a_manifest_out_of_the_folder(
    file_world: FileWorld, source: Path, table: FileTable
) -> None:
    # Whoever may write into the volume may write a manifest; the operator's deletion has more rights than they.
    file_world.upload(source)
    outside = make(file_world.root / "outside", {"precious": b"x"})
    (outside / "void").mkdir()
    manifest = file_world.backend.get_manifest(file_world.uri())
    file_world.put(f"run/{MARKER}", encode(manifest.replace(table=table)))
    with refused(Reason.UNSUPPORTED_NAME):
        file_world.delete()
    assert tree(outside) == {"precious": b"x", "void": None}


# ---- Places


@pytest.mark.parametrize("layout", list(Layout))
def test_a_target_inside_the_source_is_refused_and_nothing_is_made_there(file_world: FileWorld, layout: Layout) -> None:
    source = make(file_world.place / "source", {"x": b"x"})
    with refused(Reason.INVALID_SPEC):
        file_world.upload(source, "source/backup/run", layout=layout)
    with pytest.raises(StorageError):
        file_world.upload(source, "source", layout=layout)
    assert tree(source) == {"x": b"x"}


def test_a_file_or_a_folder_that_is_not_empty_is_in_the_way(file_world: FileWorld, source: Path) -> None:
    file_world.put("file", b"mine")
    file_world.put("folder/notes.txt", b"mine")
    before = tree(file_world.place)
    for name in ("file", "folder", "file/below"):
        with pytest.raises(StorageError) as caught:
            file_world.upload(source, name)
        assert not caught.value.retryable
    assert tree(file_world.place) == before


def test_an_empty_folder_is_no_obstacle(file_world: FileWorld, source: Path) -> None:
    (file_world.place / "run").mkdir(parents=True)
    assert file_world.upload(source).data_owner


def test_a_folder_that_gets_content_during_the_upload_is_not_replaced(file_world: FileWorld, source: Path) -> None:
    def intrude(progress: Progress) -> None:
        if progress.stage is Stage.VERIFYING:
            file_world.put("run/notes.txt", b"mine")

    with refused(Reason.TARGET_NOT_EMPTY):
        file_world.upload(source, progress=intrude)
    assert tree(file_world.place / "run") == {"notes.txt": b"mine"}
    file_world.delete()
    assert file_world.paths() == ["run/notes.txt"]


def test_of_two_artifacts_the_one_that_renames_first_has_the_place(file_world: FileWorld, source: Path) -> None:
    other = make(file_world.work / "other", {"x": b"other"})

    def overtake(progress: Progress) -> None:
        if progress.stage is Stage.VERIFYING:
            file_world.upload(other, uid="uid-b")

    with refused(Reason.TARGET_EXISTS):
        file_world.upload(source, progress=overtake)
    assert tree(file_world.download()) == tree(other)


def test_a_half_removed_artifact_is_invisible_and_its_removal_goes_on(file_world: FileWorld, source: Path) -> None:
    file_world.upload(source)
    folder = file_world.place / "run"
    (folder / MARKER).rename(folder / ".metadata.deleting.json")
    (folder / "config.json").unlink()
    with refused(Reason.NOT_FOUND):
        file_world.backend.get_metadata(file_world.uri())
    assert list(file_world.backend.list_artifacts(file_world.uri())) == []
    with refused(Reason.TARGET_BUSY):
        file_world.upload(source)
    file_world.delete()
    assert not folder.exists()
    assert file_world.upload(source).data_owner


def test_a_whole_volume_may_be_restored_from_without_write_access(file_world: FileWorld) -> None:
    file_world.upload(CHECKPOINT)
    assert tree(file_world.download()) == tree(CHECKPOINT)
    assert not [path for path in file_world.paths() if "partial" in path]


# ---- Staging


@pytest.mark.usefixtures("sequential")
def test_what_an_earlier_attempt_staged_is_kept_where_it_is_right_and_rewritten_where_not(file_world: FileWorld) -> None:
    source = make(file_world.work / "source", {f"{n}.bin": bytes([n]) * 9 for n in range(5)})
    with pytest.raises(Cancelled):
        file_world.upload(source, cancelled=OnLook(4))
    staging = file_world.place / STAGING
    kept = (staging / "0.bin").stat().st_ino
    (staging / "1.bin").write_bytes(b"wrong and longer than before")
    make(staging, {"stray/file": b"x", MARKER: b"{}"})
    (staging / "2.bin").unlink()
    (staging / "2.bin").symlink_to(file_world.work / "outside")
    os.mkfifo(staging / "4.bin")
    file_world.upload(source)
    assert (file_world.place / "run" / "0.bin").stat().st_ino == kept
    assert tree(file_world.download()) == tree(source)
    assert not (file_world.work / "outside").exists()
    assert file_world.paths() == [f"run/{MARKER}", *(f"run/{n}.bin" for n in range(5))]


def test_a_failed_attempt_is_cleaned_by_the_deletion_of_its_artifact_alone(file_world: FileWorld, source: Path) -> None:
    for uid in ("uid-a", "uid-b"):
        with pytest.raises(Cancelled):
            file_world.upload(source, uid=uid, cancelled=OnLook(2))
    file_world.delete()
    assert {path.split("/")[0] for path in file_world.paths()} == {".partial-uid-b"}
    assert list(file_world.manager().list(file_world.base)) == []


# ---- Locks

UPLOADER = """
import sys
from checkpoint_operator.storage import StorageManager, TargetOptions
def report(progress):
    print("reading", flush=True)
    sys.stdin.readline()
StorageManager(TargetOptions(file_root=sys.argv[1])).upload(sys.argv[2], sys.argv[3], uid="uid-a", progress=report)
"""


def test_two_processes_cannot_store_one_artifact_at_once(file_world: FileWorld, source: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, str(file_world.root), str(source), str(file_world.uri())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == b"reading\n"
        for act in (lambda: file_world.upload(source), file_world.delete):
            with refused(Reason.TARGET_BUSY):
                act()
    finally:
        out, _ = first.communicate(b"\n" * 9, timeout=60)
    assert first.returncode == 0, out
    assert file_world.upload(source).data_owner
    assert tree(file_world.download()) == tree(source)


def test_a_process_that_dies_leaves_no_lock(file_world: FileWorld, source: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, str(file_world.root), str(source), str(file_world.uri())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == b"reading\n"
    first.kill()
    first.communicate(timeout=60)
    assert (file_world.place / STAGING).is_dir()
    file_world.upload(source)
    assert tree(file_world.download()) == tree(source)


@pytest.mark.parametrize("act", ["upload", "delete"])
def test_a_staging_folder_that_was_committed_between_open_and_lock_is_left_alone(
    file_world: FileWorld, source: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    with pytest.raises(Cancelled):
        file_world.upload(source, cancelled=OnLook(3))
    lock, overtaken = folders.lock_named, False

    def overtake(parent: int, name: str, folder: int) -> bool:
        """The other process commits after we opened its folder; then we get the lock."""
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            file_world.upload(source)
        return lock(parent, name, folder)

    monkeypatch.setattr(folders, "lock_named", overtake)
    monkeypatch.setattr(volume, "lock_named", overtake)
    with refused(Reason.TARGET_BUSY):
        if act == "upload":
            file_world.upload(source)
        else:
            file_world.delete(keep=True)
    monkeypatch.undo()
    assert overtaken
    assert tree(file_world.download()) == tree(source)


def test_a_removal_waits_for_whoever_holds_the_artifact(file_world: FileWorld, source: Path) -> None:
    file_world.upload(source)
    descriptor = os.open(file_world.place / "run", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with refused(Reason.TARGET_BUSY):
            file_world.delete()
    finally:
        os.close(descriptor)
    assert file_world.delete() == "nothing is left there"


def test_a_disk_that_is_full_is_no_verdict(file_world: FileWorld, tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"big": b"x" * (3 * MIB)})
    script = (
        "import sys\n"
        "from checkpoint_operator.storage import StorageError, StorageManager, TargetOptions\n"
        "try:\n"
        "    StorageManager(TargetOptions(file_root=sys.argv[1])).upload(sys.argv[2], sys.argv[3], uid='uid-a')\n"
        "except StorageError as error:\n"
        "    print(error.reason, error.retryable)\n"
    )
    small_disk = 'mount -t tmpfs -o size=1m small "$1" || exit 77; shift; exec "$@"'
    command = [sys.executable, "-c", script, str(file_world.root), str(source), str(file_world.uri())]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", small_disk, "sh", str(file_world.root), *command],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert done.stdout == "StoreUnavailable True\n", done.stderr
