"""What a mover says through its pod, read as if anybody of its namespace had written it, which may be so. Pure."""

import re

from checkpoint_operator.api.protocol import RESULT_MAX_BYTES, Operation, Progress, Result, Stored, parse_line

COUNT_MAX = 2**53
"""Counts above this are lies: JSON's numbers end there."""
SHORT_MAX = 128
URI_MAX = 1200
"""What the status' schema takes."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def plain(text: str, limit: int = 1024) -> str:
    """One line of visible text, for conditions, events and logs."""
    return _CONTROL.sub(" ", text).strip()[:limit]


def read_result(text: str, operation: Operation, target_uri: str) -> Result | None:
    """What a termination message says, if it is a result of this operation and fits into a status; the last one counts.

    The kubelet may have taken the end of the log instead (FallbackToLogsOnError), so that there are lines.
    """
    if len(text.encode()) > RESULT_MAX_BYTES:
        return None
    for line in reversed(text.splitlines()):
        message = parse_line(line.encode())
        if isinstance(message, Result):
            return _checked(message, operation, target_uri)
    return None


def _checked(result: Result, operation: Operation, target_uri: str) -> Result | None:
    said = [part for part in (result.stored, result.deleted, result.failure) if part is not None]
    if len(said) != 1:
        return None
    if result.failure:
        return result.replace(failure=result.failure.replace(message=plain(result.failure.message)))
    if result.stored is not None:
        return result if operation is Operation.UPLOAD and _is_plausible(result.stored, target_uri) else None
    return result.replace(deleted=plain(result.deleted or "")) if operation is Operation.DELETE else None


def _is_plausible(stored: Stored, target_uri: str) -> bool:
    """A result that names another place than the artifact's target, or what no status can hold, is none."""
    place, target = stored.storage_uri.rstrip("/"), target_uri.rstrip("/")
    return (
        (place == target or place.startswith(f"{target}/"))
        and len(stored.storage_uri) <= URI_MAX
        and plain(stored.storage_uri, URI_MAX) == stored.storage_uri
        and all(0 < len(text) <= SHORT_MAX and text.isascii() for text in (stored.manifest_digest, stored.content_digest))
        and all(0 <= number <= COUNT_MAX for number in (stored.size_bytes, stored.file_count))
    )


def read_progress(tail: bytes) -> Progress | None:
    """The last line of progress in the end of a log."""
    for line in reversed(tail.splitlines()):
        message = parse_line(line)
        if isinstance(message, Progress):
            counts = (message.bytes_done, message.bytes_total, message.files_done, message.files_total)
            if all(0 <= count <= COUNT_MAX for count in (*counts, message.bytes_per_second)):
                return message
    return None
