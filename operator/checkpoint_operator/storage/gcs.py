"""Google Cloud Storage behind the seam: conditions by generation, large files composed of pieces.

A token is a generation in decimal. Create-if-absent is ``ifGenerationMatch=0``, everything else names the generation that
it means. Every body goes with its CRC32C, which Google compares on arrival.

Google's resumable sessions are not used: their URI is a bearer secret that would have to be kept somewhere for the next
attempt. A large file is sent as objects of their own instead (:mod:`checkpoint_operator.storage.gcs_pieces`), which whoever
goes on finds by listing, and which are composed into the file, 32 at a time and in levels, without being sent again.

Memory: one body for each caller; nothing is copied, nothing else grows with the size of a file but a line for each piece.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import reduce
from typing import TypeVar

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import gcs_crc32c, gcs_pieces, marker
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.gate import Gate
from checkpoint_operator.storage.gcs_client import Bucket, Kind, Missing, Resource, Unmet, open_bucket
from checkpoint_operator.storage.gcs_identity import choose_identity
from checkpoint_operator.storage.gcs_pieces import OWNER, parse_piece, piece_metadata, piece_name
from checkpoint_operator.storage.parallel import for_each
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

MIB = 1 << 20
PART_SIZE = 16 * MIB
"""One request's body; also the largest object that is written in one request."""
COMPOSE_LIMIT = 32  # https://cloud.google.com/storage/docs/json_api/v1/objects/compose
MAX_PIECES = COMPOSE_LIMIT**3
"""Three levels; 5 TiB are then pieces of 160 MiB."""
_AT_ONCE = 8
"""Requests without a body that run beside each other: compositions of one level, removals of pieces."""
_ABSENT = "0"

Answer = TypeVar("Answer")

# Not to be cached, not even where a bucket is public: who reads a marker must see the last swap. And in a colder class each
# swap would be paid for as if the version before it had stayed for months.
_MARKER = Kind(content_type="application/json", cache_control="no-store", storage_class="STANDARD")


