"""What the operator says about a CheckpointArtifact: the source of the CRD's status, which only the operator writes."""

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import Field

from checkpoint_operator.api.base import ApiModel
from checkpoint_operator.api.conditions import Condition


class Phase(StrEnum):
    """A summary of the conditions for people and columns; programs read conditions. Not an enum in the schema."""

    PENDING = "Pending"
    SUSPENDED = "Suspended"
    QUEUED = "Queued"
    WAITING = "Waiting"
    UPLOADING = "Uploading"
    VERIFYING = "Verifying"
    READY = "Ready"
    FAILED = "Failed"
    DELETING = "Deleting"


class Summary(ApiModel):
    """The spec where it speaks, what was detected where it does not; columns and selectors use this."""

    job_name: str | None = Field(default=None, max_length=256, description="The training Job that wrote the checkpoint.")
    algorithm: str | None = Field(default=None, max_length=256, description="What trained it.")
    base_model: str | None = Field(default=None, max_length=256, description="The model that was trained.")
    peft_method: str | None = Field(default=None, max_length=256, description="How it was fine-tuned.")
    step: int | None = Field(default=None, description="Optimizer steps that were done.")
    loss: str | None = Field(default=None, max_length=40, description="The last training loss, as a decimal string.")


class ProgressStatus(ApiModel):
    display: str = Field(default="", max_length=32, description="For the Progress column.")
    bytes_done: int = Field(default=0, description="Bytes that the store has.")
    bytes_total: int = Field(default=0, description="Bytes of all files.")
    files_done: int = Field(default=0, description="Files that the store has.")
    files_total: int = Field(default=0, description="Number of all files.")
    percent: int = Field(default=0, ge=0, le=100, description="Of the bytes, rounded down.")
    bytes_per_second: int = Field(default=0, description="Mean of the running transfer.")
    last_update_time: datetime | None = Field(default=None, description="When the mover was asked last.")


class Detected(ApiModel):
    format: str | None = Field(default=None, max_length=64, description="hf, peft, dcp, deepspeed, orbax, gguf, …")
    base_model: str | None = Field(default=None, max_length=256, description="The model that was trained.")
    peft_method: str | None = Field(default=None, max_length=256, description="How it was fine-tuned.")
    algorithm: str | None = Field(default=None, max_length=256, description="What trained it.")
    global_step: int | None = Field(default=None, description="Optimizer steps that were done.")
    loss: str | None = Field(default=None, max_length=40, description="The last training loss, as a decimal string.")
    parameters: int | None = Field(default=None, description="Number of parameters of the weights.")
    dtype: str | None = Field(default=None, max_length=32, description="Their type.")


class MoverStatus(ApiModel):
    kind: Literal["Inline", "Job"] = Field(description="Which executor runs the mover.")
    name: str = Field(max_length=253, description="Its deterministic name.")
    operation: Literal["Upload", "Delete"] = Field(default="Upload", description="What it was started for.")
    uid: str | None = Field(default=None, max_length=64, description="The Job's uid, where it is one.")
    done: bool | None = Field(default=None, description="true: it has ended, and what it said is in this status.")
    run_as_user: int | None = Field(default=None, description="The user that it runs as, where it is a Job.")


class FailureStatus(ApiModel):
    code: str = Field(max_length=16, description="Stable code, see docs/failures.md.")
    reason: str = Field(max_length=128, description="Why, as one word for programs.")
    message: str = Field(max_length=1024, description="Why, as a sentence for people, with the way out.")
    retryable: bool = Field(description="Whether the operator tries again by itself.")


class ArtifactStatus(ApiModel):
    observed_generation: int | None = Field(default=None, description="The generation that this status is about.")
    phase: str | None = Field(default=None, max_length=32, description="A summary of the conditions.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="SourceReady, Uploaded, Verified, Ready, Stalled.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    summary: Summary | None = Field(default=None, description="What columns and field selectors show.")
    size: str | None = Field(default=None, max_length=32, description="sizeBytes as a quantity: 1.2Gi.")
    size_bytes: int | None = Field(default=None, description="Sum of the stored files' sizes.")
    file_count: int | None = Field(default=None, description="Number of stored files.")
    storage_uri: str | None = Field(
        default=None, alias="storageURI", max_length=1200, description="Where the committed checkpoint is."
    )
    manifest_digest: str | None = Field(default=None, max_length=128, description="SHA-256 of the manifest's bytes.")
    content_digest: str | None = Field(
        default=None, max_length=128, description="SHA-256 of the canonical file table: equal means same content."
    )
    data_owner: bool | None = Field(
        default=None, description="false: the same content was there already, committed by another artifact."
    )
    progress: ProgressStatus | None = Field(default=None, description="How far the transfer is.")
    detected: Detected | None = Field(default=None, description="What was read from the files themselves.")
    attempts: int = Field(default=0, ge=0, description="Starts that count towards giving up.")
    launches: int = Field(default=0, ge=0, description="All starts of a mover; part of its name.")
    clean_launches: int = Field(
        default=0, ge=0, description="Starts that certainly wrote nothing; equal to launches: there is nothing to clean up."
    )
    lost: int = Field(
        default=0, ge=0, description="Consecutive starts whose mover vanished together with the operator, without a word."
    )
    retries: int = Field(default=0, ge=0, description="Consecutive failures of any kind; the backoff grows with it.")
    mover: MoverStatus | None = Field(default=None, description="The mover that was started last.")
    start_time: datetime | None = Field(default=None, description="When the first mover was started.")
    completion_time: datetime | None = Field(default=None, description="When it became Ready or Failed.")
    next_retry_time: datetime | None = Field(default=None, description="When the next try is due.")
    retry_handled: str | None = Field(
        default=None, max_length=256, description="The value of the retry annotation that was acted upon last."
    )
    failure: FailureStatus | None = Field(default=None, description="The last failure; absent once it was overcome.")
