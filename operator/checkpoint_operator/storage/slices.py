"""How a file is cut into pieces and hashed, and what a sender gets of a piece that is too large to be held: slices of it.

S3 takes 10,000 parts, so that one of a file of 5 TiB has 525 MiB, and a mover has 150 MB for everything. The digest of a
part goes before its first byte. So a large part is read twice, both times through one small buffer: by the thread that
hashes the file, and again by whoever sends it, as often as the network makes that necessary. A slice is given away only if
it is what was hashed, so that of a file that changes in between the store never gets a whole part.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from checkpoint_operator.storage.manifest import StoredFile
from checkpoint_operator.storage.source import OpenFile, SourceFile
from checkpoint_operator.storage.store import Piece

if TYPE_CHECKING:
    from hashlib import _Hash

LARGEST_HELD = 24 << 20
"""Bytes of the largest piece that is held whole, and so read once. Two of them are the budget for bodies: one is read while
the other one is sent."""
SLICE = 8 << 20
"""What is held of a larger one."""
_HASHED_AT_ONCE = 1 << 20
"""Read and hash in bites that stay in the CPU's cache."""


def held(length: int) -> int:
    """How many bytes of a piece are in memory at a time: all of them, or a slice."""
    return length if length <= LARGEST_HELD else SLICE


class Cut:
    """How a file is cut into pieces, and the hashes of the whole and of each."""

    def __init__(self, size: int, part_size: int) -> None:
        self.size, self.part_size = size, part_size
        self.pieces: list[Piece] = []
        self._whole = hashlib.sha256()

    @property
    def ranges(self) -> Iterable[tuple[int, int]]:
        """(offset, length) of each piece; an empty file has one, of length 0."""
        for offset in range(0, max(self.size, 1), self.part_size):
            yield offset, min(self.part_size, self.size - offset)

    def read(self, source: OpenFile, offset: int, body: memoryview) -> None:
        """Fill a buffer from the file, and hash it on the way; in order, from the first piece to the last."""
        for start in range(0, len(body), _HASHED_AT_ONCE):
            bite = body[start : start + _HASHED_AT_ONCE]
            source.read_into(offset + start, bite)
            self._whole.update(bite)

    def piece(
        self, source: OpenFile, offset: int, length: int, buffer: memoryview, check: Callable[[], None]
    ) -> "memoryview | FirstReading":
        """The next piece: the buffer, filled, where it has :func:`held` all of it; else what reads it while one iterates.

        ``check`` is called before each slice, and may raise.
        """
        if length > len(buffer):
            return FirstReading(_Span(source, offset, length, buffer, check), self)
        self.read(source, offset, buffer)
        return buffer

    def so_far(self) -> "_Hash":
        """The hash of everything that was read by now."""
        return self._whole.copy()

    def stored(self, file: SourceFile, token: str | None) -> StoredFile:
        return StoredFile(
            path=file.path,
            size=file.size,
            sha256=self._whole.hexdigest(),
            parts=len(self.pieces),
            part_size=self.part_size if len(self.pieces) > 1 else None,
            etag=token,
            mode=file.mode,
            mtime_ns=file.mtime_ns,
        )


class _Span:
    """A range of an open file, and the buffer that it goes through slice by slice."""

    def __init__(self, source: OpenFile, offset: int, length: int, buffer: memoryview, check: Callable[[], None]) -> None:
        self.source, self.offset, self.length, self.buffer, self._check = source, offset, length, buffer, check

    def slices(self) -> Iterator[tuple[int, memoryview]]:
        """(offset in the file, where the bytes of it belong) of each slice."""
        for start in range(0, self.length, len(self.buffer)):
            self._check()
            yield self.offset + start, self.buffer[: self.length - start]


class FirstReading:
    """A large piece as a body that is iterated once, by :meth:`ObjectStore.digest`: so it is read, paid for and hashed."""

    def __init__(self, span: _Span, cut: Cut) -> None:
        self._span, self._cut = span, cut
        self._before, self._marks = cut.so_far(), list[bytes]()

    def __len__(self) -> int:
        return self._span.length

    def __iter__(self) -> Iterator[memoryview]:
        assert not self._marks, "a file is hashed forwards, once"
        for offset, into in self._span.slices():
            self._cut.read(self._span.source, offset, into)
            self._marks.append(self._cut.so_far().digest())
            yield into

    def again(self) -> "Slices":
        """The same bytes for a sender; afterwards the buffer is the sender's."""
        return Slices(self._span, self._before, self._marks)


class Slices:
    """A large piece as a body that can be iterated again and again, by one thread at a time.

    What is compared is the SHA-256 of the file up to the end of each slice: the reader has that anyway, and no checksum that
    a store happens to have is as good. The buffer is private, as everywhere: what was compared is what is sent.

    Raises, while one iterates:
        StorageError: SourceChanged where it reads something else than the first time.
    """

    def __init__(self, span: _Span, before: "_Hash", marks: list[bytes]) -> None:
        self._span, self._before, self._marks = span, before, marks

    def __len__(self) -> int:
        return self._span.length

    def __iter__(self) -> Iterator[memoryview]:
        hashed = self._before.copy()
        for (offset, into), mark in zip(self._span.slices(), self._marks, strict=True):
            self._span.source.read_again(offset, into)
            hashed.update(into)
            if hashed.digest() != mark:
                raise self._span.source.changed("changed")
            yield into
