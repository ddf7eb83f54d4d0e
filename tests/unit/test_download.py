"""A download is whole and verified, or there is none; the bytes here come from a function that can be told to fail."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.names import MARKER_NAME
from checkpoint_operator.api.protocol import Progress
from checkpoint_operator.storage import StorageError, hostile, ranges
from checkpoint_operator.storage.download import download
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.hostile import check_names
from checkpoint_operator.storage.manifest import FileTable, Link, StoredFile
from checkpoint_operator.storage.marker import Manifest, encode
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.ranges import RANGE, Fetch, Stream, fetch_all
from checkpoint_operator.storage.store import Arrived


def refused(reason: Reason) -> pytest.RaisesExc[StorageError]:
    return pytest.RaisesExc(StorageError, check=lambda error: error.reason is reason)


def into_buffers(read: Callable[[StoredFile, int, int], bytes]) -> Fetch:
    """A store whose answers come whole: (file, start, length) → bytes."""

    def fetch(file: StoredFile, start: int, into: memoryview, arrived: Arrived) -> None:
        body = read(file, start, len(into))
        into[: len(body)] = body
        arrived(0, len(body))

    return fetch


class Contents(dict[str, bytes]):
    """A store of these files that counts what it is asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.asked: list[tuple[str, int, int]] = []

    def manifest(self, uid: str = "u", **table: object) -> Manifest:
        files = [
            StoredFile(path=path, size=len(body), sha256=hashlib.sha256(body).hexdigest(), etag="e", mode=0o640, mtime_ns=7)
            for path, body in self.items()
        ]
        return Manifest(
            artifact_uid=uid,
            claim_id="c",
            source_fingerprint="f",
            content_digest="d",
            metadata=ArtifactMetadata(),
            table=FileTable(files=files).replace(**table),
        )

    def read(self, file: StoredFile, start: int, length: int) -> bytes:
        self.asked.append((file.path, start, length))
        return self[file.path][start : start + length]

    @property
    def fetch(self) -> Fetch:
        return into_buffers(self.read)


def test_a_large_file_is_fetched_in_ranges_and_counted(tmp_path: Path) -> None:
    contents = Contents({"big": b"x" * (2 * RANGE + 5), "deep/er/small": b"y", "empty": b""})
    seen: list[Progress] = []
    ticks = iter(range(10**6))
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter(seen.append, clock=lambda: float(next(ticks))))
    assert sorted(one for one in contents.asked if one[0] == "big") == [
        ("big", 0, RANGE),
        ("big", RANGE, RANGE),
        ("big", 2 * RANGE, 5),
    ]
    assert (tmp_path / "d" / "big").read_bytes() == contents["big"]
    assert (tmp_path / "d" / "empty").read_bytes() == b""
    status = (tmp_path / "d" / "deep" / "er" / "small").stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o640, 7)
    assert (seen[-1].bytes_done, seen[-1].files_done) == (seen[0].bytes_total, seen[0].files_total) == (2 * RANGE + 6, 3)


def test_a_store_that_fails_in_the_middle_leaves_no_destination_and_the_next_call_goes_on(tmp_path: Path) -> None:
    contents = Contents({"a": b"a" * 10, "b": b"b" * 10})

    @into_buffers
    def failing(file: StoredFile, start: int, length: int) -> bytes:
        if file.path == "b":
            raise StorageError(Reason.STORE_UNAVAILABLE, "gone")
        return contents.read(file, start, length)

    with pytest.raises(StorageError, match="gone"):
        download(contents.manifest(), failing, tmp_path / "d", Meter())
    assert not (tmp_path / "d").exists()
    contents.asked.clear()
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert [path for path, _, _ in contents.asked] == ["b"]
    assert not (tmp_path / "d.partial").exists()
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["a", "b"]


def test_a_store_that_fills_less_than_it_was_asked_for_is_noticed(tmp_path: Path) -> None:
    contents = Contents({"a": b"a" * 10})

    def fetch(file: StoredFile, start: int, into: memoryview, arrived: Arrived) -> None:
        into[:9] = b"a" * 9
        arrived(0, 9)

    with refused(Reason.INTEGRITY_MISMATCH):
        download(contents.manifest(), fetch, tmp_path / "d", Meter())
    assert not (tmp_path / "d").exists()


