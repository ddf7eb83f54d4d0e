"""A download is whole and verified, or there is none; the bytes here come from a function that can be told to fail."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Progress
from checkpoint_operator.storage import StorageError
from checkpoint_operator.storage.download import CHUNK, download
from checkpoint_operator.storage.manifest import FileTable, Link, StoredFile
from checkpoint_operator.storage.marker import Manifest
from checkpoint_operator.storage.transfer import Meter


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

    def fetch(self, file: StoredFile, start: int, length: int) -> bytes:
        self.asked.append((file.path, start, length))
        return self[file.path][start : start + length]


def test_a_large_file_is_fetched_in_ranges_and_counted(tmp_path: Path) -> None:
    contents = Contents({"big": b"x" * (2 * CHUNK + 5), "deep/er/small": b"y", "empty": b""})
    seen: list[Progress] = []
    ticks = iter(range(10**6))
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter(seen.append, clock=lambda: float(next(ticks))))
    assert sorted(one for one in contents.asked if one[0] == "big") == [
        ("big", 0, CHUNK),
        ("big", CHUNK, CHUNK),
        ("big", 2 * CHUNK, 5),
    ]
    assert (tmp_path / "d" / "big").read_bytes() == contents["big"]
    assert (tmp_path / "d" / "empty").read_bytes() == b""
    status = (tmp_path / "d" / "deep" / "er" / "small").stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o640, 7)
    assert (seen[-1].bytes_done, seen[-1].files_done) == (seen[0].bytes_total, seen[0].files_total) == (2 * CHUNK + 6, 3)


def test_a_store_that_fails_in_the_middle_leaves_no_destination_and_the_next_call_goes_on(tmp_path: Path) -> None:
    contents = Contents({"a": b"a" * 10, "b": b"b" * 10})

    def failing(file: StoredFile, start: int, length: int) -> bytes:
        if file.path == "b":
            raise StorageError(Reason.STORE_UNAVAILABLE, "gone")
        return contents.fetch(file, start, length)

    with pytest.raises(StorageError, match="gone"):
        download(contents.manifest(), failing, tmp_path / "d", Meter())
    assert not (tmp_path / "d").exists()
    contents.asked.clear()
    download(contents.manifest(), contents.fetch, tmp_path / "d", Meter())
    assert [path for path, _, _ in contents.asked] == ["b"]
    assert not (tmp_path / "d.partial").exists()
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["a", "b"]


def test_a_store_that_gives_back_too_little_is_noticed(tmp_path: Path) -> None:
    contents = Contents({"a": b"a" * 10})
    with pytest.raises(StorageError) as caught:
        download(contents.manifest(), lambda *_: b"a" * 9, tmp_path / "d", Meter())
    assert caught.value.reason is Reason.INTEGRITY_MISMATCH
    assert not (tmp_path / "d").exists()


def test_what_was_staged_of_another_artifact_is_thrown_away(tmp_path: Path) -> None:
    first, second = Contents({"a": b"1", "old": b"1"}), Contents({"a": b"2"})
    with pytest.raises(StorageError):
        download(first.manifest(), lambda *_: b"", tmp_path / "d", Meter())
    download(second.manifest("v"), second.fetch, tmp_path / "d", Meter())
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "d").iterdir()] == [("a", b"2")]


def test_links_and_empty_folders_are_made(tmp_path: Path) -> None:
    contents = Contents({"a": b"1"})
    manifest = contents.manifest(links=[Link(path="d/l", target="../a")], empty_directories=["void/inside"])
    download(manifest, contents.fetch, tmp_path / "out" / "d", Meter())
    assert (tmp_path / "out" / "d" / "d" / "l").read_bytes() == b"1"
    assert list((tmp_path / "out" / "d" / "void" / "inside").iterdir()) == []
