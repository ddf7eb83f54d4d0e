"""The seam between the protocol and a store: the few verbs that S3, GCS and Azure all have, with conditions.

The call order that the callers keep, and that an implementation may rely on: marker verbs (``read``, ``create``, ``swap``,
``remove``) see small objects only; a data object is written once, by ``put`` or by ``start_upload`` … ``finish_upload``.
Every method may be called from several threads at once. Errors are :class:`StorageError`; no SDK exception leaves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """One line of a listing. ``token`` names this version of the object (ETag, generation)."""

    key: str
    size: int
    token: str


@dataclass(frozen=True)
class Stat:
    """What the store says of one object. ``checksum`` is in the form of :meth:`ObjectStore.checksum`."""

    size: int
    token: str
    checksum: str | None
    owner: str | None


@dataclass(frozen=True)
class Written:
    """The store confirmed a write; ``checksum`` is what it computed itself, None where it does not say."""

    token: str
    checksum: str | None


class ObjectStore(Protocol):
    """One bucket (or container) of one store. Keys are UTF-8 strings, taken literally.

    ``put`` and ``finish_upload`` are create-only: they answer None where the key exists already, and never overwrite.
    """

    def read(self, key: str) -> tuple[bytes, str] | None:
        """A small object's bytes and token, or None where there is none."""

    def create(self, key: str, data: bytes) -> str | None:
        """Create a small object if absent; its token, or None where it exists (or a reply was lost: read it)."""

    def swap(self, key: str, token: str, data: bytes) -> str | None:
        """Replace exactly that version; the new token, or None where it is another one (or a reply was lost)."""

    def remove(self, key: str, token: str) -> None:
        """Remove exactly that version; an object that is gone, or another version, is left alone."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose key begins with the prefix, in pages, sorted by key."""

    def stat(self, key: str) -> Stat | None:
        """What the store says of one object, checksum included, or None."""

    def fetch(self, key: str, token: str, start: int, length: int) -> bytes:
        """A range of exactly that version. Raises IntegrityMismatch where the object is another version by now."""

    def part_size(self, size: int) -> int:
        """Into what pieces a file of this size is cut; a pure function, so that a later attempt cuts in the same way."""

    def checksum(self, part_digests: Sequence[bytes]) -> str:
        """What :attr:`Stat.checksum` of an object written in these pieces (SHA-256 each) must be."""

    def put(self, key: str, body: bytes, digest: bytes, owner: str) -> Written | None:
        """Create an object in one request; the store refuses a body that does not have this SHA-256."""

    def start_upload(self, key: str, owner: str) -> str:
        """Begin an object in several pieces; the upload's id."""

    def put_part(self, key: str, upload_id: str, number: int, body: bytes, digest: bytes) -> str:
        """Send piece ``number`` (from 1); its token. Raises :class:`UploadLost`."""

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[str], digests: Sequence[bytes]) -> Written | None:
        """Make the object of its pieces, if the key is absent. Raises :class:`UploadLost`."""

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Forget an unfinished upload; one that is gone is fine."""

    def list_uploads(self, prefix: str) -> Iterator[tuple[str, str]]:
        """(key, upload id) of every unfinished upload below a prefix."""

    def without_conditions(self) -> "ObjectStore":
        """The same bucket, with each condition checked by a look before the write. Only for keys that are not shared."""

    def honours_conditions(self, probe_key: str) -> bool:
        """Whether create-if-absent and conditional replacement work; asked once, on a key that nobody else uses."""


class UploadLost(Exception):
    """The store does not know this multipart upload any more, or wants it begun again (409): look at the key first."""
