"""How an artifact's status changes; every function takes the old status and the clock and returns the new status. Pure.

One function for each thing that can be said, so that phase, conditions and failure can never contradict each other.
"""

from datetime import datetime

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.conditions import Condition, ConditionType, set_condition, truncate
from checkpoint_operator.api.errors import FAILURES, Reason, Retry
from checkpoint_operator.api.protocol import Failure, Progress, Stage, Stored
from checkpoint_operator.api.quantities import format_bytes
from checkpoint_operator.api.status import ArtifactStatus, FailureStatus, MoverStatus, Phase, ProgressStatus

_SOURCE_REASONS = {
    Reason.NOT_READY,
    Reason.SOURCE_CHANGED,
    Reason.SOURCE_EMPTY,
    Reason.SOURCE_NOT_FOUND,
    Reason.SOURCE_UNREADABLE,
    Reason.SOURCE_UNSUPPORTED,
    Reason.UNSUPPORTED_NAME,
}


def _base(artifact: CheckpointArtifact, phase: Phase) -> ArtifactStatus:
    return artifact.status.replace(
        observed_generation=artifact.metadata.generation, phase=phase, summary=artifact.summarize()
    )


def _conditions(
    artifact: CheckpointArtifact, now: datetime, *changes: tuple[ConditionType, bool | None, str, str]
) -> list[Condition]:
    conditions = list(artifact.status.conditions)
    for type_, status, reason, message in changes:
        conditions = set_condition(
            conditions, type_, status, reason, message, generation=artifact.metadata.generation, now=now
        )
    return conditions


def held_back(artifact: CheckpointArtifact, phase: Phase, reason: str, message: str, now: datetime) -> ArtifactStatus:
    """Nothing is running, and nothing is wrong: Suspended, Queued, Waiting for an earlier mover."""
    changes = [(ConditionType.READY, False, reason, message)]
    if any(condition.type == ConditionType.STALLED for condition in artifact.status.conditions):
        changes.append((ConditionType.STALLED, False, reason, message))
    return _base(artifact, phase).replace(conditions=_conditions(artifact, now, *changes))


def stopped(artifact: CheckpointArtifact, reason: str, message: str, now: datetime, *, ran: bool) -> ArtifactStatus:
    """The operator itself ended the mover, which is no failure. ``ran``: False where it never came to run."""
    return held_back(artifact, Phase.PENDING, reason, message, now).replace(
        clean_launches=artifact.status.clean_launches + (0 if ran else 1)
    )


def running(artifact: CheckpointArtifact, now: datetime) -> ArtifactStatus:
    """The mover runs at last, after it was said that it does not."""
    return held_back(artifact, Phase.UPLOADING, "Uploading", "the checkpoint is being stored", now)


def started(
    artifact: CheckpointArtifact, mover: MoverStatus, now: datetime, *, retry_handled: str | None = None
) -> ArtifactStatus:
    """A mover for the upload is about to be started; written before it is, so that no start is ever forgotten."""
    # Still Uploading, and nobody knows the mover: an operator died with it, or was restarted.
    vanished = artifact.status.phase in (Phase.UPLOADING, Phase.VERIFYING)
    return _base(artifact, Phase.UPLOADING).replace(
        launches=artifact.status.launches + 1,
        lost=artifact.status.lost + 1 if vanished else 0,
        mover=mover,
        retry_handled=retry_handled,
        start_time=artifact.status.start_time or now,
        completion_time=None,
        next_retry_time=None,
        progress=ProgressStatus(display="0%", last_update_time=now),
        conditions=_conditions(
            artifact,
            now,
            (ConditionType.SOURCE_READY, None, "NotScanned", "the mover has not looked at the source yet"),
            (ConditionType.UPLOADED, False, "Uploading", ""),
            (ConditionType.VERIFIED, False, "Uploading", ""),
            (ConditionType.READY, False, "Uploading", "the checkpoint is being stored"),
            (ConditionType.STALLED, False, "Uploading", ""),
        ),
    )