def test_what_came_before_an_answer_broke_off_is_written_over(tmp_path: Path) -> None:
    contents = Contents({"a": b"a" * 10})

    def fetch(file: StoredFile, start: int, into: memoryview, arrived: Arrived) -> None:
        into[:6] = b"wrong!"
        arrived(0, 6)
        into[:] = contents["a"]
        arrived(0, 4)
        arrived(4, 10)

    download(contents.manifest(), fetch, tmp_path / "d", Meter())
    assert (tmp_path / "d" / "a").read_bytes() == contents["a"]


def test_a_disk_that_refuses_a_piece_is_not_taken_for_a_broken_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents, calls = Contents({"a": b"a" * 10}), 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fetch(file: StoredFile, start: int, into: memoryview, arrived: Arrived) -> None:
        nonlocal calls
        for _ in range(3):
            calls += 1
            try:
                arrived(0, len(into))
            except OSError:
                continue  # as a store does with an error of its socket
            return

    monkeypatch.setattr("checkpoint_operator.storage.download.write_all", full)
    with refused(Reason.REQUEST_REJECTED):
        download(contents.manifest(), fetch, tmp_path / "d", Meter())
    assert calls == 1


def test_what_was_staged_of_another_artifact_is_thrown_away(tmp_path: Path) -> None:
    first, second = Contents({"a": b"1", "old": b"1"}), Contents({"a": b"2"})
    with pytest.raises(StorageError):
        download(first.manifest(), into_buffers(lambda *_: b""), tmp_path / "d", Meter())
    download(second.manifest("v"), second.fetch, tmp_path / "d", Meter())
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "d").iterdir()] == [("a", b"2")]


def test_links_and_empty_folders_are_made(tmp_path: Path) -> None:
    contents = Contents({"a": b"1"})
    manifest = contents.manifest(links=[Link(path="d/l", target="../a")], empty_directories=["void/inside"])
    download(manifest, contents.fetch, tmp_path / "out" / "d", Meter())
    assert (tmp_path / "out" / "d" / "d" / "l").read_bytes() == b"1"
    assert list((tmp_path / "out" / "d" / "void" / "inside").iterdir()) == []


# ---- Ranges


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> int:
    """Ranges of so few bytes that a short file has many."""
    monkeypatch.setattr(ranges, "RANGE", 10)
    return 10


class Gauge:
    """How many ranges are between the start of their fetch and the end of their hashing."""

    def __init__(self) -> None:
        self.held = self.most = 0
        self._lock = threading.Lock()

    def change(self, by: int) -> None:
        with self._lock:
            self.held += by
            self.most = max(self.most, self.held)


def test_ranges_that_come_in_any_order_are_hashed_in_theirs_and_never_more_than_have_slots_are_held(
    tmp_path: Path, small_ranges: int
) -> None:
    contents = Contents({"a": bytes(range(200)), "b": b"b" * 55, "c": bytes(reversed(range(250)))})
    others, gauge = threading.Semaphore(0), Gauge()

    class Counted(Stream):
        def finish(self, sha256: str) -> None:
            assert sha256 == self.file.sha256

        def put(self, start: int, body: memoryview) -> Iterator[memoryview]:
            for done in super().put(start, body):
                gauge.change(-1)
                yield done

    @into_buffers
    def fetch(file: StoredFile, start: int, length: int) -> bytes:
        gauge.change(1)
        if (file.path, start) == ("a", 0):
            # As late as can be: until everybody else waits for a slot.
            for _ in range(ranges.SLOTS - 1):
                assert others.acquire(timeout=30)
        else:
            others.release()
        return contents.read(file, start, length)

    table = contents.manifest().table
    fetch_all([Counted(file) for file in table.files], fetch, Meter(), threading.Event())
    assert gauge.most == ranges.SLOTS
    assert gauge.held == 0
    assert len(set(contents.asked)) == len(contents.asked) == 20 + 6 + 25


