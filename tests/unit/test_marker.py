"""The marker is read back as it was written, and nothing else is taken for one."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.storage import StorageError
from checkpoint_operator.storage.manifest import FileTable, Link, StoredFile
from checkpoint_operator.storage.marker import (
    Deleting,
    ForeignMarker,
    Manifest,
    Marker,
    Uploading,
    decode,
    digest,
    encode,
    new_claim_id,
)

CLAIM = Uploading(artifact_uid="u", claim_id="c", source_fingerprint="sha256:f")
MANIFEST = Manifest(
    artifact_uid="u",
    claim_id="c",
    source_fingerprint="sha256:f",
    content_digest="sha256:d",
    metadata=ArtifactMetadata.from_dict(
        {"created_at": datetime(2025, 1, 2, 3, 4, 5, 678901, UTC), "future": {"a": [None, 1.5]}, "tags": {"ü": "é"}}
    ),
    table=FileTable(
        files=[StoredFile(path="x", size=1, sha256="s", etag='"e"', mode=0o600, mtime_ns=1)],
        links=[Link(path="l", target="x")],
        empty_directories=["v"],
    ),
)
MARKERS: dict[str, Marker] = {
    "Uploading": CLAIM,
    "Committed": MANIFEST,
    "Deleting a claim": Deleting(artifact_uid="u", claim_id="c2", previous=CLAIM),
    "Deleting a checkpoint": Deleting(artifact_uid="u", claim_id="c2", previous=MANIFEST),
}


@pytest.mark.parametrize("marker", MARKERS.values(), ids=MARKERS)
def test_a_marker_is_read_back_as_it_was_written(marker: Marker) -> None:
    data = encode(marker)
    seen = decode(data, "token", "s3://b/x")
    assert (seen.marker, seen.token, seen.digest) == (marker, "token", digest(data))
    assert encode(seen.marker) == data


def test_a_manifest_of_a_newer_version_with_more_fields_can_be_read() -> None:
    wire = json.loads(encode(MANIFEST)) | {"signature": "x"}
    assert decode(json.dumps(wire).encode(), "t", "u").marker == MANIFEST


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"state": "Committed"}',
        b'{"state": "Done", "artifactUID": "u", "claimID": "c"}',
        b'{"schemaVersion": 9, "name": "a model card"}',
        encode(MANIFEST)[:-20],
        b"[" * 100_000,
    ],
)
def test_anything_else_is_foreign(data: bytes) -> None:
    with pytest.raises(ForeignMarker) as caught:
        decode(data, "t", "s3://b/x")
    assert caught.value.reason is Reason.TARGET_NOT_EMPTY
    assert caught.value.context["uri"] == "s3://b/x"


@pytest.mark.parametrize("state", ["Committed", "Frozen"])
def test_a_newer_schema_is_ours_but_not_for_this_version(state: str) -> None:
    wire = json.loads(encode(MANIFEST)) | {"schemaVersion": 2, "state": state}
    with pytest.raises(StorageError, match="upgrade it") as caught:
        decode(json.dumps(wire).encode(), "t", "u")
    assert not isinstance(caught.value, ForeignMarker)


def test_no_two_claims_are_alike() -> None:
    assert len({new_claim_id() for _ in range(1000)}) == 1000
    assert len(new_claim_id()) == 32
