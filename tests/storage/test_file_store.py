"""What only a volume does: links that somebody planted, staging folders, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from storage_world import CHECKPOINT, MARKER, MIB, FileWorld, OnLook, make, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Layout, Progress, Stage
from checkpoint_operator.storage import StorageError, folders, staging, volume
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.manifest import FileTable, Link, StoredFile
from checkpoint_operator.storage.marker import encode
from checkpoint_operator.storage.source import OpenFile

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
    shutil.copytree(file_world.folder / "run", secret / "checkpoint")
    (file_world.folder / "linked").symlink_to(secret / "checkpoint")
    listed = [found.storage_path for found in file_world.backend.list_artifacts(file_world.uri("run"))]
    assert listed == [str(file_world.uri())]
    assert list(file_world.backend.list_artifacts(file_world.uri("linked"))) == []
    file_world.remove("run/model.safetensors")
    (file_world.folder / "run" / "model.safetensors").symlink_to(secret / "model.safetensors")
    with refused(Reason.INTEGRITY_MISMATCH):
        file_world.download()


def test_a_fifo_in_the_place_of_a_file_blocks_nobody(file_world: FileWorld, source: Path) -> None:
    file_world.upload(source)
    file_world.remove("run/model.safetensors")
    os.mkfifo(file_world.folder / "run" / "model.safetensors")
    with refused(Reason.INTEGRITY_MISMATCH):
        file_world.download()
    file_world.remove(f"run/{MARKER}")
    os.mkfifo(file_world.folder / "run" / MARKER)
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
    source = make(file_world.folder / "source", {"x": b"x"})
    with refused(Reason.INVALID_SPEC):
        file_world.upload(source, "source/backup/run", layout=layout)
    with pytest.raises(StorageError):
        file_world.upload(source, "source", layout=layout)
    assert tree(source) == {"x": b"x"}


def test_a_file_or_a_folder_that_is_not_empty_is_in_the_way(file_world: FileWorld, source: Path) -> None:
    file_world.put("file", b"mine")
    file_world.put("folder/notes.txt", b"mine")
    before = tree(file_world.folder)
    for name in ("file", "folder", "file/below"):
        with pytest.raises(StorageError) as caught:
            file_world.upload(source, name)
        assert not caught.value.retryable
    assert tree(file_world.folder) == before


def test_an_empty_folder_is_no_obstacle(file_world: FileWorld, source: Path) -> None:
    (file_world.folder / "run").mkdir(parents=True)
    assert file_world.upload(source).data_owner


def test_a_folder_that_gets_content_during_the_upload_is_not_replaced(file_world: FileWorld, source: Path) -> None:
    def intrude(progress: Progress) -> None:
        if progress.stage is Stage.VERIFYING:
            file_world.put("run/notes.txt", b"mine")

    with refused(Reason.TARGET_NOT_EMPTY):
        file_world.upload(source, progress=intrude)
    assert tree(file_world.folder / "run") == {"notes.txt": b"mine"}
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
    folder = file_world.folder / "run"
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
    staging = file_world.folder / STAGING
    kept = (staging / "0.bin").stat().st_ino
    (staging / "1.bin").write_bytes(b"wrong and longer than before")
    make(staging, {"stray/file": b"x", MARKER: b"{}"})
    (staging / "2.bin").unlink()
    (staging / "2.bin").symlink_to(file_world.work / "outside")
    os.mkfifo(staging / "4.bin")
    file_world.upload(source)
    assert (file_world.folder / "run" / "0.bin").stat().st_ino == kept
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
    assert (file_world.folder / STAGING).is_dir()
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
    descriptor = os.open(file_world.folder / "run", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with refused(Reason.TARGET_BUSY):
            file_world.delete()
    finally:
        os.close(descriptor)
    assert file_world.delete() == "nothing is left there"


# ---- Copies


def interrupted(file_world: FileWorld, source: Path, look: int) -> Path:
    with pytest.raises(Cancelled):
        file_world.upload(source, cancelled=OnLook(look))
    return file_world.folder / STAGING


class Reads:
    """Counts what is read of the source: every way that a copy may take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        real = staging._copy

        def counted(source: OpenFile, *arguments: Any) -> str:
            self.paths.append(source.file.path)
            return real(source, *arguments)

        monkeypatch.setattr(staging, "_copy", counted)


@pytest.mark.usefixtures("sequential")
def test_what_was_staged_is_not_read_again_unless_its_source_or_its_copy_has_changed(
    file_world: FileWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "source", {f"{n}.bin": bytes([n]) * 100 for n in range(6)})
    staged = interrupted(file_world, source, 6)
    # Each with the size and the mtime that it had: an rsync, and somebody on the volume.
    for path in (source / "1.bin", staged / "2.bin"):
        before = path.stat()
        path.write_bytes(b"x" * 100)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.link(staged / "3.bin", file_world.work / "second-name")
    reads = Reads(monkeypatch)
    file_world.upload(source)
    assert reads.paths == ["1.bin", "2.bin", "3.bin", "5.bin"]
    assert tree(file_world.download()) == tree(source)
    file_world.backend.verify_artifact(file_world.uri())


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("damage", [b"", b"\xff\x00[]\nnull\n[1]\n[1,2,3,4]\n", None], ids=["empty", "nonsense", "gone"])
def test_a_journal_that_says_nothing_costs_a_copy_and_nothing_else(
    file_world: FileWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    source = make(tmp_path / "source", {f"{n}.bin": bytes([n]) * 100 for n in range(4)})
    journal = interrupted(file_world, source, 3) / staging.JOURNAL
    journal.unlink()
    if damage is not None:
        journal.write_bytes(damage)
    reads = Reads(monkeypatch)
    file_world.upload(source)
    assert len(reads.paths) == 4
    assert file_world.paths() == [f"run/{MARKER}", *(f"run/{n}.bin" for n in range(4))]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EIO, None])
