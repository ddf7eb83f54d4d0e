"""Two checkpoints are the same when their content is, wherever and whenever they were stored."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from checkpoint_operator.storage.manifest import (
    FileTable,
    Link,
    StoredFile,
    content_digest,
    digest_lines,
    link_problem,
)

A = StoredFile(path="a", size=1, sha256="aa")
B = StoredFile(path="b/é", size=2, sha256="bb")
TABLE = FileTable(files=[A, B], links=[Link(path="l", target="a"), Link(path="m", target="b")], empty_directories=["v", "w"])


def test_the_canonical_form_is_one_json_array_a_line() -> None:
    lines = [
        '["a",1,"aa"]',
        '["b/é",2,"bb"]',
        '["link","l","a"]',
        '["link","m","b"]',
        '["directory","v"]',
        '["directory","w"]',
    ]
    expected = "".join(f"{line}\n" for line in lines).encode()
    assert content_digest(TABLE) == f"sha256:{hashlib.sha256(expected).hexdigest()}"


def test_the_digest_does_not_depend_on_the_order() -> None:
    turned = TABLE.replace(files=TABLE.files[::-1], links=TABLE.links[::-1], empty_directories=TABLE.empty_directories[::-1])
    assert content_digest(turned) == content_digest(TABLE)


@pytest.mark.parametrize(
    "change", [{"mode": 0o600}, {"mtime_ns": 5}, {"etag": '"x"'}, {"generation": 7}, {"parts": 3, "part_size": 1}]
)
def test_the_digest_does_not_depend_on_how_and_where_it_was_stored(change: dict[str, object]) -> None:
    assert content_digest(TABLE.replace(files=[dataclasses.replace(A, **change), B])) == content_digest(TABLE)


@pytest.mark.parametrize(
    "other",
    [
        TABLE.replace(files=[A]),
        TABLE.replace(files=[dataclasses.replace(A, size=2), B]),
        TABLE.replace(files=[dataclasses.replace(A, sha256="ab"), B]),
        TABLE.replace(files=[dataclasses.replace(A, path="A"), B]),
        TABLE.replace(links=[]),
        TABLE.replace(links=[Link(path="l", target="b"), Link(path="m", target="a")]),
        TABLE.replace(empty_directories=["v"]),
        TABLE.replace(files=[A, dataclasses.replace(B, path="b/e\u0301")]),
    ],
)
def test_the_digest_changes_with_the_content(other: FileTable) -> None:
    assert content_digest(other) != content_digest(TABLE)


def test_lines_cannot_be_shifted_into_each_other() -> None:
    assert digest_lines([["a", "b"]]) != digest_lines([["a"], ["b"]])
    assert digest_lines([["a\n"]]) != digest_lines([["a"], []])
    assert digest_lines([]) == f"sha256:{hashlib.sha256().hexdigest()}"


def test_files_sort_by_their_bytes_and_not_by_code_units() -> None:
    # In UTF-16 the second would come first.
    high, low = StoredFile(path="\U0001f525", size=1, sha256=""), StoredFile(path="\uffff", size=1, sha256="")
    assert content_digest(FileTable(files=[high, low])) == digest_lines([["\uffff", 1, ""], ["\U0001f525", 1, ""]])


@pytest.mark.parametrize(
    ("path", "target", "fine"),
    [
        ("l", "a", True),
        ("l", "a/b/c", True),
        ("d/l", "../a", True),
        ("d/e/l", "../../a", True),
        ("d/l", "..", True),
        ("l", ".", True),
        ("l", "..", False),
        ("d/l", "../..", False),
        ("d/l", "../../d", False),
        ("l", "/a", False),
        ("d/l", "x/..", False),
        ("d/l", "./..", False),
        ("l", "a\\b", False),
        ("l", "a\nb", False),
    ],
)
def test_a_link_stays_inside_whatever_else_is_there(path: str, target: str, fine: bool) -> None:
    assert (link_problem(path, target) is None) is fine
