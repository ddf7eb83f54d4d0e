"""The contract between operator and mover: a plan goes in, progress and one result come out (DESIGN §5)."""

from bisect import bisect_right
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from checkpoint_operator.api.base import ApiModel
from checkpoint_operator.api.errors import FAILURES, Reason, Retry
from checkpoint_operator.api.metadata import ArtifactMetadata

RESULT_MAX_BYTES = 4096
"""The kubelet cuts a termination message at this length."""


class Operation(StrEnum):
    UPLOAD = "Upload"
    DELETE = "Delete"


class Layout(StrEnum):
    PLAIN = "Plain"
    UNIQUE = "Unique"


class TargetOptions(ApiModel):
    """Where the store is and how to talk to it; the same for every file of one plan."""

    endpoint: str | None = None
    region: str | None = None
    force_path_style: bool = False
    ca_bundle: str | None = None
    """A PEM file of the certificate authorities to trust instead of the system's; verification itself is never off."""
    ca_bundle_pem: str | None = None
    """The same as text, for a mover that has no such file: it writes one, and sets :attr:`ca_bundle`."""
    storage_class: str | None = None
    azure_account: str | None = None
    sse_kms_key_id: str | None = Field(default=None, alias="sseKMSKeyID")
    file_root: str | None = None
    """For ``file://``: the directory where the target claim is mounted; the URI's path is taken below it."""
    credentials_directory: str | None = None
    """A folder whose file names are the SDKs' variable names (as a mounted Secret); the only credentials that are used."""
    allow_ambient_credentials: bool = False
    """Whether the process's own identity (environment, profile, web identity) may be used instead."""
    only_this_endpoint: bool = False
    """Only :attr:`endpoint`, or the cloud's own: an address that stands among the credentials is refused. Whoever may write
    a Secret chooses keys by it, and not where a mover goes."""
    max_bytes_per_second: int | None = None
    """Limit of what is read from the volume and sent, over all streams; None: as fast as it goes."""


class Source(ApiModel):
    """The folder (or single file) to read: ``path`` below ``root``, which is where the claim is mounted."""

    root: str
    path: str
    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)


class Plan(ApiModel):
    """Everything a mover needs to know; it has no other input and no Kubernetes token."""

    protocol_version: Literal[1] = 1
    operation: Operation
    artifact_uid: str = Field(alias="artifactUID")
    target_uri: str = Field(alias="targetURI")
    layout: Layout = Layout.PLAIN
    options: TargetOptions = TargetOptions()
    source: Source | None = None
    metadata: ArtifactMetadata = ArtifactMetadata()
    earlier_mover_gone: bool = False
    """The fence of DESIGN §6: the operator confirmed that no earlier mover of this artifact is running."""
    keep_committed: bool = True
    """For Delete: remove only what was never committed (``deletionPolicy: Retain``)."""
    lock_file: str | None = None
    """Held (flock) for the whole run: by it a later operator sees whether this mover is gone."""


class Stage(StrEnum):
    """What a mover is doing; the names are those of the artifact's phases."""

    UPLOADING = "Uploading"
    VERIFYING = "Verifying"


class Progress(ApiModel):
    """How far a transfer is. Bytes count what is settled in the store, whether it was sent now or found there."""

    type: Literal["progress"] = "progress"
    stage: Stage = Stage.UPLOADING
    bytes_done: int = 0
    bytes_total: int = 0
    files_done: int = 0
    files_total: int = 0
    bytes_per_second: int = 0


class Failure(ApiModel):
    """Why a mover gave up. ``message`` holds no secret: it goes into status and events."""

    reason: Reason
    message: str
    wrote: bool = True
    """False: it is certain that this run wrote nothing to the store, so that it left nothing to clean up."""

    @property
    def retry(self) -> Retry:
        return FAILURES[self.reason].retry


class Stored(ApiModel):
    """What a committed checkpoint is, as the status will say it."""

    storage_uri: str = Field(alias="storageURI")
    size_bytes: int
    file_count: int
    manifest_digest: str
    content_digest: str
    data_owner: bool
    """False: the same content was there already, committed by another artifact."""


class Result(ApiModel):
    """The one last line of a mover. Exactly one of ``stored``, ``deleted`` and ``failure`` is set."""

    type: Literal["result"] = "result"
    stored: Stored | None = None
    deleted: str | None = None
    """For Delete: one sentence about what was removed or kept."""
    failure: Failure | None = None


Line = Annotated[Progress | Result, Field(discriminator="type")]
_LINE: TypeAdapter[Progress | Result] = TypeAdapter(Line)


def parse_line(line: bytes) -> Progress | Result | None:
    """Read one line of a mover's standard output; None for anything else (a library that prints must not confuse us)."""
    try:
        return _LINE.validate_json(line)
    except ValidationError:
        return None


def encode_line(message: Progress | Result) -> str:
    """One JSON line without the newline; a result is kept within :data:`RESULT_MAX_BYTES` by cutting its sentence."""
    text = message.model_dump_json(by_alias=True, exclude_none=True)
    if isinstance(message, Progress) or len(text.encode()) <= RESULT_MAX_BYTES:
        return text
    sentence = message.failure.message if message.failure else message.deleted or ""

    def cut(length: int) -> str:
        short = sentence[:length] + "…"
        if message.failure:
            changed = message.replace(failure=message.failure.replace(message=short))
        else:
            changed = message.replace(deleted=short)
        return changed.model_dump_json(by_alias=True, exclude_none=True)

    # A search, because JSON's escapes make some characters longer than their UTF-8: as much of it as fits.
    fits = bisect_right(range(len(sentence)), RESULT_MAX_BYTES, key=lambda length: len(cut(length).encode()))
    return cut(max(fits - 1, 0))
