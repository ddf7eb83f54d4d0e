"""S3 and whatever speaks it: the only file that touches boto3.

Conditions: ``If-None-Match: *`` and ``If-Match`` on PutObject and CompleteMultipartUpload, ``If-Match`` on DeleteObject.
Signing, retries of requests and connection pools are botocore's.
"""

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import marker
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.store import Entry, Stat, UploadLost, Written

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MIB = 1 << 20
PART_SIZE = 16 * MIB
"""One request's body; also the largest object that is written in one PUT."""
MAX_PARTS = 10_000  # https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
OWNER = "artifact-uid"
"""User metadata (x-amz-meta-artifact-uid) by which a deletion knows its own objects."""

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


class S3Store:
    """One bucket. See :class:`checkpoint_operator.storage.store.ObjectStore` for what each method promises."""

    def __init__(self, client: "S3Client", bucket: str, options: TargetOptions, *, conditional: bool = True) -> None:
        self._client = client
        self._bucket = bucket
        self._options = options
        self._conditional = conditional
        self._encryption: dict[str, Any] = {}
        if options.sse_kms_key_id:
            self._encryption.update(ServerSideEncryption="aws:kms", SSEKMSKeyId=options.sse_kms_key_id)
        self._extra = dict(self._encryption)
        if options.storage_class:
            # Of the data alone: a marker in an archive could not be read any more.
            self._extra["StorageClass"] = options.storage_class

    def without_conditions(self) -> "S3Store":
        return S3Store(self._client, self._bucket, self._options, conditional=False)

    def read(self, key: str) -> tuple[bytes, str] | None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=key)
            if answer["ContentLength"] > marker.MAX_BYTES:
                answer["Body"].close()
                raise marker.too_large(answer["ContentLength"], f"s3://{self._bucket}/{key}")
            return answer["Body"].read(), answer["ETag"]
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                return None
            self._refuse(error, "read", key)
        except BotoCoreError as error:
            self._refuse(error, "read", key)

    def create(self, key: str, data: bytes) -> str | None:
        return None if self._is_taken(key) else self._write_small(key, data, self._if_absent())

    def swap(self, key: str, token: str, data: bytes) -> str | None:
        if not self._conditional:
            stat = self.stat(key)
            return self._write_small(key, data, {}) if stat and stat.token == token else None
        return self._write_small(key, data, {"IfMatch": token})

    def _if_absent(self) -> dict[str, Any]:
        return {"IfNoneMatch": "*"} if self._conditional else {}

    def _is_taken(self, key: str) -> bool:
        return not self._conditional and self.stat(key) is not None

    def _write_small(self, key: str, data: bytes, condition: dict[str, Any]) -> str | None:
        try:
            return self._client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=data,
                ContentType="application/json",
                ChecksumSHA256=_base64(hashlib.sha256(data).digest()),
                **condition,
                **self._encryption,
            )["ETag"]
        except ClientError as error:
            if _lost(error) or _code(error) in ("NoSuchKey", "404", "ConditionalRequestConflict"):
                return None
            self._refuse(error, "write", key)
        except BotoCoreError as error:
            self._refuse(error, "write", key)

    def remove(self, key: str, token: str) -> None:
        condition: dict[str, Any] = {"IfMatch": token}
        if not self._conditional:
            stat = self.stat(key)
            if stat is None or stat.token != token:
                return
            condition = {}
        try:
            self._client.delete_object(Bucket=self._bucket, Key=key, **condition)
        except ClientError as error:
            if not _lost(error) and _code(error) not in ("NoSuchKey", "404"):
                self._refuse(error, "delete", key)
        except BotoCoreError as error:
            self._refuse(error, "delete", key)

    def list(self, prefix: str) -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        try:
            for page in pages:
                for item in page.get("Contents", []):
                    yield Entry(item["Key"], item["Size"], item["ETag"])
        except (ClientError, BotoCoreError) as error:
            self._refuse(error, "list", prefix)

    def stat(self, key: str) -> Stat | None:
        try:
            answer = self._client.head_object(Bucket=self._bucket, Key=key, ChecksumMode="ENABLED")
        except ClientError as error:
            if _status(error) == 404:
                return None
            self._refuse(error, "head", key)
        except BotoCoreError as error:
            self._refuse(error, "head", key)
        return Stat(answer["ContentLength"], answer["ETag"], answer.get("ChecksumSHA256"), answer["Metadata"].get(OWNER))

    def fetch(self, key: str, token: str, start: int, length: int) -> bytes:
        try:
            return self._client.get_object(
                Bucket=self._bucket, Key=key, IfMatch=token, Range=f"bytes={start}-{start + length - 1}"
            )["Body"].read()
        except ClientError as error:
            if _lost(error) or _status(error) == 404:
                raise StorageError(
                    Reason.INTEGRITY_MISMATCH,
                    f"'{key}' is not the object that the manifest lists: it was replaced or removed",
                    backend="s3",
                    operation="fetch",
                    path=key,
                ) from error
            self._refuse(error, "fetch", key)
        except BotoCoreError as error:
            self._refuse(error, "fetch", key)

    def part_size(self, size: int) -> int:
        smallest = -(-size // MAX_PARTS)
        return max(PART_SIZE, -(-smallest // MIB) * MIB)

    def checksum(self, part_digests: Sequence[bytes]) -> str:
        # SHA-256 exists as COMPOSITE only: the hash of the parts' hashes, and their number.
        # https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html
        if len(part_digests) == 1:
            return _base64(part_digests[0])
        return f"{_base64(hashlib.sha256(b''.join(part_digests)).digest())}-{len(part_digests)}"

    def put(self, key: str, body: bytes, digest: bytes, owner: str) -> Written | None:
        if self._is_taken(key):
            return None
        try:
            answer = self._client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=body,
                ChecksumSHA256=_base64(digest),
                Metadata={OWNER: owner},
                **self._if_absent(),
                **self._extra,
            )
        except ClientError as error:
            if _lost(error) or _code(error) == "ConditionalRequestConflict":
                return None
            self._refuse(error, "put", key)
        except BotoCoreError as error:
            self._refuse(error, "put", key)
        return Written(answer["ETag"], answer.get("ChecksumSHA256"))

    def start_upload(self, key: str, owner: str) -> str:
        try:
            return self._client.create_multipart_upload(
                Bucket=self._bucket, Key=key, ChecksumAlgorithm="SHA256", Metadata={OWNER: owner}, **self._extra
            )["UploadId"]
        except (ClientError, BotoCoreError) as error:
            self._refuse(error, "start upload", key)

    def put_part(self, key: str, upload_id: str, number: int, body: bytes, digest: bytes) -> str:
        try:
            return self._client.upload_part(
                Bucket=self._bucket,
                Key=key,
                UploadId=upload_id,
                PartNumber=number,
                Body=body,
                ChecksumSHA256=_base64(digest),
            )["ETag"]
        except ClientError as error:
            if _code(error) == "NoSuchUpload":
                raise UploadLost from error
            self._refuse(error, "put part", key)
        except BotoCoreError as error:
            self._refuse(error, "put part", key)

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[str], digests: Sequence[bytes]) -> Written | None:
        if self._is_taken(key):
            return None
        try:
            answer = self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=key,
                UploadId=upload_id,
                **self._if_absent(),
                MultipartUpload={
                    "Parts": [
                        {"PartNumber": number, "ETag": etag, "ChecksumSHA256": _base64(digest)}
                        for number, (etag, digest) in enumerate(zip(parts, digests, strict=True), 1)
                    ]
                },
            )
        except ClientError as error:
            if _lost(error):
                return None
            if _code(error) == "NoSuchUpload" or _status(error) == 409:
                raise UploadLost from error
            self._refuse(error, "finish upload", key)
        except BotoCoreError as error:
            self._refuse(error, "finish upload", key)
        return Written(answer["ETag"], answer.get("ChecksumSHA256"))

    def abort_upload(self, key: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id)
        except ClientError as error:
            if _code(error) != "NoSuchUpload":
                self._refuse(error, "abort upload", key)
        except BotoCoreError as error:
            self._refuse(error, "abort upload", key)

    def list_uploads(self, prefix: str) -> Iterator[tuple[str, str]]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
        try:
            for page in pages:
                for upload in page.get("Uploads", []):
                    yield upload["Key"], upload["UploadId"]
        except (ClientError, BotoCoreError) as error:
            self._refuse(error, "list uploads", prefix)

    def honours_conditions(self, probe_key: str) -> bool:
        # A store that knows no conditions ignores them: then the second create overwrites, and the wrong If-Match too.
        try:
            first = self.create(probe_key, b"1")
            if first is None:
                return True
            refused = self.create(probe_key, b"2") is None and self.swap(probe_key, '"0"', b"3") is None
        except StorageError as error:
            if error.reason is not Reason.CONDITIONAL_WRITES_UNSUPPORTED:
                raise
            refused = False  # it says so itself (501)
        current = self.read(probe_key)
        if current is not None:
            self.without_conditions().remove(probe_key, current[1])
        return refused and current is not None and current[0] == b"1"

    def _refuse(self, error: Exception, operation: str, key: str) -> NoReturn:
        """Turn an SDK's exception into ours; no request, header or key of it is repeated, only what the store said."""
        reason, said, request_id = classify(error)
        raise StorageError(
            reason,
            f"{operation} of '{key}' in bucket '{self._bucket}' failed: {said}",
            backend="s3",
            operation=operation,
            path=key,
            request_id=request_id,
        ) from error


