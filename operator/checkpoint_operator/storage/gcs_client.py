"""One bucket of Google Cloud Storage: the file that touches Google's client.

Signing, tokens, retries and the JSON of small requests are Google's. The bodies are sent and fetched here, over the same
authorised session: the client turns whatever is larger than 8 MiB into a resumable session, whose URI is a bearer secret,
and copies each body twice.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

from google.api_core.exceptions import GoogleAPICallError, NotFound, PreconditionFailed, RetryError, from_http_response
from google.auth.credentials import Credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, MalformedError, TransportError
from google.auth.transport.requests import AuthorizedSession, Request
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY
from requests import RequestException, Response, Session
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.gate import Gate
from checkpoint_operator.storage.gcs_credentials import make_credentials
from checkpoint_operator.storage.gcs_identity import Identity
from checkpoint_operator.storage.store import Body, Buffer, bites_of

TIMEOUT = (10.0, 60.0)
"""Seconds to connect, or to send 256 KiB, and seconds without a byte of an answer."""
DEADLINE = 120.0
"""Seconds after which a request that keeps failing is not tried again. The library's default."""
_STEP = 256 << 10
# Only what is used: a listing of 1,000 objects is a fifth as long.
_FIELDS = "name,size,generation,crc32c,metadata"

# https://cloud.google.com/storage/docs/json_api/v1/status-codes; a reason that is missing here is judged by its status.
_REASONS: dict[str, Reason] = {
    "rateLimitExceeded": Reason.STORE_UNAVAILABLE,  # these come as 403 as well
    "userRateLimitExceeded": Reason.STORE_UNAVAILABLE,
    "quotaExceeded": Reason.STORE_UNAVAILABLE,
    "uploadBrokenConnection": Reason.STORE_UNAVAILABLE,
    "retentionPolicyNotMet": Reason.REQUEST_REJECTED,
    "objectUnderActiveHold": Reason.REQUEST_REJECTED,
    "orgPolicyConstraintFailed": Reason.REQUEST_REJECTED,
    "conditionNotMet": Reason.REQUEST_REJECTED,
}
_STATUSES: dict[int, Reason] = {
    401: Reason.CREDENTIALS_REFUSED,
    403: Reason.CREDENTIALS_REFUSED,
    404: Reason.BUCKET_NOT_FOUND,  # of an object it is no error, see Missing
    408: Reason.STORE_UNAVAILABLE,
    416: Reason.INTEGRITY_MISMATCH,
    429: Reason.STORE_UNAVAILABLE,
    501: Reason.CONDITIONAL_WRITES_UNSUPPORTED,
}

_FAILURES = (GoogleAPICallError, RetryError, GoogleAuthError, RequestException, HTTPError, ConnectionError)

Answer = TypeVar("Answer")


class Unmet(Exception):
    """The condition did not hold, or it did and a retry met what the first try had written (412)."""


class Missing(Exception):
    """The object, a source of a composition, or the whole bucket is not there (404)."""


@dataclass(frozen=True)
class Resource:
    """What Google says of an object. ``crc32c`` is base64; ``generation`` names this version of it."""

    name: str
    size: int
    generation: str
    crc32c: str | None
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """How an object is kept: what it is to the store beside name and bytes."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/octet-stream"
    cache_control: str | None = None
    storage_class: str | None = None

    def resource(self) -> dict[str, Any]:
        """The writable part of the object's resource in the JSON API."""
        found = {
            "metadata": dict(self.metadata),
            "contentType": self.content_type,
            "cacheControl": self.cache_control,
            "storageClass": self.storage_class,
        }
        return {key: value for key, value in found.items() if value}