def test_the_first_failure_ends_the_others_at_their_next_range(tmp_path: Path, small_ranges: int) -> None:
    contents = Contents({"a": b"a" * 10_000, "b": b"b" * 10_000})

    @into_buffers
    def failing(file: StoredFile, start: int, length: int) -> bytes:
        if start == 50:
            raise StorageError(Reason.STORE_UNAVAILABLE, "gone")
        return contents.read(file, start, length)

    with pytest.raises(StorageError, match="gone"):
        download(contents.manifest(), failing, tmp_path / "d", Meter())
    assert len(contents.asked) < 5 + 2 * ranges.SLOTS


def test_a_cancelled_download_leaves_no_destination_and_the_next_one_goes_on(tmp_path: Path, small_ranges: int) -> None:
    contents, cancelled = Contents({"a": bytes(range(250)) * 4}), threading.Event()

    @into_buffers
    def fetch(file: StoredFile, start: int, length: int) -> bytes:
        if start == 500:
            cancelled.set()
        return contents.read(file, start, length)

    with pytest.raises(Cancelled):
        download(contents.manifest(), fetch, tmp_path / "d", Meter(), cancelled)
    assert not (tmp_path / "d").exists()
    contents.asked.clear()
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert (tmp_path / "d" / "a").read_bytes() == contents["a"]
    assert sum(length for _, _, length in contents.asked) <= 500 + ranges.SLOTS * small_ranges


# ---- What lies in the staging folder


def stop_half_way(contents: Contents, destination: Path) -> Path:
    """A staging folder with everything but the last range of the last file."""
    last = list(contents)[-1]

    @into_buffers
    def fetch(file: StoredFile, start: int, length: int) -> bytes:
        if file.path == last and start + length == file.size:
            raise StorageError(Reason.STORE_UNAVAILABLE, "gone")
        return contents.read(file, start, length)

    with pytest.raises(StorageError, match="gone"):
        download(contents.manifest(), fetch, destination, Meter())
    contents.asked.clear()
    return destination.with_name(destination.name + ".partial")


def test_what_was_staged_counts_only_as_far_as_it_hashes_right(tmp_path: Path, small_ranges: int) -> None:
    contents = Contents({"whole": b"w" * 95, "wrong": b"v" * 95, "half": bytes(range(200)), "last": b"x" * 100})
    staging = stop_half_way(contents, tmp_path / "d")
    (staging / "whole").write_bytes(contents["whole"])
    (staging / "wrong").write_bytes(b"V" * 95)
    (staging / "half").write_bytes(contents["half"][:77])
    (staging / "last").write_bytes(b"?" * 50)
    seen: list[Progress] = []
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter(seen.append))
    assert {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()} == contents
    assert {start for path, start, _ in contents.asked if path == "half"} == set(range(77, 200, 10))
    assert not [path for path, _, _ in contents.asked if path == "whole"]
    for wrong in ("wrong", "last"):
        assert {start for path, start, _ in contents.asked if path == wrong} >= set(range(0, len(contents[wrong]), 10))
    assert (seen[-1].bytes_done, seen[-1].files_done) == (490, 4)


def test_a_hole_in_a_staged_file_is_where_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE", 1 << 16)
    contents = Contents({"big": os.urandom(10 << 16)})
    staging = stop_half_way(contents, tmp_path / "d")
    with (staging / "big").open("wb") as file:
        file.write(contents["big"][: 3 << 16])
        file.seek(5 << 16)
        file.write(contents["big"][5 << 16 : 8 << 16])
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert (tmp_path / "d" / "big").read_bytes() == contents["big"]
    assert min(start for _, start, _ in contents.asked) == 3 << 16


KILLED = """
import hashlib, os, sys, threading
from pathlib import Path
from checkpoint_operator.storage import ranges
from checkpoint_operator.storage.download import download
from checkpoint_operator.storage.marker import decode
from checkpoint_operator.storage.meter import Meter
ranges.RANGE, stop, body = 1 << 16, int(sys.argv[4]), Path(sys.argv[2]).read_bytes()
manifest = decode(Path(sys.argv[1]).read_bytes(), "", "").marker
def fetch(file, start, into, arrived):
    if start == stop << 16:
        print("here", flush=True)
        threading.Event().wait()
    into[:] = body[start : start + len(into)]
    arrived(0, len(into))
download(manifest, fetch, Path(sys.argv[3]), Meter())
"""