class GCSStore:
    """An :class:`~checkpoint_operator.storage.store.ObjectStore` on one bucket."""

    def __init__(self, bucket: Bucket, *, storage_class: str | None = None, conditional: bool = True) -> None:
        self._bucket, self._storage_class, self._conditional = bucket, storage_class, conditional
        # An upload is nothing in the store before its first piece is there, so until then only we know whose it is.
        self._owners: dict[str, str] = {}
        self._bucket_seen = False

    @property
    def gate(self) -> Gate:
        """Of the requests that have a body."""
        return self._bucket.gate

    def without_conditions(self) -> "GCSStore":
        return GCSStore(self._bucket, storage_class=self._storage_class, conditional=False)

    # ---- Markers

    def read(self, key: str) -> tuple[bytes, str] | None:
        try:
            data, generation, size = self._bucket.fetch(key, limit=marker.MAX_BYTES)
        except Missing:
            self._require_bucket(key)
            return None
        if size > marker.MAX_BYTES:
            raise marker.too_large(size, f"gs://{self._bucket.name}/{key}")
        if not generation:  # Google says it with the bytes, not every emulator does
            stat = self.stat(key)
            return (data, stat.token) if stat else None
        return data, generation

    def _require_bucket(self, key: str) -> None:
        """An object of a bucket that does not exist is missing in the same words (404, notFound); only a listing tells."""
        if not self._bucket_seen:
            next(self._bucket.list(key, limit=1), None)
            self._bucket_seen = True

    def create(self, key: str, data: bytes) -> str | None:
        return None if self._is_taken(key) else self._write_small(key, data, self._if(_ABSENT))

    def swap(self, key: str, token: str, data: bytes) -> str | None:
        return self._write_small(key, data, self._if(token)) if self._is_still(key, token) else None

    def _write_small(self, key: str, data: bytes, if_generation: str | None) -> str | None:
        try:
            crc = gcs_crc32c.encode(gcs_crc32c.crc32c(data))
            return self._bucket.insert(key, data, crc, _MARKER, if_generation).generation
        except Unmet:
            return None

    def remove(self, key: str, token: str) -> None:
        if self._is_still(key, token):
            with suppress(Unmet, Missing):
                self._bucket.delete(key, self._if(token))

    def _if(self, generation: str) -> str | None:
        return generation if self._conditional else None

    def _is_taken(self, key: str) -> bool:
        return not self._conditional and self.stat(key) is not None

    def _is_still(self, key: str, token: str) -> bool:
        if self._conditional:
            return True  # the request itself says which version it means
        stat = self.stat(key)
        return stat is not None and stat.token == token

    def honours_conditions(self, probe_key: str) -> bool:
        # Google does; an emulator may not know them, and ignores them then. What the first answers is no matter: nobody
        # else uses the key, so that "it exists" can only mean a lost reply.
        self.create(probe_key, b"1")
        refused = self.create(probe_key, b"2") is None and self.swap(probe_key, "1", b"3") is None
        current = self.read(probe_key)
        if current is not None:
            self.without_conditions().remove(probe_key, current[1])
        return refused and current is not None and current[0] == b"1"

    # ---- Data

    def list(self, prefix: str) -> Iterator[Entry]:
        for found in self._bucket.list(prefix):
            if parse_piece(found.name, found.metadata) is None:
                yield Entry(found.name, found.size, found.generation)
        self._bucket_seen = True

    def stat(self, key: str) -> Stat | None:
        found = self._bucket.get(key)
        return Stat(found.size, found.generation, found.crc32c, found.metadata.get(OWNER)) if found else None

    def fetch(self, key: str, token: str, start: int, into: memoryview, arrived: Arrived = unheard) -> None:
        if not into:
            return
        try:
            data, generation, _ = self._bucket.fetch(key, token, (start, len(into)))
        except Missing as error:
            raise self._other_version(key) from error
        if generation != token or len(data) != len(into):
            raise self._other_version(key)
        into[:] = data
        arrived(0, len(into))

    def _other_version(self, key: str) -> StorageError:
        return StorageError(
            Reason.INTEGRITY_MISMATCH,
            f"'{key}' is not the object that the manifest lists: it was replaced or removed",
            backend="gcs",
            operation="fetch",
            path=key,
        )

    def refusal(self, key: str) -> str | None:
        return gcs_pieces.refusal(key)

    def part_size(self, size: int) -> int:
        smallest = -(-size // MAX_PIECES)
        return PART_SIZE if smallest <= PART_SIZE else -(-smallest // MIB) * MIB

    def digest(self, body: Body) -> bytes:
        return gcs_crc32c.crc32c(body).to_bytes(4, "big")

    def checksum(self, pieces: Sequence[Piece]) -> str:
        def join(whole: int, piece: Piece) -> int:
            return gcs_crc32c.combine(whole, int.from_bytes(piece.digest, "big"), piece.size)

        return gcs_crc32c.encode(reduce(join, pieces, 0))

    def put(self, key: str, body: Buffer, digest: bytes, owner: str) -> AbstractContextManager[Callable[[], Written | None]]:
        return put_now(lambda: self._put(key, body, digest, owner))

    def _put(self, key: str, body: Buffer, digest: bytes, owner: str) -> Written | None:
        if self._is_taken(key):
            return None
        try:
            made = self._send(key, body, digest, self._data(owner), self._if(_ABSENT))
        except Unmet:
            return None
        return Written(made.generation, made.crc32c)

    def _data(self, owner: str) -> Kind:
        return Kind({OWNER: owner}, storage_class=self._storage_class)

    def _send(self, key: str, body: Body, digest: bytes, kind: Kind, if_generation: str | None) -> Resource:
        try:
            return self._bucket.insert(key, body, gcs_crc32c.encode(int.from_bytes(digest, "big")), kind, if_generation)
        except StorageError as error:
            # Google refuses a wrong checksum with a plain "invalid". What we hold tells whether it was that.
            if error.reason is Reason.REQUEST_REJECTED and self.digest(body) != digest:
                raise StorageError(
                    Reason.INTEGRITY_MISMATCH, f"the bytes of '{key}' changed on their way: {error.message}", **error.context
                ) from error
            raise

    # ---- Objects in several pieces

    def start_upload(self, key: str, owner: str) -> str:
        upload_id = gcs_pieces.new_upload_id()
        self._owners[upload_id] = owner
        return upload_id

    def put_part(self, key: str, upload_id: str, number: int, body: Body, digest: bytes) -> str:
        name = piece_name(key, upload_id, number)
        kind = self._piece(key, self._owner(key, upload_id))
        try:
            return self._send(name, body, digest, kind, self._if(_ABSENT)).generation
        except Unmet:
            there = self._bucket.get(name)
        if there is not None and _is(there, len(body), digest):
            return there.generation  # ours: the reply to the first try was lost
        try:
            return self._send(name, body, digest, kind, there.generation if there else _ABSENT).generation
        except Unmet as error:
            raise UploadLost from error  # somebody else writes it at this moment

    def _owner(self, key: str, upload_id: str) -> str:
        if upload_id not in self._owners:
            for _ in self.list_uploads(gcs_pieces.folder_of_pieces(key, upload_id)):
                pass
        try:
            return self._owners[upload_id]
        except KeyError:
            raise UploadLost from None

    def _piece(self, key: str, owner: str) -> Kind:
        # A piece lives for minutes: in a colder class it would be paid for as if it had stayed for months.
        return Kind(piece_metadata(key, owner), storage_class="STANDARD")

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[Part], owner: str) -> Written | None:
        if self._is_taken(key):
            return None
        try:
            sources = self._compose_levels(key, upload_id, parts, owner)
            made = self._compose_checked(key, sources, self._data(owner), self._if(_ABSENT))
        except Missing as error:
            raise UploadLost from error
        except Unmet as error:
            # Of the object or of a piece: the answer is the same.
            if self._bucket.get(key) is None:
                raise UploadLost from error
            return None
        # The object is there. What cannot be removed now is found by the artifact's deletion, or by a lifecycle rule.
        with suppress(StorageError):
            self.abort_upload(key, upload_id)
        return Written(made.generation, made.crc32c)

    def _compose_levels(self, key: str, upload_id: str, parts: Sequence[Part], owner: str) -> Sequence[Resource]:
        """Compose in groups until one last composition is left; the sources of that."""
        sources = [_as_resource(piece_name(key, upload_id, part.number), part) for part in parts]
        level = 0
        while len(sources) > COMPOSE_LIMIT:
            level += 1
            groups = [sources[start : start + COMPOSE_LIMIT] for start in range(0, len(sources), COMPOSE_LIMIT)]
            names = [piece_name(key, upload_id, number, level) for number in range(1, len(groups) + 1)]

            def compose(name: str, group: Sequence[Resource]) -> Resource:
                return self._compose_piece(name, group, self._piece(key, owner))

            sources = _at_once(compose, names, groups)
        return sources

    def _compose_piece(self, name: str, sources: Sequence[Resource], kind: Kind) -> Resource:
        """An intermediate level. What a killed attempt left there is taken if it is right, and made again if not."""
        try:
            return self._compose_checked(name, sources, kind, self._if(_ABSENT))
        except Unmet:
            there = self._bucket.get(name)
        size, checksum = _joined(sources)
        if there is None:
            raise UploadLost  # then it was a source that is not what it was
        if (there.size, there.crc32c) == (size, checksum):
            return there
        return self._compose_checked(name, sources, kind, there.generation)

    def _compose_checked(self, name: str, sources: Sequence[Resource], kind: Kind, if_generation: str | None) -> Resource:
        made = self._bucket.compose(name, sources, kind, if_generation)
        size, checksum = _joined(sources)
        if (made.size, made.crc32c) != (size, checksum):
            with suppress(Unmet, Missing):
                self._bucket.delete(name, made.generation)
            raise StorageError(
                Reason.INTEGRITY_MISMATCH,
                f"'{name}' was composed as {made.size} bytes of checksum {made.crc32c}, its pieces are {size} of {checksum}",
                backend="gcs",
                operation="finish upload",
                path=name,
            )
        return made

    def abort_upload(self, key: str, upload_id: str) -> None:
        folder = gcs_pieces.folder_of_pieces(key, upload_id)

        def remove(found: Resource) -> None:
            with suppress(Unmet, Missing):
                self._bucket.delete(found.name, found.generation)

        # Page by page, while it is listed: there may be as many of them as a file has pieces.
        pieces = (found for found in self._bucket.list(folder) if parse_piece(found.name, found.metadata))
        for_each(remove, pieces, workers=_AT_ONCE, name="gcs")
        self._owners.pop(upload_id, None)

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        seen: set[str] = set()
        for found in self._bucket.list(prefix):
            piece = parse_piece(found.name, found.metadata)
            if piece is not None and piece.upload_id not in seen:
                seen.add(piece.upload_id)
                self._owners.setdefault(piece.upload_id, piece.owner)
                yield Upload(piece.key, piece.upload_id)

    def list_parts(self, key: str, upload_id: str) -> Sequence[Part]:
        found = self._bucket.list(gcs_pieces.folder_of_pieces(key, upload_id))
        return [
            Part(piece.number, one.size, one.generation, gcs_crc32c.decode(one.crc32c) if one.crc32c else None)
            for one in found
            if (piece := parse_piece(one.name, one.metadata)) and piece.number is not None and piece.key == key
        ]

    def is_part(self, part: Part, body: Body, digest: bytes) -> bool:
        return part.size == len(body) and part.digest == digest


def open_gcs(uri: TargetURI, options: TargetOptions, streams: int) -> GCSStore:
    """Connect to the bucket of a URI. Nothing is sent yet. ``streams``: bodies that may be under way at once.

    Raises:
        StorageError: CredentialsMissing; InvalidSpec for an endpoint to which no token may be sent.
    """
    # Each caller composes and removes in threads of its own.
    bucket = open_bucket(
        uri.bucket,
        choose_identity(options),
        lambda: choose_identity(options),
        options,
        streams=streams,
        connections=streams * _AT_ONCE,
    )
    return GCSStore(bucket, storage_class=options.storage_class)


def _is(there: Resource, size: int, digest: bytes) -> bool:
    return there.size == size and there.crc32c is not None and gcs_crc32c.decode(there.crc32c) == digest


def _as_resource(name: str, part: Part) -> Resource:
    assert part.digest is not None  # what finish_upload is promised
    return Resource(name, part.size, part.token, gcs_crc32c.encode(int.from_bytes(part.digest, "big")), {})


def _joined(sources: Sequence[Resource]) -> tuple[int, str]:
    """Size and checksum of what these sources are behind each other."""
    size, crc = 0, 0
    for source in sources:
        crc = gcs_crc32c.combine(crc, int.from_bytes(gcs_crc32c.decode(source.crc32c or ""), "big"), source.size)
        size += source.size
    return size, gcs_crc32c.encode(crc)


def _at_once(work: Callable[..., Answer], *items: Sequence[object]) -> list[Answer]:
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="gcs") as pool:
        return list(pool.map(work, *items))
