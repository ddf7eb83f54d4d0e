"""The mover's last line always fits into a termination message, and a library's chatter is never taken for one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import (
    RESULT_MAX_BYTES,
    Failure,
    Operation,
    Plan,
    Progress,
    Result,
    Stored,
    encode_line,
    parse_line,
)


def failed(message: str) -> Result:
    return Result(failure=Failure(reason=Reason.STORE_UNAVAILABLE, message=message))


HOSTILE = {
    "ascii": "x" * 9000,
    "umlauts": "ü" * 9000,
    "emoji": "🔥" * 9000,
    "quotes": '"' * 9000,
    "backslashes": "\\" * 9000,
    "control characters": "\x01" * 9000,
    "line breaks": "\n" * 9000,
    "one escape at the end": "x" * 4020 + "\x01" * 30,
    "line separators": "\u2028" * 9000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("kind", ["failure", "deleted"])
def test_a_result_is_cut_to_what_the_kubelet_keeps_and_no_further(text: str, kind: str) -> None:
    line = encode_line(failed(text) if kind == "failure" else Result(deleted=text))
    size = len(line.encode())
    # As much as fits: one more character, however long in JSON, would not.
    assert RESULT_MAX_BYTES - 12 < size <= RESULT_MAX_BYTES
    assert "\n" not in line
    result = parse_line(line.encode())
    assert isinstance(result, Result)
    said = result.failure.message if result.failure else result.deleted
    assert said is not None
    assert said.endswith("…")
    assert text.startswith(said[:-1])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=6000))
def test_a_result_always_fits_and_can_always_be_read(text: str) -> None:
    line = encode_line(failed(text))
    assert len(line.encode()) <= RESULT_MAX_BYTES
    result = parse_line(line.encode())
    assert isinstance(result, Result)
    assert result.failure is not None
    assert result.failure.reason is Reason.STORE_UNAVAILABLE


def test_a_short_result_is_not_touched() -> None:
    result = Result(
        stored=Stored(
            storage_uri='s3://b/"quoted"/ü',
            size_bytes=1,
            file_count=1,
            manifest_digest="sha256:m",
            content_digest="sha256:c",
            data_owner=False,
        )
    )
    assert parse_line(encode_line(result).encode()) == result
    assert json.loads(encode_line(result))["stored"]["storageURI"] == 's3://b/"quoted"/ü'
    assert parse_line(encode_line(failed("short")).encode()) == failed("short")


def test_progress_comes_back() -> None:
    progress = Progress(bytes_done=5, bytes_total=2**60, files_done=1, files_total=2, bytes_per_second=3)
    assert parse_line(encode_line(progress).encode()) == progress


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\n",
        b"Downloading: 100%|#####|",
        b"{}",
        b'{"type": "other"}',
        b'{"type": "progress", "bytesDone": "many"}',
        b'["progress"]',
        b'{"type": "result"',
        b"\xff\xfe\x00",
        b"null",
        b'{"type":"result","failure":{"reason":"NoSuchReason","message":"x"}}',
    ],
)
def test_chatter_is_not_taken_for_a_line(noise: bytes) -> None:
    assert parse_line(noise) is None


def test_a_line_of_a_newer_mover_is_understood() -> None:
    line = parse_line(b'{"type":"progress","bytesDone":1,"etaSeconds":9}')
    assert line == Progress(bytes_done=1)


def test_a_plan_survives_the_environment() -> None:
    plan = Plan(operation=Operation.UPLOAD, artifact_uid="u", target_uri="s3://b/ü", lock_file="/x")
    wire = plan.model_dump_json(by_alias=True, exclude_none=True)
    assert Plan.model_validate_json(wire) == plan
    assert {"artifactUID", "targetURI"} <= set(json.loads(wire))


def test_a_plan_of_another_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="protocolVersion"):
        Plan.model_validate({"protocolVersion": 2, "operation": "Upload", "artifactUID": "u", "targetURI": "x"})