@pytest.mark.parametrize("at", range(0, 40, 4))
def test_after_a_kill_only_what_is_missing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    contents = Contents({"big": os.urandom(40 << 16)})
    (tmp_path / "manifest").write_bytes(encode(contents.manifest()))
    (tmp_path / "body").write_bytes(contents["big"])
    arguments = [str(tmp_path / "manifest"), str(tmp_path / "body"), str(tmp_path / "d"), str(at)]
    with subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        # The ranges before it may still be on their way to the disk; those after it stop for want of slots.
        process.kill()
    assert not (tmp_path / "d").exists()
    monkeypatch.setattr(ranges, "RANGE", 1 << 16)
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert (tmp_path / "d" / "big").read_bytes() == contents["big"]
    fetched = sum(length for _, _, length in contents.asked)
    assert fetched <= (40 - at + ranges.SLOTS) << 16


def test_links_fifos_and_hard_links_that_were_planted_in_the_staging_folder_are_replaced(tmp_path: Path) -> None:
    contents = Contents({"deep/link": b"1", "fifo": b"2", "hard": b"3", "folder": b"4", "last": b"5"})
    staging = stop_half_way(contents, tmp_path / "d")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    shutil.rmtree(staging / "deep")
    (staging / "deep").symlink_to(outside)
    for name in ("fifo", "hard", "folder"):
        (staging / name).unlink()
    os.mkfifo(staging / "fifo")
    os.link(outside / "precious", staging / "hard")
    (staging / "folder" / "inside").mkdir(parents=True)
    (staging / "stray").write_bytes(b"x")
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    found = {str(path.relative_to(tmp_path / "d")): path for path in (tmp_path / "d").rglob("*") if not path.is_dir()}
    assert {name: path.read_bytes() for name, path in found.items()} == contents
    assert not any(path.is_symlink() for path in (tmp_path / "d").rglob("*"))
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"precious": b"precious"}


def test_a_link_in_the_place_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    contents = Contents({"a": b"1"})
    (tmp_path / "outside").mkdir()
    (tmp_path / "d.partial").symlink_to(tmp_path / "outside")
    with refused(Reason.DESTINATION_EXISTS):
        download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_checkpoint_that_has_the_name_of_the_staging_folder_is_left_alone(tmp_path: Path) -> None:
    # The file backend may hold one there: its manifest is no sign that the folder is a download of ours.
    contents = Contents({"a": b"1"})
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / MARKER_NAME).write_bytes(encode(contents.manifest()))
    (tmp_path / "d.partial" / "a").write_bytes(b"1")
    with refused(Reason.DESTINATION_EXISTS):
        download(contents.manifest("other"), contents.fetch, tmp_path / "d", Meter())
    assert (tmp_path / "d.partial" / "a").read_bytes() == b"1"


@pytest.mark.parametrize("left", [None, b""], ids=["no marker", "an empty marker"])
def test_a_staging_folder_that_was_killed_at_its_birth_is_taken_over(tmp_path: Path, left: bytes | None) -> None:
    contents = Contents({"a": b"1"})
    (tmp_path / "d.partial").mkdir()
    if left is not None:
        (tmp_path / "d.partial" / MARKER_NAME).write_bytes(left)
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["a"]


def test_two_downloads_to_one_place_do_not_mix(tmp_path: Path) -> None:
    contents = Contents({"a": b"1"})

    @into_buffers
    def fetch(file: StoredFile, start: int, length: int) -> bytes:
        with refused(Reason.TARGET_BUSY):
            download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
        return contents.read(file, start, length)

    download(contents.manifest(), fetch, tmp_path / "d", Meter())
    assert (tmp_path / "d" / "a").read_bytes() == b"1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_staging_folder_of_another_user_is_not_used(tmp_path: Path) -> None:
    contents = Contents({"a": b"1", "b": b"2"})
    os.chown(stop_half_way(contents, tmp_path / "d"), 12345, 12345)
    with refused(Reason.DESTINATION_EXISTS):
        download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())


def test_a_destination_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    contents = Contents({"a": b"1"})

    @into_buffers
    def fetch(file: StoredFile, start: int, length: int) -> bytes:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "mine").write_bytes(b"x")
        return contents.read(file, start, length)

    with refused(Reason.DESTINATION_EXISTS):
        download(contents.manifest(), fetch, tmp_path / "d", Meter())
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["mine"]


