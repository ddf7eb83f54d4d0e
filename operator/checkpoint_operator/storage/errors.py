"""The one exception of the storage layer: a reason from the shared table, a sentence, and where it happened."""

from checkpoint_operator.api.errors import FAILURES, ErrorCode, Reason, Retry

_BY_OPERATION = {
    "fetch": ErrorCode.DOWNLOAD,
    "download": ErrorCode.DOWNLOAD,
    "verify": ErrorCode.DOWNLOAD,
    "read": ErrorCode.METADATA,
    "head": ErrorCode.METADATA,
    "list": ErrorCode.METADATA,
    "list uploads": ErrorCode.METADATA,
    "delete": ErrorCode.METADATA,
    "get manifest": ErrorCode.METADATA,
    "get metadata": ErrorCode.METADATA,
}


class StorageError(Exception):
    """An operation failed.

    Attributes:
        reason: the key into :data:`checkpoint_operator.api.errors.FAILURES`.
        code: the stable code RLHF050 … RLHF059.
        context: where it happened: uri, backend, operation, path, the store's request id. Never a secret.
    """

    def __init__(self, reason: Reason, message: str, **context: str | None) -> None:
        message = _printable(message)
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.context = {key: _printable(value) for key, value in context.items() if value is not None}

    @property
    def code(self) -> ErrorCode:
        if self.reason is Reason.REQUEST_REJECTED:
            # What a refusal means to a caller depends on what was asked.
            return _BY_OPERATION.get(self.context.get("operation", ""), ErrorCode.UPLOAD)
        return FAILURES[self.reason].code

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later with nothing changed by a human."""
        return FAILURES[self.reason].retry is not Retry.NEVER

    def locate(self, operation: str, **context: str) -> None:
        """Say what the caller had asked for, and where, as far as the one who raised it did not know.

        What was being done for it at that moment (``put part``) stays, as ``request``.
        """
        inner = self.context.pop("operation", operation)
        request = {} if inner == operation else {"request": inner}
        outer = {key: _printable(value) for key, value in context.items()}
        self.context = {**outer, "operation": operation, **request, **self.context}

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross process boundaries too: a pool of processes would hang at one that cannot be rebuilt."""
        return _rebuild, (type(self), self.reason, self.message, self.context)

    def __str__(self) -> str:
        where = ", ".join(f"{key}={value}" for key, value in self.context.items())
        return f"{self.code} {self.reason}: {self.message}" + (f" ({where})" if where else "")


def _rebuild(kind: type[StorageError], reason: Reason, message: str, context: dict[str, str]) -> StorageError:
    return kind(reason, message, **context)


RLHFStorageError = StorageError
"""The name under which code that imports several error types tells it from others."""


def _printable(text: str) -> str:
    """A file name that is not UTF-8 comes as lone surrogates, which neither JSON nor a terminal can take."""
    return text.encode("utf-8", "backslashreplace").decode()


class Cancelled(Exception):
    """The caller asked to stop. What was stored stays, for the next attempt to find."""