def classify(error: Exception) -> tuple[Reason, str, str | None]:
    """(reason, what the store said, its request id) of an exception of the SDK."""
    if isinstance(error, ClientError):
        code, status = _code(error), _status(error)
        fallback = Reason.STORE_UNAVAILABLE if status >= 500 else Reason.REQUEST_REJECTED
        reason = _REASONS.get(code) or _STATUSES.get(status, fallback)
        said = f"{code}: {error.response['Error'].get('Message', '')} (HTTP {status})"
        return reason, said, error.response["ResponseMetadata"].get("RequestId")
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        return Reason.CREDENTIALS_MISSING, "no usable credentials were found", None
    if isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError):
        return Reason.STORE_UNAVAILABLE, str(error), None
    return Reason.REQUEST_REJECTED, str(error), None


def open_s3(uri: TargetURI, options: TargetOptions, workers: int) -> S3Store:
    """Connect to the bucket of a URI. Nothing is sent yet.

    Raises:
        StorageError: CredentialsMissing, before any request, where only a profile may be used and it holds no keys.
    """
    keys = _read_credentials(options)
    try:
        session = boto3.session.Session(
            aws_access_key_id=keys.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=keys.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=keys.get("AWS_SESSION_TOKEN"),
        )
        client = session.client(
            "s3",
            endpoint_url=options.endpoint or _endpoint_alias(),
            region_name=options.region or (None if session.region_name else "us-east-1"),
            config=Config(
                retries={"mode": "standard", "total_max_attempts": 5},
                connect_timeout=10,
                read_timeout=60,
                tcp_keepalive=True,
                max_pool_connections=workers + 2,
                s3={"addressing_style": "path" if options.force_path_style else "auto"},
                # We send our own SHA-256 with every body, and compare what comes back with the manifest.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            Reason.REQUEST_REJECTED, f"the S3 client cannot be made: {error}", uri=str(uri), backend="s3"
        ) from error
    return S3Store(client, uri.bucket, options)


def _read_credentials(options: TargetOptions) -> dict[str, str]:
    if options.credentials_directory is None:
        if not options.allow_ambient_credentials:
            raise StorageError(
                Reason.CREDENTIALS_MISSING, "no credential profile is configured for this target", backend="s3"
            )
        return {}
    folder, found = Path(options.credentials_directory), {}
    for name, required in (("AWS_ACCESS_KEY_ID", True), ("AWS_SECRET_ACCESS_KEY", True), ("AWS_SESSION_TOKEN", False)):
        try:
            value = (folder / name).read_text().strip()
        except OSError as error:
            if required:
                raise StorageError(
                    Reason.CREDENTIALS_MISSING, f"the credentials have no key '{name}'", backend="s3"
                ) from error
            continue
        except UnicodeDecodeError:
            # Not chained: that exception holds the bytes.
            value = ""
        if value.isascii() and value.isprintable() and value:
            found[name] = value
        elif required or value:
            # An empty key would make boto3 look for other credentials: those of the process.
            raise StorageError(
                Reason.CREDENTIALS_MISSING, f"the credentials' key '{name}' is empty, or no line of text", backend="s3"
            )
    return found


def _endpoint_alias() -> str | None:
    """S3_ENDPOINT_URL, where none of the SDK's own variables (which come first) is set."""
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        return None
    return os.environ.get("S3_ENDPOINT_URL")


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _code(error: ClientError) -> str:
    return str(error.response["Error"].get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))


def _lost(error: ClientError) -> bool:
    """The condition did not hold, or it did and a retry met what the first try had written."""
    return _status(error) == 412
