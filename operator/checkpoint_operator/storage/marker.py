"""The one object beside the files that says what they are: being written, a checkpoint, or being removed.

``.metadata.json`` has a state and is changed only by compare-and-swap::

    absent ──create if absent──▶ Uploading ──swap──▶ Committed (the manifest)
                                     │                   │
                                     └───────swap────────┴──▶ Deleting (holds the whole old marker) ──remove──▶ absent

Only Committed is a manifest; everybody who lists or reads ignores the other two.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from checkpoint_operator.api.base import ApiModel
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.manifest import SCHEMA_VERSION, FileTable

DELETING_NAME = ".metadata.deleting.json"
"""What the file backend calls the manifest while it removes an artifact."""


class ForeignMarker(StorageError):
    """The object at the marker's name is not ours: nobody may claim the place, and a deletion has nothing to do there."""


def new_claim_id() -> str:
    """128 fresh random bits: every create and swap gets its own, so that a lost reply can be told from a lost race."""
    return secrets.token_hex(16)


class _MarkerBase(ApiModel):
    schema_version: int = SCHEMA_VERSION
    artifact_uid: str = Field(alias="artifactUID")
    claim_id: str = Field(alias="claimID")


class Uploading(_MarkerBase):
    """Somebody claimed the place and is writing; nothing that lies there is a checkpoint."""

    state: Literal["Uploading"] = "Uploading"
    source_fingerprint: str


class Manifest(_MarkerBase):
    """A committed checkpoint. Invariant I: every byte that it lists is durable and right."""

    state: Literal["Committed"] = "Committed"
    source_fingerprint: str
    content_digest: str = Field(max_length=80)
    metadata: ArtifactMetadata
    table: FileTable


class Deleting(_MarkerBase):
    """The data is being removed. ``previous`` is the whole old marker: what a later mover needs to go on."""

    state: Literal["Deleting"] = "Deleting"
    previous: Uploading | Manifest = Field(discriminator="state")


Marker = Uploading | Manifest | Deleting
_MARKER: TypeAdapter[Marker] = TypeAdapter(Annotated[Marker, Field(discriminator="state")])


@dataclass(frozen=True)
class Seen:
    """A marker as it was read: ``token`` names this version (ETag, generation), ``digest`` its bytes."""

    marker: Marker
    token: str
    digest: str


def encode(marker: Marker) -> bytes:
    """The bytes of a marker; indented, because people open it."""
    return marker.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode() + b"\n"


def digest(data: bytes) -> str:
    """The digest of a marker's bytes (``manifestDigest`` in the status)."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


MAX_BYTES = 64 << 20
"""A marker of a quarter of a million files; what is larger is not read: it may be anything, of any size."""


def too_large(size: int, uri: str) -> ForeignMarker:
    """The error for a marker of more than :data:`MAX_BYTES`."""
    return ForeignMarker(
        Reason.TARGET_NOT_EMPTY,
        f"the object .metadata.json there has {size} bytes, at most {MAX_BYTES} are read: choose another URI, or remove it",
        uri=uri,
    )


def decode(data: bytes, token: str, uri: str) -> Seen:
    """Read a marker.

    Raises:
        StorageError: TargetNotEmpty where the object is something else, or of a newer schema: it is not ours to touch.
    """
    try:
        marker = _MARKER.validate_json(data)
        if isinstance(marker, Manifest) and marker.table.size >= 2**63:
            raise ValueError("no store holds so many bytes")
    except ValueError as error:  # pydantic's ValidationError is one
        _refuse_newer(_version(data), uri)
        raise ForeignMarker(
            Reason.TARGET_NOT_EMPTY,
            "the object .metadata.json there was not written by this software: choose another URI, or remove it",
            uri=uri,
        ) from error
    _refuse_newer(marker.schema_version, uri)
    return Seen(marker, token, digest(data))


def _version(data: bytes) -> int:
    """The schema version of a marker that cannot be read: a newer one may look quite different."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return 0
    is_marker = isinstance(found, dict) and "artifactUID" in found and isinstance(found.get("schemaVersion"), int)
    return int(found["schemaVersion"]) if is_marker else 0


def _refuse_newer(version: int, uri: str) -> None:
    if version > SCHEMA_VERSION:
        raise StorageError(
            Reason.TARGET_NOT_EMPTY,
            f"the checkpoint there has schema version {version}, this software knows {SCHEMA_VERSION}: upgrade it",
            uri=uri,
        )
