"""The seam between the protocol and a store: the few verbs that S3, GCS and Azure all have, with conditions.

The call order that the callers keep, and that an implementation may rely on: marker verbs (``read``, ``create``, ``swap``,
``remove``) see small objects only; a data object is written once, by ``put`` or by ``start_upload`` … ``finish_upload``.
Every method may be called from several threads at once. Errors are :class:`StorageError`; no SDK exception leaves.

Checksums: the engine hands every body to :meth:`ObjectStore.digest` exactly once, while it is in the CPU's cache, and gives
the answer back with the body; the store sends it along, so that the other side refuses a body that was damaged on its way.

Bodies: a buffer, or slices of what is too large for one (:func:`slices_of` makes slices of either). Only pieces of large
files come as slices, and what they raise while they are iterated is to be let through.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from checkpoint_operator.storage.turn import TURN

if TYPE_CHECKING:
    from hashlib import _Hash

Buffer = bytes | bytearray | memoryview


class Sliced(Protocol):
    """A body that nobody holds: iterated it gives one slice after the other, each of which lasts until the next one is
    asked for. A retry iterates it again, from the beginning."""

    def __len__(self) -> int:
        """Bytes of all slices."""

    def __iter__(self) -> Iterator[memoryview]: ...


Body: TypeAlias = Buffer | Sliced


def slices_of(body: Body) -> Iterable[Buffer]:
    """A body as what can be hashed and sent one after the other; a buffer is one slice."""
    return (body,) if isinstance(body, bytes | bytearray | memoryview) else body


def bites_of(body: Body, most: int) -> Iterator[memoryview]:
    """The same in views of at most so many bytes each."""
    for one in slices_of(body):
        view = memoryview(one)
        for start in range(0, len(view), most):
            yield view[start : start + most]


def hashed(body: Body, digest: "_Hash") -> "_Hash":
    """A hash of ``hashlib``, fed with a body."""
    for one in slices_of(body):
        digest.update(one)
    return digest


Arrived = Callable[[int, int], None]
"""(first, last): these bytes of a buffer are there, ``last`` not included. Called in order from 0, and from 0 again with the
same bytes where an answer broke off and was asked for anew."""

PIECE = 256 << 10
"""Bytes that are told of at once, where a store can: few enough to be in the CPU's cache still when they are written."""


def unheard(first: int, last: int) -> None:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing. ``token`` names this version of the object (ETag, generation)."""

    key: str
    size: int
    token: str


@dataclass(frozen=True, slots=True)
class Stat:
    """What the store says of one object. ``checksum`` is in the form of :meth:`ObjectStore.checksum`."""

    size: int
    token: str
    checksum: str | None
    owner: str | None


@dataclass(frozen=True, slots=True)
class Written:
    """The store confirmed a write; ``checksum`` is what it computed itself, None where it does not say."""

    token: str
    checksum: str | None


@dataclass(frozen=True, slots=True)
class Piece:
    """A body of ``size`` bytes whose :meth:`ObjectStore.digest` is ``digest``."""

    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Piece ``number`` (from 1) of an unfinished upload. ``digest`` is None where the store's listing does not say it."""

    number: int
    size: int
    token: str
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class Upload:
    """An unfinished object in several pieces."""

    key: str
    id: str


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
        """Every object whose key begins with the prefix, in pages, sorted by the UTF-8 bytes of the key.

        Pieces of unfinished uploads are no objects, whatever the store keeps them as.
        """

    def stat(self, key: str) -> Stat | None:
        """What the store says of one object, checksum included, or None."""

    def fetch(self, key: str, token: str, start: int, into: memoryview, arrived: Arrived = unheard) -> None:
        """Fill a buffer with the range of exactly that version that begins at ``start``.

        Raises IntegrityMismatch where the object is another version by now, or ends before the range does. What ``arrived``
        raises is passed on, unless it is an OSError.
        """

    def refusal(self, key: str) -> str | None:
        """Why this store could not keep a key exactly as it is, as the end of "the name …", or None. Pure, no request."""

    def part_size(self, size: int) -> int:
        """Into what pieces a file of this size is cut; a pure function, so that a later attempt cuts in the same way.

        A piece of more than 24 MiB is not held, but read twice (:mod:`checkpoint_operator.storage.slices`).
        """

    def digest(self, body: Body) -> bytes:
        """The checksum that this store verifies on arrival (CRC64NVME, CRC32C, MD5). Runs without the interpreter's lock."""

    def checksum(self, pieces: Sequence[Piece]) -> str:
        """What :attr:`Stat.checksum` of an object written in these pieces must be."""

    def put(self, key: str, body: Buffer, digest: bytes, owner: str) -> AbstractContextManager[Callable[[], Written | None]]:
        """Create an object in one request; the store refuses a body that does not have this digest.

        In the block the request may be on its way, and the body has to stay as it is; what the block is given is called
        once, and waits for the answer. So one thread can send several bodies before it reads the first answer. A block that
        ends without the call gives the request up, whatever became of it.
        """

    def start_upload(self, key: str, owner: str) -> str:
        """Begin an object in several pieces; the upload's id."""

    def put_part(self, key: str, upload_id: str, number: int, body: Body, digest: bytes) -> str:
        """Send piece ``number`` (from 1); its token. Sent again it replaces the piece. Raises :class:`UploadLost`."""

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[Part], owner: str) -> Written | None:
        """Make the object of exactly these parts (all with a digest, in order), if the key is absent.

        Raises :class:`UploadLost`, also where a part is not what it was: then the object is to be begun anew.
        """

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Forget an unfinished upload; one that is gone is fine."""

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        """Every unfinished upload below a prefix."""

    def list_parts(self, key: str, upload_id: str) -> Sequence[Part]:
        """The pieces that an unfinished upload has by now; none where it is gone."""

    def is_part(self, part: Part, body: Body, digest: bytes) -> bool:
        """Whether a listed part is this body: by its digest, or by whatever else the listing says of its content."""

    def without_conditions(self) -> "ObjectStore":
        """The same bucket, with each condition checked by a look before the write. Only for keys that are not shared."""

    def honours_conditions(self, probe_key: str) -> bool:
        """Whether create-if-absent and conditional replacement work; asked once, on a key that nobody else uses."""


@contextmanager
def put_now(write: Callable[[], Written | None]) -> Iterator[Callable[[], Written | None]]:
    """:meth:`ObjectStore.put` of a store whose client sends a request and waits for its answer in one call."""
    with TURN.let_go():  # meanwhile another thread may get something done
        written = write()
    yield lambda: written


class UploadLost(Exception):
    """The store does not know this multipart upload any more, or wants it begun again (409): look at the key first."""
