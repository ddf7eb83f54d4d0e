"""Azure Blob Storage as an :class:`~checkpoint_operator.storage.store.ObjectStore`.

Conditions: ``If-None-Match: *`` on Put Blob and Put Block List, ``If-Match`` by ETag on Put Blob, Delete Blob and Get Blob.
A file of several pieces is a list of blocks whose ids say all about them (:mod:`.azure_blocks`). Signing, retries and
connection pools are the SDK's; its own threads are not used.
"""

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from azure.core import MatchConditions
from azure.core.exceptions import AzureError
from azure.storage.blob import (
    BlobBlock,
    BlobClient,
    BlobProperties,
    BlockState,
    ContentSettings,
    StandardBlobTier,
)

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import azure_blocks, marker
from checkpoint_operator.storage.azure_blocks import BlockId
from checkpoint_operator.storage.azure_connect import Container, access_tier
from checkpoint_operator.storage.azure_errors import classify, code_of
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.gate import Gate
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
    put_now,
    unheard,
)

OWNER = "artifactuid"
"""Metadata (x-ms-meta-artifactuid) by which a deletion knows its own blobs. Azure wants a C# identifier; and proxies drop
headers with an underscore."""

_TAKEN = ("BlobAlreadyExists", "ConditionNotMet")  # or a retry met what the first try had written
_GONE = ("BlobNotFound",)
_ETAG = re.compile(r'"[!#-~]*"')

PAGE = 5000
"""Blobs in one answer of a listing: as many as Azure gives at once."""

Answer = TypeVar("Answer")