class Bucket:
    """The verbs. ``if_generation`` "0" means: only if there is no such object; None: whatever is there.

    Every verb may be called from several threads, and raises Unmet, Missing where its docstring says so, and
    StorageError.
    """

    def __init__(
        self,
        name: str,
        session: AuthorizedSession,
        credentials: Credentials,
        endpoint: str,
        kms_key: str | None,
        *,
        gate: Gate,
    ) -> None:
        self.name = name
        self.gate = gate  # of the requests that have a body, either way
        self._endpoint, self._session, self._kms_key = endpoint, session, kms_key
        client = storage.Client(
            project="unused", credentials=credentials, _http=session, client_options={"api_endpoint": endpoint}
        )
        # For its traces the client would ask for the bucket's own metadata in a thread: a right more, and nobody traces.
        client._bucket_metadata_cache = None
        self._bucket, self._client = client.bucket(name), client
        self._retry = DEFAULT_RETRY.with_timeout(DEADLINE).with_delay(initial=0.5, maximum=16.0, multiplier=2.0)

    def insert(self, key: str, body: Body, crc32c: str, kind: Kind, if_generation: str | None) -> Resource:
        """Write an object in one request. Raises Unmet, and IntegrityMismatch where the body has another checksum."""
        parts = _Related({"name": key, "crc32c": crc32c, **kind.resource()}, body)
        params = {
            "uploadType": "multipart",
            "ifGenerationMatch": if_generation,
            "kmsKeyName": self._kms_key,
            "fields": _FIELDS,
        }
        url = f"{self._endpoint}/upload/storage/v1/b/{quote(self.name, safe='')}/o"

        def send() -> Resource:
            answer = self._session.request(
                "POST", url, data=parts, params=params, headers={"Content-Type": parts.content_type}, timeout=TIMEOUT
            )
            return _resource(_checked(answer).json())

        try:
            return self._call("put", key, self._retrying(send))
        except Missing as error:
            self._refuse(error.__cause__ or error, "put", key)

    def fetch(
        self, key: str, generation: str | None = None, span: tuple[int, int] | None = None, limit: int | None = None
    ) -> tuple[bytes, str, int]:
        """(bytes, generation, size of them). ``span`` is (start, length) with a length above 0.

        What is larger than ``limit`` or the span is not read: then the bytes are empty, and the size tells. Raises Missing.
        """
        url = f"{self._endpoint}/download/storage/v1/b/{quote(self.name, safe='')}/o/{quote(key, safe='')}"
        params = {"alt": "media", "generation": generation}
        # The bytes as they are stored, whatever somebody's Content-Encoding says about them.
        headers = {"Accept-Encoding": "gzip"}
        if span:
            limit = span[1]
            headers["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"

        def receive() -> tuple[bytes, str, int]:
            with self._session.request("GET", url, params=params, headers=headers, timeout=TIMEOUT, stream=True) as answer:
                _checked(answer)
                announced = answer.headers.get("Content-Length")
                if announced is None:
                    raise ConnectionError("the answer does not say how long it is")
                size = int(announced)
                read = limit is None or size <= limit
                body = answer.raw.read(size, decode_content=False) if read else b""
                if read and len(body) != size:
                    raise ConnectionError(f"the answer ended after {len(body)} of {size} bytes")
                return body, answer.headers.get("x-goog-generation") or generation or "", size

        return self._call("fetch" if span else "read", key, self._retrying(receive))

    def get(self, key: str) -> Resource | None:
        """What is known about an object, or None where it (or the bucket) is not there."""
        blob = self._bucket.blob(key)
        try:
            self._call("head", key, lambda: blob.reload(timeout=TIMEOUT, retry=self._retry))
        except Missing:
            return None
        return _of_blob(blob)

    def list(self, prefix: str, limit: int | None = None) -> Iterator[Resource]:
        """All (or the first) objects below a prefix, in the order of their names."""
        try:
            pages = self._client.list_blobs(
                self._bucket,
                prefix=prefix,
                max_results=limit,
                fields=f"items({_FIELDS}),nextPageToken",
                timeout=TIMEOUT,
                retry=self._retry,
            ).pages
            while (page := self._call("list", prefix, lambda: next(pages, None))) is not None:
                yield from (_of_blob(blob) for blob in page)
        except Missing as error:
            self._refuse(error.__cause__ or error, "list", prefix)

    def compose(self, key: str, sources: Sequence[Resource], kind: Kind, if_generation: str | None) -> Resource:
        """Make an object of up to 32 others, exactly of these generations. Raises Unmet (also for a source), Missing."""
        blob = self._bucket.blob(key, kms_key_name=self._kms_key)
        blob.metadata, blob.content_type = dict(kind.metadata), kind.content_type
        if kind.storage_class:
            blob.storage_class = kind.storage_class
        blobs = [self._bucket.blob(source.name, generation=int(source.generation)) for source in sources]

        def compose() -> None:
            blob.compose(
                blobs,
                if_generation_match=None if if_generation is None else int(if_generation),
                if_source_generation_match=[int(source.generation) for source in sources],
                timeout=TIMEOUT,
                retry=self._retry,
            )

        self._call("finish upload", key, compose)
        return _of_blob(blob)

    def delete(self, key: str, if_generation: str | None) -> None:
        """Remove an object. Raises Unmet, Missing."""
        blob = self._bucket.blob(key)
        condition = None if if_generation is None else int(if_generation)
        self._call("delete", key, lambda: blob.delete(if_generation_match=condition, timeout=TIMEOUT, retry=self._retry))

    def _retrying(self, work: Callable[[], Answer]) -> Callable[[], Answer]:
        """The same with retries, each of which waits for its turn at the gate."""

        def once() -> Answer:
            with self.gate.passed():
                answer = work()
            self.gate.went_well()
            return answer

        def failed(error: Exception) -> None:
            self.gate.answered(int(getattr(error, "code", None) or 0))

        again: Callable[[], Answer] = self._retry(once, on_error=failed)
        return again

    def _call(self, operation: str, key: str, work: Callable[[], Answer]) -> Answer:
        try:
            return work()
        except PreconditionFailed as error:
            if _said_reason(error) in ("conditionNotMet", ""):
                raise Unmet from error
            self._refuse(error, operation, key)
        except NotFound as error:
            raise Missing from error
        except (
            GoogleAPICallError,
            RetryError,
            GoogleAuthError,
            RequestException,
            HTTPError,
            ConnectionError,
            ValueError,
        ) as error:
            self._refuse(error, operation, key)

    def _refuse(self, error: BaseException, operation: str, key: str) -> NoReturn:
        """Turn an exception into ours; no header of a request is repeated, only what Google said."""
        reason, said, request_id = classify(error)
        raise StorageError(
            reason,
            f"{operation} of '{key}' in bucket '{self.name}' failed: {said}",
            backend="gcs",
            operation=operation,
            path=key,
            request_id=request_id,
        ) from error


class _Related:
    """A multipart/related body of the object's resource and its bytes, which are not copied.

    It can be iterated again, for a retry. In steps, because a plain socket's timeout is for the whole of what it is given.
    """

    def __init__(self, resource: Mapping[str, Any], body: Body) -> None:
        boundary = secrets.token_hex(16)
        self.content_type = f'multipart/related; boundary="{boundary}"'
        self._head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(resource)}\r\n"
            f"--{boundary}\r\nContent-Type: {resource['contentType']}\r\n\r\n"
        ).encode()
        self._body = body
        self._tail = f"\r\n--{boundary}--\r\n".encode()

    def __len__(self) -> int:
        return len(self._head) + len(self._body) + len(self._tail)

    def __iter__(self) -> Iterator[Buffer]:
        yield self._head
        yield from bites_of(self._body, _STEP)
        yield self._tail


