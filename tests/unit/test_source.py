"""The source folder belongs to somebody else: nothing outside of it is read, and what cannot be stored is named."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage import StorageError
from checkpoint_operator.storage.source import Listing, Selection, SourceTree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "volume" / "checkpoint"
    (root / "sub").mkdir(parents=True)
    (root / "a.bin").write_bytes(b"a")
    (root / "sub" / "b.bin").write_bytes(b"bb")
    return root


def scan(folder: Path, selection: Selection | None = None) -> Listing:
    with SourceTree(str(folder.parent), folder.name, selection or Selection()) as tree:
        return tree.scan()


def refusal(folder: Path, *, path: str | None = None) -> StorageError:
    with pytest.raises(StorageError) as caught, SourceTree(str(folder.parent), path or folder.name) as tree:
        tree.scan()
    return caught.value


def test_files_folders_and_links_are_listed_in_the_order_of_their_bytes(folder: Path) -> None:
    (folder / "void").mkdir()
    (folder / "Z").write_bytes(b"")
    (folder / "é").write_bytes(b"")
    (folder / "link").symlink_to("sub/b.bin")
    listing = scan(folder)
    assert [file.path for file in listing.files] == ["Z", "a.bin", "sub/b.bin", "é"]
    assert [(link.path, link.target) for link in listing.links] == [("link", "sub/b.bin")]
    assert listing.empty_directories == ("void",)
    assert listing.size == 3


@pytest.mark.parametrize("change", ["size", "time", "name", "link", "folder"])
def test_the_fingerprint_changes_with_any_change(folder: Path, change: str) -> None:
    before = scan(folder).fingerprint
    assert scan(folder).fingerprint == before
    match change:
        case "size":
            (folder / "a.bin").write_bytes(b"longer")
        case "time":
            os.utime(folder / "a.bin", ns=(1, 1))
        case "name":
            (folder / "a.bin").rename(folder / "c.bin")
        case "link":
            (folder / "l").symlink_to("a.bin")
        case "folder":
            (folder / "void").mkdir()
    assert scan(folder).fingerprint != before


@pytest.mark.parametrize(
    ("where", "target"),
    [
        ("l", "/etc/passwd"),
        ("l", ".."),
        ("l", "../other"),
        ("sub/l", "../../other"),
        ("l", "sub/../../other"),
        ("l", "./../other"),
        ("l", "sub/.."),
    ],
)
def test_a_link_that_may_leave_the_folder_is_refused_by_name(folder: Path, where: str, target: str) -> None:
    (folder / where).symlink_to(target)
    error = refusal(folder)
    assert error.reason is Reason.SOURCE_UNSUPPORTED
    assert f"'{where}'" in error.message
    assert target in error.message
    assert scan(folder, Selection(exclude=("l",))).links == ()


@pytest.mark.parametrize("target", ["a.bin", "sub", "./sub/b.bin", "gone", "sub/../sub", "."])
def test_a_link_to_the_inside_is_recorded_unless_dots_follow_a_name(folder: Path, target: str) -> None:
    (folder / "l").symlink_to(target)
    if "/../" in target:
        assert refusal(folder).reason is Reason.SOURCE_UNSUPPORTED
    else:
        assert scan(folder).links[0].target == target


def test_a_chain_of_links_cannot_climb_out(folder: Path) -> None:
    # Each of them stays inside by its text alone; together they lead to the folder above.
    (folder / "sub" / "up").symlink_to("..")
    (folder / "out").symlink_to("sub/up/..")
    assert (folder / "out").resolve() == folder.parent
    assert "'out'" in refusal(folder).message


def test_a_link_to_a_name_that_is_not_utf8_is_refused(folder: Path) -> None:
    os.symlink(b"\xff\xfe", os.fsencode(folder / "l"))
    error = refusal(folder)
    assert error.reason is Reason.SOURCE_UNSUPPORTED
    assert error.message.encode()


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_a_special_file_is_refused_by_name_and_nobody_waits_for_it(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "sub" / "special"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        # An address of a socket ends at 108 bytes, and pytest's folders are often longer: its name alone is not.
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    error = refusal(folder)
    assert error.reason is Reason.SOURCE_UNSUPPORTED
    assert "'sub/special'" in error.message
    assert len(scan(folder, Selection(exclude=("special",))).files) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (b"back\\slash", "backslash"),
        (b"new\nline", "control character"),
        (b"not-utf8-\xff", "not valid UTF-8"),
        (b".probe-1", "reserved"),
        (b".metadata.deleting.json", "reserved"),
    ],
)
def test_a_name_that_some_store_cannot_keep_is_refused(folder: Path, name: bytes, said: str) -> None:
    (folder / os.fsdecode(name)).write_bytes(b"")
    error = refusal(folder)
    assert error.reason is Reason.UNSUPPORTED_NAME
    assert said in error.message
    assert error.message.isprintable()


def test_a_single_file_with_the_name_of_the_marker_is_refused(folder: Path) -> None:
    (folder / ".metadata.json").write_bytes(b"{}")
    assert refusal(folder / ".metadata.json").reason is Reason.UNSUPPORTED_NAME


@pytest.mark.parametrize("path", ["..", "../secret", "checkpoint/../../secret", "checkpoint/.."])
def test_a_source_path_does_not_climb_out_of_its_root(folder: Path, path: str) -> None:
    secret = folder.parent.parent / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"x")
    error = refusal(folder, path=path)
    assert error.reason is Reason.INVALID_SPEC
    assert "source.path" in error.message


@pytest.mark.parametrize("path", ["linked", "linked/inner", "sub-link"])
def test_a_source_path_does_not_go_through_a_link(folder: Path, tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "inner" / "x").write_bytes(b"x")
    (folder.parent / "linked").symlink_to(outside)
    (folder.parent / "sub-link").symlink_to("checkpoint/sub")
    assert refusal(folder, path=path).reason is Reason.SOURCE_UNSUPPORTED


def test_a_missing_source_names_what_is_there(folder: Path) -> None:
    (folder.parent / os.fsdecode(b"odd-\xff")).mkdir()
    error = refusal(folder, path="checkpoint-2")
    assert error.reason is Reason.SOURCE_NOT_FOUND
    assert "checkpoint" in error.message
    assert error.message.encode()


@pytest.mark.parametrize("root", ["an empty folder", "a missing root"])
def test_nothing_to_store_is_refused(tmp_path: Path, root: str) -> None:
    (tmp_path / "empty").mkdir()
    source = tmp_path / "empty" if root == "an empty folder" else tmp_path / "gone" / "x"
    assert refusal(source).reason is (Reason.SOURCE_EMPTY if root == "an empty folder" else Reason.SOURCE_NOT_FOUND)


@pytest.mark.parametrize("swap", ["folder", "file", "fifo"])
def test_a_swap_between_scan_and_open_does_not_leave_the_folder(folder: Path, tmp_path: Path, swap: str) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(folder / "sub", outside)
    (outside / "b.bin").write_bytes(b"!!")
    with SourceTree(str(folder.parent), folder.name) as tree:
        file = next(file for file in tree.scan().files if file.path == "sub/b.bin")
        path = folder / "sub" / "b.bin"
        match swap:
            case "folder":
                shutil.rmtree(folder / "sub")
                (folder / "sub").symlink_to(outside)
            case "file":
                path.unlink()
                path.symlink_to(outside / "b.bin")
            case "fifo":
                path.unlink()
                os.mkfifo(path)
        with pytest.raises(StorageError) as caught:
            tree.open(file)
    assert caught.value.reason is Reason.SOURCE_CHANGED


def test_a_root_that_is_swapped_after_it_was_opened_is_still_the_old_one(folder: Path) -> None:
    with SourceTree(str(folder.parent), folder.name) as tree:
        folder.rename(folder.parent / "moved")
        folder.mkdir()
        (folder / "other").write_bytes(b"")
        assert [file.path for file in tree.scan().files] == ["a.bin", "sub/b.bin"]


def test_a_file_is_read_to_the_byte_or_not_at_all(folder: Path) -> None:
    with SourceTree(str(folder.parent), folder.name) as tree:
        file = next(file for file in tree.scan().files if file.path == "sub/b.bin")
        with tree.open(file) as opened:
            assert opened.read(0, 2) == b"bb"
            assert opened.read(1, 1) == b"b"
            assert opened.read(2, 0) == b""
            with pytest.raises(StorageError, match="shorter"):
                opened.read(1, 2)


AS_NOBODY = """
import os, sys
from checkpoint_operator.storage import StorageError, StorageManager
from checkpoint_operator.storage.source import SourceTree
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with SourceTree(sys.argv[1], sys.argv[2]) as tree:
        for file in tree.scan().files:
            tree.open(file).close()
