"""S3 and whatever speaks it, as an :class:`~checkpoint_operator.storage.store.ObjectStore`.

Conditions: ``If-None-Match: *`` and ``If-Match`` on PutObject and CompleteMultipartUpload, ``If-Match`` on DeleteObject.
Control requests are botocore's client's; bodies go over :mod:`checkpoint_operator.storage.s3_wire`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from botocore.exceptions import BotoCoreError, ClientError

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import marker
from checkpoint_operator.storage.connector import WireError
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.s3_checksums import CRC64, MD5, Checksums
from checkpoint_operator.storage.s3_connect import Connection, connect
from checkpoint_operator.storage.s3_errors import classify, code_of, error_of, status_of
from checkpoint_operator.storage.s3_wire import Answer, TooLarge
from checkpoint_operator.storage.store import (
    Arrived,
    Body,
    Buffer,
    Entry,
    Part,
    Piece,
    Stat,
    Upload,
    UploadLost,
    Written,
    unheard,
)
from checkpoint_operator.storage.turn import TURN

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MIB = 1 << 20
PART_SIZE = 8 * MIB
"""One request's body; also the largest object that is written in one PUT."""
MAX_PARTS = 10_000  # https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MAX_KEY_BYTES = 1024
OWNER = "artifact-uid"
"""User metadata (x-amz-meta-artifact-uid) by which a deletion knows its own objects."""

_GONE = ("NoSuchKey", "404")
_ELSEWHERE = (301, 307, 400)
"""How a bucket of another region answers."""
# A part that is not what it was when it was sent: somebody else wrote to this upload.
_OTHER_PARTS = ("NoSuchUpload", "InvalidPart", "InvalidPartOrder", "EntityTooSmall", "BadDigest")
_FAILURES = (ClientError, BotoCoreError, WireError)


