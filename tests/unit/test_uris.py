"""A target URI is hostile until it came through the parser, and what it held is never told on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uri_cases import BAD, GOOD

from checkpoint_operator.api.uris import MAX_LENGTH, InvalidURI, TargetURI, bad_segment


@pytest.mark.parametrize("text", GOOD, ids=[f"{text[:60]!a} is a place" for text in GOOD])
def test_a_good_uri_is_taken_literally(text: str) -> None:
    uri = TargetURI.parse(text)
    assert str(uri) == text.removesuffix("/")
    assert TargetURI.parse(str(uri)) == uri


@pytest.mark.parametrize(("text", "said"), BAD.items(), ids=[f"{text[:60]!a} {said}" for text, said in BAD.items()])
def test_a_bad_uri_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(InvalidURI) as caught:
        TargetURI.parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_uri_that_is_too_long_is_refused_by_length() -> None:
    with pytest.raises(InvalidURI, match=f"at most {MAX_LENGTH}"):
        TargetURI.parse("s3://bucket/" + "x" * MAX_LENGTH)


def test_a_nul_and_half_a_character_are_refused() -> None:
    with pytest.raises(InvalidURI, match="control character"):
        TargetURI.parse("s3://bucket/a\x00b")
    with pytest.raises(InvalidURI, match="not valid UTF-8"):
        TargetURI.parse("s3://bucket/a\ud800b")


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIA:SECRET@bucket/run",
        "s3://AKIA:SEC/RET@bucket/run",
        "s3://AKIA:SEC?RET@bucket/run",
        "s3://AKIA:SEC#RET@bucket/run",
        "s3://AKIA:SEC@RET@bucket/run",
        "https://AKIA:SECRET@s3.amazonaws.com/bucket",
        "AKIA:SECRET@bucket/run",
        "file://AKIA:SECRET@host/run",
        "S3://AKIA:SECRET@bucket/" + "x" * 2000,
        "s3://bucket/run?X-Amz-Signature=SECRET",
        "https://bucket.s3.amazonaws.com/run?X-Amz-Signature=SECRET",
        "azure://container/run?sv=2024&sig=SECRET",
    ],
)
def test_a_secret_in_a_uri_is_not_repeated(text: str) -> None:
    with pytest.raises(InvalidURI) as caught:
        TargetURI.parse(text)
    assert "SEC" not in str(caught.value)
    assert "RET" not in str(caught.value)


def test_a_whole_bucket_is_fine_for_a_list_alone() -> None:
    for text in ("s3://bucket", "s3://bucket/", "file:///"):
        assert TargetURI.parse(text, allow_root=True).path == ""
    with pytest.raises(InvalidURI, match="names a host"):
        TargetURI.parse("file://host/", allow_root=True)


@pytest.mark.parametrize(
    ("prefix", "within"),
    [
        ("s3://bucket/", True),
        ("s3://bucket", True),
        ("s3://bucket/a", True),
        ("s3://bucket/a/", True),
        ("s3://bucket/a/b", True),
        ("s3://bucket/a/b/c", False),
        ("s3://bucket/a/bc", False),
        ("s3://bucket/A", False),
        ("s3://bucke", False),
        ("s3://bucket2/", False),
        ("gs://bucket/", False),
        ("file:///", False),
        ("", False),
    ],
)
def test_a_prefix_is_compared_by_whole_segments(prefix: str, within: bool) -> None:
    assert TargetURI.parse("s3://bucket/a/b").is_within(prefix) is within


def test_a_file_prefix_is_a_path_in_the_claim() -> None:
    uri = TargetURI.parse("file:///team/run")
    assert [uri.is_within(prefix) for prefix in ("file:///", "file:///team", "file:///team/run", "file:///tea")] == [
        True,
        True,
        True,
        False,
    ]


@settings(max_examples=60)
@given(st.text(max_size=60))
def test_whatever_comes_in_what_comes_out_is_a_safe_place(rest: str) -> None:
    for scheme in ("file:///", "s3://bucket/"):
        try:
            uri = TargetURI.parse(scheme + rest)
        except InvalidURI:
            continue
        assert uri.path
        assert not any(bad_segment(segment) for segment in uri.path.split("/"))
        assert uri.bucket == ("bucket" if scheme == "s3://bucket/" else "")
        assert TargetURI.parse(str(uri)) == uri