def test_where_the_kernel_cannot_copy_it_is_read_and_written(
    file_world: FileWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    content = os.urandom(MIB) * 20 + b"tail"
    source = make(tmp_path / "source", {"big": content, "small": b"x"})
    real, calls = os.copy_file_range, 0

    def refusing(*arguments: int) -> int:
        """Copies a piece and a half, then says that it cannot (None: that nothing was copied)."""
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(*arguments)
        if calls == 2:
            return real(arguments[0], arguments[1], arguments[2] // 2, *arguments[3:])
        if number is None:
            return 0
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refusing)
    monkeypatch.setattr(staging, "WORKERS", 1)
    file_world.upload(source)
    assert calls >= 3
    assert file_world.get("run/big") == content
    file_world.backend.verify_artifact(file_world.uri())


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_a_source_on_another_file_system_is_stored_the_same(file_world: FileWorld) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        source = make(Path(other) / "source", {"big": os.urandom(MIB) * 9 + b"x", "sub/small": b"y", "empty": b""})
        file_world.upload(source)
        assert tree(file_world.download()) == tree(source)


def test_a_sparse_file_of_three_gibibytes_takes_no_more_room_than_it_has_data(file_world: FileWorld, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse.bin").open("wb") as file:
        file.truncate(3 << 30)
        for place in (5, (1 << 30) - 3, (3 << 30) - 9):
            file.seek(place)
            file.write(b"islands")
    file_world.upload(source)
    copy = file_world.folder / "run" / "sparse.bin"
    assert copy.stat().st_size == 3 << 30
    assert copy.stat().st_blocks * 512 < 256 * MIB
    with copy.open("rb") as file:
        for place in (5, (1 << 30) - 3, (3 << 30) - 9):
            file.seek(place)
            assert file.read(7) == b"islands"


def test_a_hole_that_is_none_is_copied_all_the_same(
    file_world: FileWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # File systems have reported holes where data was that had not reached the disk yet.
    source = make(tmp_path / "source", {"big": os.urandom(MIB) * 20})
    monkeypatch.setattr(staging, "_next_data", lambda descriptor, start, size: (size, size))
    file_world.upload(source)
    assert tree(file_world.download()) == tree(source)


def test_the_first_file_that_fails_ends_the_upload_and_nothing_is_visible(file_world: FileWorld, tmp_path: Path) -> None:
    source = make(tmp_path / "source", {f"{n:03}": b"x" * 100 for n in range(200)})
    read: list[int] = []

    def vanish(progress: Progress) -> None:
        read.append(progress.files_done)
        (source / "003").unlink(missing_ok=True)

    with refused(Reason.SOURCE_CHANGED):
        file_world.upload(source, progress=vanish)
    assert not (file_world.folder / "run").exists()


# ---- Disks that refuse

UPLOAD = """
import sys
from checkpoint_operator.storage import StorageError, StorageManager, TargetOptions
manager = StorageManager(TargetOptions(file_root=sys.argv[1]))
try:
    manager.upload(sys.argv[2], sys.argv[3], uid="uid-a")
except StorageError as error:
    print(error.code, error.reason, error.retryable, error.message)
print([found.storage_path for found in manager.list("file:///team/")])
"""


def upload_to_disk(file_world: FileWorld, source: Path, options: str, between: str = ":") -> list[str]:
    """Upload twice to a volume that is a disk of its own, mounted with these options; ``between`` is run in the middle."""
    script = f"""
        mount -t tmpfs -o size=1m,{options} small {file_world.root} || exit 77
        "$@"; {between} || exit 77; "$@"
    """
    command = [sys.executable, "-c", UPLOAD, str(file_world.root), str(source), str(file_world.uri())]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    assert not done.stderr
    return done.stdout.splitlines()


def test_a_volume_that_is_full_is_no_verdict_shows_nothing_and_the_upload_goes_on_when_there_is_room(
    file_world: FileWorld, tmp_path: Path
) -> None:
    source = make(tmp_path / "source", {"big": b"x" * (3 * MIB), "small": b"y"})
    first, nothing, there = upload_to_disk(file_world, source, "mode=0755", f"mount -o remount,size=9m {file_world.root}")
    assert first.startswith("RLHF059 StoreUnavailable True")
    assert "No space left on device: make room on the volume" in first
    assert (nothing, there) == ("[]", f"['{file_world.uri()}']")


def test_a_volume_that_is_read_only_says_so(file_world: FileWorld, source: Path) -> None:
    first, nothing, *_ = upload_to_disk(file_world, source, "ro")
    assert first.startswith("RLHF058 CredentialsRefused False")
    assert "Read-only file system: mount the volume writable" in first
    assert nothing == "[]"


def test_a_volume_without_room_for_another_file_is_no_verdict(file_world: FileWorld, tmp_path: Path) -> None:
    source = make(tmp_path / "source", {f"{n}": b"x" for n in range(50)})
    first, nothing, *_ = upload_to_disk(file_world, source, "nr_inodes=20")
    assert first.startswith("RLHF059 StoreUnavailable True")
    assert nothing == "[]"