def test_setuid_and_its_like_are_dropped(tmp_path: Path) -> None:
    contents = Contents({"a": b"1"})
    file = contents.manifest().table.files[0]
    download(
        contents.manifest(files=[StoredFile(path="a", size=1, sha256=file.sha256, mode=0o7755)]),
        contents.fetch,
        tmp_path / "d",
        Meter(),
    )
    assert (tmp_path / "d" / "a").stat().st_mode & 0o7777 == 0o755


# ---- Disks that do not keep names as they are; no real one that folds can be counted on where tests run


def fold(monkeypatch: pytest.MonkeyPatch, folded: Callable[[str], str]) -> None:
    """Make every name that is used below an open folder what a folding disk would make of it."""
    for call in ("open", "mkdir", "stat", "unlink", "rmdir"):
        real = getattr(os, call)

        def wrapped(path: object, *args: object, _real: Callable[..., object] = real, **options: object) -> object:
            below = isinstance(path, str) and options.get("dir_fd") is not None
            return _real(folded(str(path)) if below else path, *args, **options)

        monkeypatch.setattr(os, call, wrapped)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["Model.bin", "model.bin"], str.lower),
        (["Sub/a", "sub/b"], str.lower),
        (["sub", "Sub/b"], str.lower),
        (["\u00e9", "e\u0301"], lambda name: unicodedata.normalize("NFC", name)),
        (["x.", "x"], lambda name: name.rstrip(".")),
    ],
    ids=["files", "folders", "a file and a folder", "Unicode forms", "a trailing dot"],
)
def test_two_names_that_are_one_on_the_disk_are_both_named_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], folded: Callable[[str], str]
) -> None:
    contents = Contents(dict.fromkeys(names, b"x"))
    fold(monkeypatch, folded)
    with refused(Reason.UNSUPPORTED_NAME) as caught:
        download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert all(name.split("/")[0] in caught.value.message for name in names)
    assert contents.asked == []
    assert not (tmp_path / "d").exists()


def test_a_name_that_the_disk_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = Contents({"x.": b"x"})
    fold(monkeypatch, lambda name: name.rstrip("."))
    with refused(Reason.UNSUPPORTED_NAME):
        download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert contents.asked == []


# ---- Manifests of somebody who means harm


@pytest.mark.parametrize(
    "name",
    ["n" * 256, "ü" * 128, "/".join("d" * 65), f"sub/{MARKER_NAME}", ".metadata.deleting.json", ".probe-x", "a\0b", "a\nb"],
    ids=["long", "long in bytes", "deep", "a marker below", "a deletion's marker", "a probe", "NUL", "newline"],
)
def test_a_name_that_cannot_be_is_refused_before_the_first_byte(tmp_path: Path, name: str) -> None:
    contents = Contents({"a": b"1", name: b"x"})
    with refused(Reason.UNSUPPORTED_NAME):
        download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert contents.asked == []
    assert list(tmp_path.iterdir()) == []


def test_names_are_checked_in_a_time_that_grows_with_their_number_alone() -> None:
    # Each of them 64 deep: a walk up from every one would look at 64 times as many folders.
    table = FileTable(files=[StoredFile(path="/".join(["d"] * 63) + f"/{n}", size=0, sha256="") for n in range(1000)])
    looked = 0

    class Counting(set[str]):
        def __contains__(self, item: object) -> bool:
            nonlocal looked
            looked += 1
            return super().__contains__(item)

    names = [file.path for file in table.files]
    hostile._check_folders(names, Counting(names))
    assert looked == 63
    check_names(table)


def test_a_file_that_is_longer_in_the_manifest_than_in_the_store_is_noticed(tmp_path: Path) -> None:
    contents = Contents({"a": b"1" * 10})
    file = contents.manifest().table.files[0]
    with refused(Reason.INTEGRITY_MISMATCH):
        download(
            contents.manifest(files=[StoredFile(path="a", size=1 << 40, sha256=file.sha256)]),
            contents.fetch,
            tmp_path / "d",
            Meter(),
        )
    assert not (tmp_path / "d").exists()