class AzureStore:
    """One container. See :class:`checkpoint_operator.storage.store.ObjectStore` for what each method promises."""

    def __init__(
        self, container: Container, gate: Gate, tier: StandardBlobTier | None = None, *, conditional: bool = True
    ) -> None:
        self._container, self.gate = container, gate
        self._tier = tier
        self._conditional = conditional

    def without_conditions(self) -> "AzureStore":
        return AzureStore(self._container, self.gate, self._tier, conditional=False)

    # ---- Markers

    def read(self, key: str) -> tuple[bytes, str] | None:
        def get() -> tuple[bytes, str]:
            stream = self._blob(key).download_blob(max_concurrency=1)
            if stream.size > marker.MAX_BYTES:
                raise marker.too_large(stream.size, f"azure://{self._container.name}/{key}")
            return stream.readall(), _token(stream.properties.etag)

        return self._ask("read", key, get, instead_of=_GONE)

    def create(self, key: str, data: bytes) -> str | None:
        return None if self._is_taken(key) else self._write_small(key, data, self._if_absent())

    def swap(self, key: str, token: str, data: bytes) -> str | None:
        if not self._conditional:
            stat = self.stat(key)
            return self._write_small(key, data, {"overwrite": True}) if stat and stat.token == token else None
        return self._write_small(key, data, {"overwrite": True, **_if_match(token)})

    def _write_small(self, key: str, data: bytes, condition: dict[str, Any]) -> str | None:
        def upload() -> str:
            json = ContentSettings(content_type="application/json")
            return str(self._blob(key).upload_blob(data, content_settings=json, validate_content=True, **condition)["etag"])

        return self._ask("write", key, upload, instead_of=(*_TAKEN, *_GONE))

    def remove(self, key: str, token: str) -> None:
        if not _ETAG.fullmatch(token):
            return  # a manifest may have been edited by hand: no blob has this version
        condition = _if_match(token)
        if not self._conditional:
            stat = self.stat(key)
            if stat is None or stat.token != token:
                return
            condition = {}
        self._ask("delete", key, lambda: self._blob(key).delete_blob(**condition), instead_of=("ConditionNotMet", *_GONE))

    # ---- Looking

    def list(self, prefix: str) -> Iterator[Entry]:
        # Metadata is asked for because an account with a hierarchical namespace lists its folders as empty blobs.
        for blob in self._walk("list", prefix, "metadata"):
            if (blob.metadata or {}).get("hdi_isfolder") != "true":
                yield Entry(blob.name, blob.size, _token(blob.etag))

    def _walk(self, operation: str, prefix: str, include: str) -> Iterator[BlobProperties]:
        token: str | None = None

        def page() -> tuple[list[BlobProperties], str | None]:
            found = self._container.client.list_blobs(name_starts_with=prefix, include=[include], results_per_page=PAGE)
            pages: Any = found.by_page(token)
            return list(next(pages)), pages.continuation_token

        while answer := self._ask(operation, prefix, page):
            blobs, token = answer
            yield from blobs
            if not token:
                return

    def stat(self, key: str) -> Stat | None:
        found = self._ask("head", key, self._blob(key).get_blob_properties, instead_of=_GONE)
        if found is None:
            return None
        token, owner = _token(found.etag), (found.metadata or {}).get(OWNER)
        checksum = None
        if owner is not None:
            # Of a foreign blob nothing is believed: any client may claim any Content-MD5 for a blob of several blocks.
            md5 = found.content_settings.content_md5
            checksum = base64.b64encode(md5).decode() if md5 else self._checksum_of_blocks(key, token, found.size)
        return Stat(found.size, token, checksum, owner)

    def _checksum_of_blocks(self, key: str, token: str, size: int | None = None) -> str | None:
        """From the committed block list of exactly that version; None where it is another one, or has foreign blocks."""
        found, seen = self._blocks(key, "committed")
        ids = [BlockId.parse(block.id) for block in found]
        pieces = [Piece(block.size, id_.digest) for block, id_ in zip(found, ids, strict=True) if id_]
        in_order = [id_.number if id_ else 0 for id_ in ids] == list(range(1, len(ids) + 1))
        if seen != token or not pieces or not in_order or size not in (None, sum(piece.size for piece in pieces)):
            return None
        return azure_blocks.checksum(pieces)

    def _blocks(self, key: str, kind: str) -> tuple[Sequence[BlobBlock], str | None]:
        """The blocks of a blob, ``committed`` or ``uncommitted``, and the token of the version that was asked."""
        seen: list[str | None] = []

        def hook(response: Any) -> None:
            seen.append(response.http_response.headers.get("ETag"))

        lists = self._ask(
            f"list {kind} blocks",
            key,
            lambda: self._blob(key).get_block_list(kind, raw_response_hook=hook),
            instead_of=_GONE,
        )
        if lists is None:
            return [], None
        etag = seen[-1]
        return lists[0 if kind == "committed" else 1], _token(etag) if etag else None

    def fetch(self, key: str, token: str, start: int, into: memoryview, arrived: Arrived = unheard) -> None:
        def get() -> bytes:
            if not into:  # no range says that
                self._blob(key).get_blob_properties(**_if_match(token))
                return b""
            stream = self._blob(key).download_blob(start, len(into), max_concurrency=1, **_if_match(token))
            body: bytes = stream.readall()
            return body

        body = None
        if _ETAG.fullmatch(token):
            body = self._ask("fetch", key, get, instead_of=("ConditionNotMet", "InvalidRange", *_GONE))
        if body is None or len(body) != len(into):
            raise StorageError(
                Reason.INTEGRITY_MISMATCH,
                f"'{key}' is not the object that the manifest lists: it was replaced or removed",
                backend="azure",
                operation="fetch",
                path=key,
            )
        into[:] = body
        arrived(0, len(into))

    # ---- Data

    def refusal(self, key: str) -> str | None:
        return azure_blocks.refusal(key)

    def part_size(self, size: int) -> int:
        return azure_blocks.part_size(size)

    def digest(self, body: Body) -> bytes:
        return azure_blocks.digest(body)

    def checksum(self, pieces: Sequence[Piece]) -> str:
        return azure_blocks.checksum(pieces)

    def put(self, key: str, body: Buffer, digest: bytes, owner: str) -> AbstractContextManager[Callable[[], Written | None]]:
        return put_now(lambda: self._put(key, body, digest, owner))

    def _put(self, key: str, body: Buffer, digest: bytes, owner: str) -> Written | None:
        if self._is_taken(key):
            return None

        def upload() -> dict[str, Any]:
            return self._blob(key).upload_blob(
                io.BytesIO(body),
                length=len(body),
                metadata={OWNER: owner},
                content_settings=ContentSettings(content_md5=bytearray(digest)),
                headers=_content_md5(digest),
                standard_blob_tier=self._tier,
                max_concurrency=1,
                **self._if_absent(),
            )

        answer = self._ask("put", key, upload, instead_of=_TAKEN)
        if answer is not None:
            said = answer.get("content_md5")
            return Written(_token(answer["etag"]), base64.b64encode(said).decode() if said else None)
        if self.stat(key) is not None:
            return None
        # Blocks that an earlier attempt left at this name are no object, but may stand in the way of a Put Blob.
        upload_id = self.start_upload(key, owner)
        token = self.put_part(key, upload_id, 1, body, digest)
        return self.finish_upload(key, upload_id, [Part(1, len(body), token, digest)], owner)

    def start_upload(self, key: str, owner: str) -> str:
        return azure_blocks.new_upload_id()

    def put_part(self, key: str, upload_id: str, number: int, body: Body, digest: bytes) -> str:
        token = str(BlockId(upload_id, number, digest))
        self._ask(
            "put part",
            key,
            lambda: self._blob(key).stage_block(token, body, length=len(body), headers=_content_md5(digest)),  # type: ignore[arg-type]
        )
        return token

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[Part], owner: str) -> Written | None:
        if self._is_taken(key):
            return None
        condition: dict[str, Any] = {"match_condition": MatchConditions.IfMissing} if self._conditional else {}

        def commit() -> dict[str, Any]:
            return self._blob(key).commit_block_list(
                [BlobBlock(part.token, BlockState.UNCOMMITTED) for part in parts],
                metadata={OWNER: owner},
                standard_blob_tier=self._tier,
                validate_content=True,
                **condition,
            )

        # Somebody else's Put Blob or Put Block List drops every block that is not in it.
        answer = self._ask("finish upload", key, commit, instead_of=_TAKEN, lost=("InvalidBlockList",))
        if answer is None:
            return None
        token = _token(answer["etag"])
        return Written(token, self._checksum_of_blocks(key, token))

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Azure has no such request, and needs none: blocks that nobody commits are no object, and expire after a week."""

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        # What only the second list has is not committed: the listing itself does not say so.
        whole = {entry.key for entry in self.list(prefix)}
        for blob in self._walk("list uploads", prefix, "uncommittedblobs"):
            if blob.name not in whole:
                blocks, _ = self._blocks(blob.name, "uncommitted")
                for upload_id in sorted({found.upload_id for block in blocks if (found := BlockId.parse(block.id))}):
                    yield Upload(blob.name, upload_id)

    def list_parts(self, key: str, upload_id: str) -> Sequence[Part]:
        blocks, _ = self._blocks(key, "uncommitted")
        named = [(found, block) for block in blocks if (found := BlockId.parse(block.id)) and found.upload_id == upload_id]
        return sorted(
            (Part(found.number, block.size, block.id, found.digest) for found, block in named), key=lambda part: part.number
        )

    def is_part(self, part: Part, body: Body, digest: bytes) -> bool:
        return part.digest == digest and part.size == len(body)

    def honours_conditions(self, probe_key: str) -> bool:
        # Azure does. But an endpoint may be a gateway or an emulator that ignores them, and then nothing else would tell.
        try:
            if self.create(probe_key, b"1") is None:
                return True
            refused = self.create(probe_key, b"2") is None and self.swap(probe_key, '"0x0"', b"3") is None
        except StorageError as error:
            if error.reason is not Reason.CONDITIONAL_WRITES_UNSUPPORTED:
                raise
            refused = False  # it says so itself
        current = self.read(probe_key)
        if current is not None:
            self.without_conditions().remove(probe_key, current[1])
        return refused and current is not None and current[0] == b"1"

    # ---- Asking

    def _blob(self, key: str) -> BlobClient:
        return self._container.client.get_blob_client(key)

    def _if_absent(self) -> dict[str, Any]:
        return {"overwrite": not self._conditional}

    def _is_taken(self, key: str) -> bool:
        return not self._conditional and self.stat(key) is not None

    def _ask(
        self,
        operation: str,
        key: str,
        request: Callable[[], Answer],
        *,
        instead_of: Sequence[str] = (),
        lost: Sequence[str] = (),
    ) -> Answer | None:
        """The answer to a request; None instead of the given error codes, :class:`UploadLost` for the others given.

        A refusal is asked about once more where the credentials have been replaced meanwhile.
        """
        for is_last in (False, True):
            client = self._container.client
            try:
                return request()
            except (AzureError, ValueError) as error:  # the SDK's ValueError: an answer that it does not understand
                code = code_of(error)
                failure = None if code in (*instead_of, *lost) else self._failure(error, operation, key)
            refused = failure is not None and failure.reason is Reason.CREDENTIALS_REFUSED
            if is_last or not refused or not self._container.renew(client):
                break
        # Outside of the except block and with no cause: an SDK's exception holds the request, whose URL may be signed.
        if failure is not None:
            raise failure
        if code in lost:
            raise UploadLost
        return None

    def _failure(self, error: Exception, operation: str, key: str) -> StorageError:
        reason, said, request_id = classify(error)
        return StorageError(
            reason,
            f"{operation} of '{key}' in container '{self._container.name}' failed: {said}",
            backend="azure",
            operation=operation,
            path=key,
            request_id=request_id,
        )


def _token(etag: str) -> str:
    """A listing says an ETag without its quotes."""
    return etag if etag.startswith('"') else f'"{etag}"'


def _if_match(token: str) -> dict[str, Any]:
    return {"etag": token, "match_condition": MatchConditions.IfNotModified}


def _content_md5(digest: bytes) -> dict[str, str]:
    """The header by which the store refuses another body; the SDK would compute the digest a second time."""
    return {"Content-MD5": base64.b64encode(digest).decode()}


def open_azure(uri: TargetURI, options: TargetOptions, streams: int) -> AzureStore:
    """Connect to the container of a URI. Nothing is sent yet. ``streams``: requests that may be under way at once.

    Raises:
        StorageError: CredentialsMissing and InvalidSpec, before any request; BackendNotInstalled.
    """
    gate = Gate(streams)
    return AzureStore(Container(uri.bucket, options, gate), gate, access_tier(options))