class S3Store:
    """One bucket. See :class:`checkpoint_operator.storage.store.ObjectStore` for what each method promises."""

    def __init__(self, connection: Connection, *, conditional: bool = True, checksums: Checksums = CRC64) -> None:
        self._connection = connection
        self._bucket = connection.bucket
        self._conditional = conditional
        self._deletes_conditionally: bool | None = None
        self._checksums = checksums
        options = connection.options
        self._encryption: dict[str, Any] = {}
        if options.sse_kms_key_id:
            self._encryption.update(ServerSideEncryption="aws:kms", SSEKMSKeyId=options.sse_kms_key_id)
        self._extra = dict(self._encryption)
        if options.storage_class:
            # Of the data alone: a marker in an archive could not be read any more.
            self._extra["StorageClass"] = options.storage_class

    @property
    def _client(self) -> "S3Client":
        return self._connection.client

    def without_conditions(self) -> "S3Store":
        return S3Store(self._connection, conditional=False, checksums=self._checksums)

    def read(self, key: str) -> tuple[bytes, str] | None:
        # Over the wire: botocore would not begin again where the body of an answer is cut.
        try:
            answer = self._connection.wire.get(key, {}, marker.MAX_BYTES)
            if answer.status in _ELSEWHERE:
                # botocore's client knows where to look; from then on the wire does as well.
                self._connection.follow(key)
                answer = self._connection.wire.get(key, {}, marker.MAX_BYTES)
        except TooLarge as error:
            raise marker.too_large(error.size, f"s3://{self._bucket}/{key}") from error
        except _FAILURES as error:
            raise self._refused(error, "read", key) from error
        if answer.status == 200:
            return bytes(answer.body), answer.headers["ETag"]
        said = error_of(answer, "GetObject")
        if code_of(said) in _GONE:
            return None
        raise self._refused(said, "read", key) from said

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
                **self._checksums.parameters(self._checksums.digest(data)),
                **condition,
                **self._encryption,
            )["ETag"]
        except (ClientError, BotoCoreError) as error:
            # 412: the condition did not hold, or it did and a retry met what the first try had written.
            if status_of(error) == 412 or code_of(error) in (*_GONE, "ConditionalRequestConflict"):
                return None
            raise self._refused(error, "write", key) from error

    def remove(self, key: str, token: str) -> None:
        if self._conditional and self._deletes_conditionally:
            self._delete(key, token)
            return
        stat = self.stat(key)
        if stat is None or stat.token != token:
            return
        if self._conditional and self._deletes_conditionally is None:
            # Not every store that knows conditions on PUT knows them on DELETE. This is the right version by all that one
            # can know without: if a wrong condition removes it, that was right too, and from now on we look first.
            self._delete(key, '"0"')
            self._deletes_conditionally = self.stat(key) is not None
            self.remove(key, token)
            return
        self._delete(key, None)

    def _delete(self, key: str, token: str | None) -> None:
        condition: dict[str, Any] = {"IfMatch": token} if token else {}
        try:
            self._client.delete_object(Bucket=self._bucket, Key=key, **condition)
        except (ClientError, BotoCoreError) as error:
            if status_of(error) == 501 and condition:
                self._deletes_conditionally = False
            elif status_of(error) != 412 and code_of(error) not in _GONE:
                raise self._refused(error, "delete", key) from error

    def list(self, prefix: str) -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        try:
            for page in pages:
                for item in page.get("Contents", []):
                    yield Entry(item["Key"], item["Size"], item["ETag"])
        except (ClientError, BotoCoreError) as error:
            raise self._refused(error, "list", prefix) from error

    def stat(self, key: str) -> Stat | None:
        try:
            answer = self._client.head_object(Bucket=self._bucket, Key=key, ChecksumMode="ENABLED")
        except (ClientError, BotoCoreError) as error:
            if status_of(error) == 404:
                return None
            raise self._refused(error, "head", key) from error
        said = self._checksums.said_by(answer)
        return Stat(answer["ContentLength"], answer["ETag"], said, answer["Metadata"].get(OWNER))

    def fetch(self, key: str, token: str, start: int, into: memoryview, arrived: Arrived = unheard) -> None:
        try:
            headers = {"If-Match": token, "Range": f"bytes={start}-{start + len(into) - 1}"}
            answer = self._connection.wire.get_into(key, headers, into, arrived)
        except _FAILURES as error:
            raise self._refused(error, "fetch", key) from error
        if answer.body is into:
            return
        said = error_of(answer, "GetObject")
        if answer.status in (200, 206, 404, 412, 416):
            raise StorageError(
                Reason.INTEGRITY_MISMATCH,
                f"'{key}' is not the object that the manifest lists: it was replaced or removed",
                backend="s3",
                operation="fetch",
                path=key,
            ) from said
        raise self._refused(said, "fetch", key) from said

    def refusal(self, key: str) -> str | None:
        length = len(key.encode())
        if length > MAX_KEY_BYTES:
            return f"makes a key of {length} bytes, S3 allows {MAX_KEY_BYTES}"
        if "//" in key:  # the key of a folder, for some servers
            return "has an empty segment"
        if "\ufffe" in key or "\uffff" in key:  # no XML can say them, and lists are XML: some servers answer U+FFFD
            return "has a noncharacter of Unicode, which S3's lists cannot name"
        return None

    def part_size(self, size: int) -> int:
        smallest = -(-size // MAX_PARTS)
        return max(PART_SIZE, -(-smallest // MIB) * MIB)

    def digest(self, body: Body) -> bytes:
        return self._checksums.digest(body)

    def checksum(self, pieces: Sequence[Piece]) -> str:
        return self._checksums.whole(pieces)

    @contextmanager
    def put(self, key: str, body: Buffer, digest: bytes, owner: str) -> Iterator[Callable[[], Written | None]]:
        with TURN.let_go():
            is_taken = self._is_taken(key)
        if is_taken:
            yield lambda: None
            return
        headers = {**self._checksums.headers(digest), f"x-amz-meta-{OWNER}": owner}
        if self._conditional:
            headers["If-None-Match"] = "*"
        for parameter, header in _EXTRA_HEADERS.items():
            if parameter in self._extra:
                headers[header] = self._extra[parameter]
        with self._sending("put", key, "", headers, body) as answer:
            yield lambda: self._written(key, answer())

    def _written(self, key: str, answer: Answer) -> Written | None:
        if answer.status == 200:
            return Written(answer.headers["ETag"], self._checksums.said_in(answer.headers))
        error = error_of(answer, "PutObject")
        if answer.status == 412 or code_of(error) == "ConditionalRequestConflict":
            return None
        raise self._refused(error, "put", key) from error

    def start_upload(self, key: str, owner: str) -> str:
        try:
            return self._client.create_multipart_upload(
                Bucket=self._bucket, Key=key, Metadata={OWNER: owner}, **self._checksums.start(), **self._extra
            )["UploadId"]
        except (ClientError, BotoCoreError) as error:
            raise self._refused(error, "start upload", key) from error

    def put_part(self, key: str, upload_id: str, number: int, body: Body, digest: bytes) -> str:
        query = f"?partNumber={number}&uploadId={quote(upload_id, safe='-_.~')}"
        with self._sending("put part", key, query, self._checksums.headers(digest), body) as wait:
            answer = wait()
        if answer.status == 200:
            return answer.headers["ETag"]
        error = error_of(answer, "UploadPart")
        if code_of(error) == "NoSuchUpload":
            raise UploadLost from error
        raise self._refused(error, "put part", key) from error

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[Part], owner: str) -> Written | None:
        if self._is_taken(key):
            return None
        try:
            answer = self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=key,
                UploadId=upload_id,
                MultipartUpload=self._table(parts),
                **self._if_absent(),
                **self._checksums.finish(parts),
            )
        except (ClientError, BotoCoreError) as error:
            if status_of(error) == 412:
                return None
            if code_of(error) in _OTHER_PARTS or status_of(error) == 409:
                raise UploadLost from error
            raise self._refused(error, "finish upload", key) from error
        return Written(answer["ETag"], self._checksums.said_by(answer))

    def _table(self, parts: Sequence[Part]) -> Any:
        def line(part: Part) -> dict[str, Any]:
            return {"PartNumber": part.number, "ETag": part.token, **self._checksums.part(part.digest)}

        return {"Parts": [line(part) for part in parts]}

    def abort_upload(self, key: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id)
        except (ClientError, BotoCoreError) as error:
            if code_of(error) != "NoSuchUpload":
                raise self._refused(error, "abort upload", key) from error

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
        try:
            for page in pages:
                for upload in page.get("Uploads", []):
                    yield Upload(upload["Key"], upload["UploadId"])
        except (ClientError, BotoCoreError) as error:
            raise self._refused(error, "list uploads", prefix) from error

    def list_parts(self, key: str, upload_id: str) -> Sequence[Part]:
        pages = self._client.get_paginator("list_parts").paginate(Bucket=self._bucket, Key=key, UploadId=upload_id)
        try:
            return [
                Part(item["PartNumber"], item["Size"], item["ETag"], self._checksums.listed(item))
                for page in pages
                for item in page.get("Parts", [])
            ]
        except (ClientError, BotoCoreError) as error:
            if code_of(error) == "NoSuchUpload":
                return []
            raise self._refused(error, "list parts", key) from error

    def is_part(self, part: Part, body: Body, digest: bytes) -> bool:
        if part.size != len(body):
            return False
        # Not every store lists the checksums of parts (SeaweedFS does not), but the ETag of a part is its MD5.
        return part.digest == digest if part.digest else part.token.strip('"') == MD5.digest(body).hex()

    def honours_conditions(self, probe_key: str) -> bool:
        # A store that knows no conditions ignores them: then the second create overwrites, and the wrong If-Match too.
        try:
            self._probe_create(probe_key)
            refused = self.create(probe_key, b"2") is None and self.swap(probe_key, '"0"', b"3") is None
        except StorageError as error:
            if error.reason is not Reason.CONDITIONAL_WRITES_UNSUPPORTED:
                raise
            refused = False  # it says so itself (501)
        current, stat = self.read(probe_key), self.stat(probe_key)
        if current is None or stat is None:
            return False
        if stat.checksum is None:
            self._checksums = MD5
        self.without_conditions().remove(probe_key, current[1])
        return refused and current[0] == b"1"

    def _probe_create(self, key: str) -> str | None:
        """The first write of a probe; a store that refuses a checksum that it does not know is asked without it."""
        try:
            return self.create(key, b"1")
        except StorageError as error:
            if error.reason not in (Reason.REQUEST_REJECTED, Reason.CONDITIONAL_WRITES_UNSUPPORTED):
                raise
        self._checksums = MD5
        return self.create(key, b"1")

    @contextmanager
    def _sending(
        self, operation: str, key: str, query: str, headers: dict[str, str], body: Body
    ) -> Iterator[Callable[[], Answer]]:
        """With a body on its way; what waits for the answer."""
        try:
            with self._connection.wire.putting(key, query, headers, body) as answer:
                yield answer
        except _FAILURES as error:
            raise self._refused(error, operation, key) from error

    def _refused(self, error: Exception, operation: str, key: str) -> StorageError:
        """An SDK's exception as ours; no request, header or key of it is repeated, only what the store said."""
        reason, said, request_id = classify(error)
        return StorageError(
            reason,
            f"{operation} of '{key}' in bucket '{self._bucket}' failed: {said}",
            backend="s3",
            operation=operation,
            path=key,
            request_id=request_id,
        )


_EXTRA_HEADERS = {
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "StorageClass": "x-amz-storage-class",
}


def open_s3(uri: TargetURI, options: TargetOptions, streams: int) -> S3Store:
    """Connect to the bucket of a URI; see :func:`checkpoint_operator.storage.s3_connect.connect`."""
    return S3Store(connect(uri, options, streams))
