"""What Azure's refusals mean to us: one table from its codes to our reasons."""

import os
import ssl
from collections.abc import Mapping

from azure.core.exceptions import ClientAuthenticationError, HttpResponseError

from checkpoint_operator.api.errors import Reason

# https://learn.microsoft.com/rest/api/storageservices/common-rest-api-error-codes and …/blob-service-error-codes;
# what is missing here is judged by its status.
_REASONS: dict[str, Reason] = {
    "AccountIsDisabled": Reason.CREDENTIALS_REFUSED,
    "AuthenticationFailed": Reason.CREDENTIALS_REFUSED,
    "AuthorizationFailure": Reason.CREDENTIALS_REFUSED,
    "AuthorizationPermissionMismatch": Reason.CREDENTIALS_REFUSED,
    "AuthorizationProtocolMismatch": Reason.CREDENTIALS_REFUSED,
    "AuthorizationResourceTypeMismatch": Reason.CREDENTIALS_REFUSED,
    "AuthorizationServiceMismatch": Reason.CREDENTIALS_REFUSED,
    "AuthorizationSourceIPMismatch": Reason.CREDENTIALS_REFUSED,
    "InsufficientAccountPermissions": Reason.CREDENTIALS_REFUSED,
    "InvalidAuthenticationInfo": Reason.CREDENTIALS_REFUSED,
    "KeyBasedAuthenticationNotPermitted": Reason.CREDENTIALS_REFUSED,
    "NoAuthenticationInformation": Reason.CREDENTIALS_REFUSED,
    "PublicAccessNotPermitted": Reason.CREDENTIALS_REFUSED,
    # A SAS token with "create" and without "write": it could not commit.
    "UnauthorizedBlobOverwrite": Reason.CREDENTIALS_REFUSED,
    "ContainerBeingDeleted": Reason.BUCKET_NOT_FOUND,
    "ContainerDisabled": Reason.BUCKET_NOT_FOUND,
    "ContainerNotFound": Reason.BUCKET_NOT_FOUND,
    "InvalidResourceName": Reason.BUCKET_NOT_FOUND,
    "ResourceNotFound": Reason.BUCKET_NOT_FOUND,  # the account, or a container that one may not see; a blob has its own
    "ConditionHeadersNotSupported": Reason.CONDITIONAL_WRITES_UNSUPPORTED,
    "MultipleConditionHeadersNotSupported": Reason.CONDITIONAL_WRITES_UNSUPPORTED,
    "Crc64Mismatch": Reason.INTEGRITY_MISMATCH,
    "Md5Mismatch": Reason.INTEGRITY_MISMATCH,
    "AccountBeingCreated": Reason.STORE_UNAVAILABLE,
    "InternalError": Reason.STORE_UNAVAILABLE,
    "OperationTimedOut": Reason.STORE_UNAVAILABLE,
    "ServerBusy": Reason.STORE_UNAVAILABLE,
    "SystemInUse": Reason.STORE_UNAVAILABLE,
}
_STATUSES: dict[int, Reason] = {
    401: Reason.CREDENTIALS_REFUSED,
    403: Reason.CREDENTIALS_REFUSED,
    408: Reason.STORE_UNAVAILABLE,
    429: Reason.STORE_UNAVAILABLE,
}
# Azure's 409 is no wish for another try (a lease, a snapshot, an archived blob), so it has no line above.

_WAYS_OUT: dict[str, str] = {
    "InvalidBlobOrBlock": "another tool left unfinished blocks at this name: remove them, or wait a week for them to expire",
    "SnapshotsPresent": "remove the snapshots of this blob first",
    "LeaseIdMissing": "somebody holds a lease on this blob: end it first",
    "BlobArchived": "move this blob out of the Archive tier first",
    "BlobImmutableDueToPolicy": "the container's immutability policy forbids it: use a container without one",
}


def _judge(code: str, status: int) -> Reason:
    """What an error code (x-ms-error-code; may be empty) with its HTTP status means."""
    fallback = Reason.STORE_UNAVAILABLE if status >= 500 else Reason.REQUEST_REJECTED
    return _REASONS.get(code) or _STATUSES.get(status, fallback)


def _explain(code: str, said: str, status: int) -> str:
    """The store's own words and, where they leave one helpless, what to do."""
    words = f"{code}: {said} (HTTP {status})" if code else f"HTTP {status}"
    way_out = _WAYS_OUT.get(code)
    return f"{words}: {way_out}" if way_out else words


def classify(error: Exception) -> tuple[Reason, str, str | None]:
    """(reason, what the store said, its request id) of an exception of the SDK."""
    if isinstance(error, HttpResponseError) and error.response is not None:
        status, code = error.response.status_code or 0, code_of(error)
        lines = str(error.message).splitlines() or [""]
        if status >= 400:
            return _judge(code, status), _explain(code, lines[0], status), _header(error, "x-ms-request-id")
    elif isinstance(error, ClientAuthenticationError):
        # azure-identity's, which says at length what it tried.
        return Reason.CREDENTIALS_MISSING, f"no identity gave a token ({type(error).__name__})", None
    elif isinstance(error, ValueError):
        return (
            Reason.STORE_UNAVAILABLE,
            f"the endpoint gave an answer that is none of Azure's ({type(error).__name__})",
            None,
        )
    return Reason.STORE_UNAVAILABLE, _transport_failure(error), None


def code_of(error: Exception) -> str:
    """x-ms-error-code; empty where there was no answer, or one without it."""
    found = getattr(error, "error_code", None) or _header(error, "x-ms-error-code")
    return str(getattr(found, "value", found) or "")


def _header(error: Exception, name: str) -> str | None:
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    return headers.get(name)


def _transport_failure(error: BaseException) -> str:
    """What went wrong on the wire, by the innermost exception's type: the texts around it hold the URL."""
    innermost: BaseException | None = error
    while innermost is not None:
        error, innermost = innermost, _inner(innermost)
    if isinstance(error, ssl.SSLError):
        text = error.reason or ""  # its errno is OpenSSL's
    else:
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else ""
    return f"no answer from the account's endpoint ({type(error).__name__}{': ' + text if text else ''})"


def _inner(error: BaseException) -> BaseException | None:
    """What an exception of azure-core, requests or urllib3 wraps; each does it in its own way."""
    wraps = (getattr(error, "inner_exception", None), getattr(error, "reason", None), error.__cause__, *error.args)
    return next((found for found in wraps if isinstance(found, BaseException)), None)
