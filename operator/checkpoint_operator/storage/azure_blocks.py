"""The rules that Azure has for names, sizes and block ids: pure, so that a test can try every edge without a server.

A block's id is the only thing that Azure says of an unfinished block besides its size, so it carries what a later attempt
needs: whose upload it belongs to, its place in the file, and the MD5 that the store checked when the block arrived.
"""

import base64
import binascii
import hashlib
import re
import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from checkpoint_operator.storage.store import Body, Piece, hashed

MIB = 1 << 20
PART_SIZE = 8 * MIB
"""One block's bytes; also the largest object that is written in one Put Blob."""
MAX_BLOCKS = 12_500
"""A quarter of what Azure takes (https://learn.microsoft.com/azure/storage/blobs/scalability-targets): the SDK needs 1.5 KiB
for each to write the list of them, and to read it back, which is to fit into a mover's 150 MB."""
# https://learn.microsoft.com/rest/api/storageservices/naming-and-referencing-containers--blobs--and-metadata
MAX_NAME = 1024
MAX_SEGMENTS = 254

# Azure takes ids of at most 64 bytes, all of one length in a blob: this one is 51 bytes long, for ever. Another length
# would make each half-sent blob of an earlier version impossible to finish (InvalidBlobOrBlock) until it expires.
_ID = re.compile(r"([A-Za-z0-9_-]{22})\.(\d{5})\.([A-Za-z0-9_-]{22})")


@dataclass(frozen=True)
class BlockId:
    """``upload id . number . MD5``, before the base64 that the protocol puts around it."""

    upload_id: str
    number: int
    digest: bytes

    def __str__(self) -> str:
        return f"{self.upload_id}.{self.number:05d}.{base64.urlsafe_b64encode(self.digest).decode().rstrip('=')}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for the block of another tool."""
        found = _ID.fullmatch(text)
        if found is None:
            return None
        parsed = cls(found[1], int(found[2]), base64.urlsafe_b64decode(found[3] + "=="))
        return parsed if str(parsed) == text else None  # the last character has bits that say nothing


def new_upload_id() -> str:
    """128 fresh random bits."""
    return secrets.token_urlsafe(16)


def part_size(size: int) -> int:
    """Bytes of each block but the last of a file of this size, in whole MiB."""
    smallest = -(-size // MAX_BLOCKS)
    return max(PART_SIZE, -(-smallest // MIB) * MIB)


def digest(body: Body) -> bytes:
    """MD5: what Azure checks on arrival, computes by itself for a Put Blob, and keeps."""
    return hashed(body, hashlib.md5(usedforsecurity=False)).digest()


def checksum(pieces: Sequence[Piece]) -> str:
    """One piece: its MD5, as Azure's Content-MD5 says it. Several: a hash over the sizes and MD5s of the blocks.

    Azure has no digest of a blob of several blocks of its own making: a Content-MD5 there is what a client claimed.
    """
    if len(pieces) == 1:
        return base64.b64encode(pieces[0].digest).decode()
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece.size.to_bytes(8) + piece.digest)
    return f"{base64.b64encode(whole.digest()).decode()}-{len(pieces)}"


def is_base64(text: str) -> bool:
    """Whether an account key can be one; the SDK notices otherwise with the first request only."""
    try:
        return bool(base64.b64decode(text, validate=True))
    except binascii.Error:
        return False


def refusal(key: str) -> str | None:
    """Why Azure could not keep this name exactly, as the end of "the name …", or None."""
    if len(key.encode("utf-16-le", "surrogatepass")) // 2 > MAX_NAME:
        return f"has more than {MAX_NAME} characters"
    segments = key.split("/")
    if len(segments) > MAX_SEGMENTS:
        return f"has more than {MAX_SEGMENTS} segments"
    for segment in segments:
        if segment.endswith("."):
            return f"has a segment that ends with a dot ({segment!r}), which Azure drops"
        if not segment:
            return "has an empty segment, which Azure may drop"
    if "\\" in key:
        return "has a backslash, which Azure makes a slash"
    bad = next((char for char in key if not _is_kept(char)), None)
    return f"has the character U+{ord(bad):04X}, which Azure does not take" if bad else None


def _is_kept(char: str) -> bool:
    """No control characters, surrogates, private use (the documents name U+E000) or noncharacters."""
    code = ord(char)
    noncharacter = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return not noncharacter and unicodedata.category(char) not in ("Cc", "Cs", "Co")