except StorageError as error:
    print(error.reason, error.message)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("locked", ["a file", "a folder", "the root"])
def test_what_may_not_be_read_is_named_with_its_owner_and_mode(tmp_path: Path, locked: str) -> None:
    volume = Path("/tmp") / f"source-{os.getpid()}-{locked.replace(' ', '-')}"  # pytest's folders are closed to others
    folder = volume / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    try:
        path = folder / "sub" / "model.safetensors"
        path.write_bytes(b"x")
        os.chown(path, 4242, 4343)
        {"a file": path, "a folder": folder / "sub", "the root": folder}[locked].chmod(0o600)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(volume), "checkpoint"], capture_output=True, text=True, timeout=60
        )
    finally:
        shutil.rmtree(volume)
    assert done.stdout.startswith("SourceUnreadable "), done.stdout + done.stderr
    assert "user 65534" in done.stdout
    if locked == "a file":
        assert "'sub/model.safetensors'" in done.stdout
        assert "4242:4343 with mode 0600" in done.stdout
        assert "user 4242 (spec.mover.runAsUser)" in done.stdout
    else:
        assert "0:0 with mode 0600; chmod it" in done.stdout


def test_too_many_open_files_are_no_change_of_the_source(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with SourceTree(str(folder.parent), folder.name) as tree:
        file = tree.scan().files[0]
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(StorageError, match="ulimit -n") as caught:
                tree.open(file)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.reason is Reason.SOURCE_UNREADABLE
        with tree.open(file) as opened:
            opened.close()  # once more does no harm
