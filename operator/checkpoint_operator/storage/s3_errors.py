"""What the errors of S3 mean: one table from its codes to our reasons."""

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage.connector import WireError
from checkpoint_operator.storage.s3_wire import Answer, said

# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; what is missing here is judged by its status.
_REASONS: dict[str, Reason] = {
    "AccessDenied": Reason.CREDENTIALS_REFUSED,
    "AccountProblem": Reason.CREDENTIALS_REFUSED,
    "ExpiredToken": Reason.CREDENTIALS_REFUSED,
    "InvalidAccessKeyId": Reason.CREDENTIALS_REFUSED,
    "InvalidToken": Reason.CREDENTIALS_REFUSED,
    "SignatureDoesNotMatch": Reason.CREDENTIALS_REFUSED,
    "NoSuchBucket": Reason.BUCKET_NOT_FOUND,
    "InvalidBucketName": Reason.BUCKET_NOT_FOUND,
    "BadDigest": Reason.INTEGRITY_MISMATCH,
    "XAmzContentChecksumMismatch": Reason.INTEGRITY_MISMATCH,
    "XAmzContentSHA256Mismatch": Reason.INTEGRITY_MISMATCH,
    "NotImplemented": Reason.CONDITIONAL_WRITES_UNSUPPORTED,
    "RequestTimeTooSkewed": Reason.STORE_UNAVAILABLE,
    "RequestTimeout": Reason.STORE_UNAVAILABLE,
    "SlowDown": Reason.STORE_UNAVAILABLE,
    "InternalError": Reason.STORE_UNAVAILABLE,
    "ServiceUnavailable": Reason.STORE_UNAVAILABLE,
    "OperationAborted": Reason.STORE_UNAVAILABLE,
    "ConditionalRequestConflict": Reason.STORE_UNAVAILABLE,
}
_STATUSES: dict[int, Reason] = {
    401: Reason.CREDENTIALS_REFUSED,
    403: Reason.CREDENTIALS_REFUSED,
    408: Reason.STORE_UNAVAILABLE,
    409: Reason.STORE_UNAVAILABLE,
    429: Reason.STORE_UNAVAILABLE,
}


def classify(error: Exception) -> tuple[Reason, str, str | None]:
    """(reason, what the store said, its request id) of an exception of the SDK or of the wire."""
    if isinstance(error, ClientError):
        code, status = code_of(error), status_of(error)
        fallback = Reason.STORE_UNAVAILABLE if status >= 500 else Reason.REQUEST_REJECTED
        reason = _REASONS.get(code) or _STATUSES.get(status, fallback)
        said = f"{code}: {error.response['Error'].get('Message', '')} (HTTP {status})"
        return reason, said, error.response["ResponseMetadata"].get("RequestId")
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        return Reason.CREDENTIALS_MISSING, "no usable credentials were found", None
    if isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError | WireError):
        return Reason.STORE_UNAVAILABLE, str(error), None
    return Reason.REQUEST_REJECTED, str(error), None


def error_of(answer: Answer, operation: str) -> ClientError:
    """An error that came over the wire, as botocore's client would have raised it."""
    found = said(answer)
    code, message = found.get("Code", str(answer.status)), found.get("Message", "")
    request_id = answer.headers.get("x-amz-request-id")
    return ClientError(
        {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": answer.status, "RequestId": request_id},  # type: ignore[typeddict-item]
        },
        operation,
    )


def code_of(error: Exception) -> str:
    """The store's code; empty where no store has spoken."""
    return str(error.response["Error"].get("Code", "")) if isinstance(error, ClientError) else ""


def status_of(error: Exception) -> int:
    """The HTTP status; 0 where no store has spoken."""
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0)) if isinstance(error, ClientError) else 0