def _checked(answer: Response) -> Response:
    if answer.status_code >= 400:
        raise from_http_response(answer)
    return answer


def _resource(answer: Mapping[str, Any]) -> Resource:
    return Resource(
        answer["name"], int(answer["size"]), str(answer["generation"]), answer.get("crc32c"), answer.get("metadata") or {}
    )


def _of_blob(blob: storage.Blob) -> Resource:
    return Resource(blob.name, int(blob.size or 0), str(blob.generation), blob.crc32c, blob.metadata or {})


def _said_reason(error: GoogleAPICallError) -> str:
    """The machine's word for a refusal, the first one; empty where the answer was no JSON of Google's."""
    return next((str(one.get("reason", "")) for one in error.errors if isinstance(one, dict)), "")


def classify(error: BaseException) -> tuple[Reason, str, str | None]:
    """(reason, what was said, the store's request id) of an exception of Google's client or of the transport below it."""
    match error:
        case RetryError() if error.cause is not None:
            reason, said, request_id = classify(error.cause)
            return reason, f"{said} (tried again for {DEADLINE:.0f} s)", request_id
        case GoogleAPICallError():
            status, word = int(error.code or 0), _said_reason(error)
            fallback = Reason.STORE_UNAVAILABLE if status >= 500 else Reason.REQUEST_REJECTED
            said = next((str(one.get("message")) for one in error.errors if isinstance(one, dict)), str(error.message))
            headers = getattr(error.response, "headers", None) or {}
            return (
                _REASONS.get(word) or _STATUSES.get(status, fallback),
                f"{word or 'no reason given'}: {said} (HTTP {status})",
                headers.get("X-GUploader-UploadID"),
            )
        case DefaultCredentialsError() | MalformedError():
            return Reason.CREDENTIALS_MISSING, "no usable credentials were found", None
        case TransportError():
            return Reason.STORE_UNAVAILABLE, "Google's token endpoint cannot be reached", None
        case GoogleAuthError():
            # Not quoted: whatever answered in the token endpoint's place may have echoed the assertion.
            reason = Reason.STORE_UNAVAILABLE if error.retryable else Reason.CREDENTIALS_REFUSED
            return reason, f"no access token was given for these credentials ({type(error).__name__})", None
        case RequestException() | HTTPError() | ConnectionError():
            return Reason.STORE_UNAVAILABLE, str(error), None
    return Reason.REQUEST_REJECTED, str(error), None


def open_bucket(
    name: str,
    identity: Identity,
    read_again: Callable[[], Identity],
    options: TargetOptions,
    *,
    streams: int,
    connections: int,
) -> Bucket:
    """Connect to a bucket. Nothing is sent yet. ``streams``: bodies that may be under way at once.

    ``read_again`` gives the identity as it is by then: a mounted profile may be replaced while the bucket is in use.

    Raises:
        StorageError: CredentialsMissing.
    """
    plain = Session()  # for tokens: the authorised one would ask itself for them
    try:
        credentials = make_credentials(identity, read_again)
    except (GoogleAuthError, ValueError) as error:
        # Not chained: the library quotes what it could not read.
        raise StorageError(
            Reason.CREDENTIALS_MISSING, f"the credentials cannot be used ({type(error).__name__})", backend="gcs"
        ) from None
    # A 401 is answered with a fresh token and another try, but for who has none.
    fresh = {"refresh_status_codes": ()} if identity.anonymous else {}
    session = AuthorizedSession(credentials, auth_request=Request(plain), refresh_timeout=TIMEOUT[1], **fresh)
    for one in (plain, session):
        one.trust_env = not identity.anonymous  # an emulator on loopback is never behind a proxy
        if options.ca_bundle:
            one.verify = options.ca_bundle
        one.mount("https://", HTTPAdapter(pool_maxsize=connections + 2))
        one.mount("http://", HTTPAdapter(pool_maxsize=connections + 2))
    return Bucket(name, session, credentials, identity.endpoint, options.sse_kms_key_id, gate=Gate(streams))