def percent(progress: Progress) -> int:
    """Whole percent of the bytes, rounded down: 100 means that nothing is left."""
    if progress.bytes_total == 0:
        return 100 if progress.files_done == progress.files_total and progress.files_total else 0
    return max(0, min(100, progress.bytes_done * 100 // progress.bytes_total))


def progressed(artifact: CheckpointArtifact, progress: Progress, now: datetime) -> ArtifactStatus:
    """What a running mover says."""
    verifying = progress.stage is Stage.VERIFYING
    changes: list[tuple[ConditionType, bool | None, str, str]] = [
        (ConditionType.SOURCE_READY, True, "Scanned", f"{progress.files_total} files were found"),
    ]
    if verifying:
        changes += [
            (ConditionType.UPLOADED, True, "Uploaded", "every byte was sent"),
            (ConditionType.READY, False, "Verifying", "the store is asked what it holds"),
        ]
    return _base(artifact, Phase.VERIFYING if verifying else Phase.UPLOADING).replace(
        size=format_bytes(progress.bytes_total),
        progress=ProgressStatus(
            display=f"{percent(progress)}%",
            bytes_done=progress.bytes_done,
            bytes_total=progress.bytes_total,
            files_done=progress.files_done,
            files_total=progress.files_total,
            percent=percent(progress),
            bytes_per_second=progress.bytes_per_second,
            last_update_time=now,
        ),
        conditions=_conditions(artifact, now, *changes),
    )


def ready(artifact: CheckpointArtifact, stored: Stored, now: datetime) -> ArtifactStatus:
    """The mover committed the checkpoint (or found it committed)."""
    message = f"stored at {stored.storage_uri}"
    if not stored.data_owner:
        message = f"the same content was already stored at {stored.storage_uri} by another artifact"
    return _base(artifact, Phase.READY).replace(
        size=format_bytes(stored.size_bytes),
        size_bytes=stored.size_bytes,
        file_count=stored.file_count,
        storage_uri=stored.storage_uri,
        manifest_digest=stored.manifest_digest,
        content_digest=stored.content_digest,
        data_owner=stored.data_owner,
        attempts=artifact.status.attempts + 1,
        retries=0,
        next_retry_time=None,
        failure=None,
        completion_time=now,
        progress=ProgressStatus(
            display="100%",
            bytes_done=stored.size_bytes,
            bytes_total=stored.size_bytes,
            files_done=stored.file_count,
            files_total=stored.file_count,
            percent=100,
            last_update_time=now,
        ),
        conditions=_conditions(
            artifact,
            now,
            (ConditionType.SOURCE_READY, True, "Scanned", f"{stored.file_count} files were stored"),
            (ConditionType.UPLOADED, True, "Uploaded", "every byte was sent"),
            (ConditionType.VERIFIED, True, "Verified", "the store confirmed every file's checksum"),
            (ConditionType.READY, True, "Committed", message),
            (ConditionType.STALLED, False, "Committed", ""),
        ),
    )


def _failure(failure: Failure, *, retryable: bool) -> FailureStatus:
    return FailureStatus(
        code=FAILURES[failure.reason].code,
        reason=failure.reason,
        message=truncate(failure.message),
        retryable=retryable,
    )


def waiting(
    artifact: CheckpointArtifact, failure: Failure, retry_at: datetime, now: datetime, *, counts: bool
) -> ArtifactStatus:
    """A try failed, and there will be another one."""
    changes: list[tuple[ConditionType, bool | None, str, str]] = [
        (ConditionType.READY, False, failure.reason, failure.message)
    ]
    if failure.reason in _SOURCE_REASONS:
        changes.append((ConditionType.SOURCE_READY, False, failure.reason, failure.message))
    return _base(artifact, Phase.WAITING).replace(
        clean_launches=artifact.status.clean_launches + (0 if failure.wrote else 1),
        attempts=artifact.status.attempts + (1 if counts else 0),
        retries=artifact.status.retries + 1,
        next_retry_time=retry_at,
        failure=_failure(failure, retryable=True),
        conditions=_conditions(artifact, now, *changes),
    )


def failed(
    artifact: CheckpointArtifact, failure: Failure, now: datetime, *, counts: bool = True, ran: bool = True
) -> ArtifactStatus:
    """The operator gives up until a human changes something. ``ran``: a mover said so, and not the configuration."""
    changes: list[tuple[ConditionType, bool | None, str, str]] = [
        (ConditionType.READY, False, failure.reason, failure.message),
        (ConditionType.STALLED, True, failure.reason, failure.message),
    ]
    if failure.reason in _SOURCE_REASONS:
        changes.append((ConditionType.SOURCE_READY, False, failure.reason, failure.message))
    return _base(artifact, Phase.FAILED).replace(
        clean_launches=artifact.status.clean_launches + (0 if failure.wrote or not ran else 1),
        attempts=artifact.status.attempts + (1 if counts else 0),
        retries=artifact.status.retries + 1,
        next_retry_time=None,
        completion_time=now,
        failure=_failure(failure, retryable=False),
        conditions=_conditions(artifact, now, *changes),
    )


def revived(artifact: CheckpointArtifact, retry_value: str | None, now: datetime) -> ArtifactStatus:
    """A human asked for another try of a Failed artifact: the counts begin again."""
    return held_back(artifact, Phase.PENDING, "Retrying", "another try was asked for", now).replace(
        attempts=0, lost=0, retries=0, failure=None, completion_time=None, start_time=None, retry_handled=retry_value
    )


def observed(artifact: CheckpointArtifact) -> ArtifactStatus:
    """Nothing changed but the generation: a Ready artifact got tags or metrics."""
    return artifact.status.replace(
        observed_generation=artifact.metadata.generation,
        summary=artifact.summarize(),
        conditions=[
            condition.replace(observed_generation=artifact.metadata.generation) for condition in artifact.status.conditions
        ],
    )


def deleting(
    artifact: CheckpointArtifact,
    message: str,
    now: datetime,
    *,
    failure: Failure | None = None,
    retry_at: datetime | None = None,
    reason: str = "Deleting",
    ran: bool = True,
) -> ArtifactStatus:
    """The object is being deleted and its data is dealt with. ``failure``: the last try did not work; ``reason``: why
    nothing is being done about it now; ``ran``: False where the upload that ended for it never came to run."""
    first = artifact.status.phase != Phase.DELETING
    reason = failure.reason if failure else reason
    return _base(artifact, Phase.DELETING).replace(
        clean_launches=artifact.status.clean_launches + (0 if ran else 1),
        retries=0 if first else artifact.status.retries + (1 if failure else 0),
        next_retry_time=retry_at,
        failure=_failure(failure, retryable=True) if failure else None,
        conditions=_conditions(artifact, now, (ConditionType.READY, False, reason, message)),
    )


def deletion_started(
    artifact: CheckpointArtifact, mover: MoverStatus, now: datetime, *, retry_handled: str | None = None
) -> ArtifactStatus:
    """A mover for the deletion is about to be started."""
    return deleting(artifact, "the data is being removed", now).replace(
        launches=artifact.status.launches + 1,
        mover=mover,
        retries=artifact.status.retries,
        retry_handled=retry_handled,
    )


def counts(failure: Failure) -> bool:
    """Whether a failure counts towards giving up."""
    return failure.retry in (Retry.COUNTED, Retry.NEVER)
