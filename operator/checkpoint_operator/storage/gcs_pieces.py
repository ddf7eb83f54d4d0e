"""How the pieces of an unfinished object are called: Google has no multipart uploads, so they are objects themselves.

A piece of ``runs/a/model.bin`` is ``runs/a/.partial-<id>/00001.checkpoint-piece``, and what 32 of them were composed into
begins with ``c1-``: below the artifact's own prefix, so that whoever holds the claim finds them, and with an ending of their
own, by which a lifecycle rule finds them. Their metadata says whose they are and of which file. Only an object with this
very name *and* that metadata is a piece: it is never listed as data, and anything else of a similar name is data like all
other.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

OWNER = "artifact-uid"
"""User metadata by which a deletion knows its own objects, data and pieces alike."""
PIECE_OF = "piece-of"
"""User metadata of a piece alone: the name of the file in the same folder, percent-encoded to be ASCII."""

MAX_KEY_BYTES = 1024  # https://cloud.google.com/storage/docs/objects#naming
SUFFIX = ".checkpoint-piece"
"""What the lifecycle rule of docs/gcs.md removes, wherever it lies; so no data may have it."""
_PIECE = re.compile(
    rf"(?P<folder>(?:.*/)?)\.partial-(?P<id>[0-9a-f]{{16}})/(?P<name>(?:c[0-9]-)?[0-9]{{5}}){re.escape(SUFFIX)}", re.DOTALL
)
_OVERHEAD = len(f".partial-0123456789abcdef/c1-00001{SUFFIX}")


@dataclass(frozen=True)
class PieceName:
    """What a piece's name and metadata say. ``number`` counts from 1; it is None for what was composed already."""

    key: str
    upload_id: str
    owner: str
    number: int | None


def new_upload_id() -> str:
    """64 random bits: it need only differ from the other uploads in one folder."""
    return secrets.token_hex(8)


def folder_of_pieces(key: str, upload_id: str) -> str:
    """The prefix of all pieces of one upload, with the slash at its end."""
    return f"{key[: key.rfind('/') + 1]}.partial-{upload_id}/"


def piece_name(key: str, upload_id: str, number: int, level: int = 0) -> str:
    """Piece ``number`` (from 1) as it was sent (level 0) or as it was composed of 32 of the level below."""
    return f"{folder_of_pieces(key, upload_id)}{f'c{level}-' if level else ''}{number:05}{SUFFIX}"


def piece_metadata(key: str, owner: str) -> dict[str, str]:
    """What makes an object a piece of ``key``."""
    return {OWNER: owner, PIECE_OF: quote(key.rpartition("/")[2], safe="")}


def parse_piece(name: str, metadata: Mapping[str, str]) -> PieceName | None:
    """The piece that an object is, or None for data."""
    found = _PIECE.fullmatch(name)
    if found is None or OWNER not in metadata or PIECE_OF not in metadata:
        return None
    file = unquote(metadata[PIECE_OF])
    if not file or "/" in file:
        return None  # somebody else's: it would lead into another folder
    number = None if found["name"].startswith("c") else int(found["name"])
    return PieceName(found["folder"] + file, found["id"], metadata[OWNER], number)


def refusal(key: str) -> str | None:
    """Why Google could not keep this key exactly as it is, as the end of "the name …", or None.

    https://cloud.google.com/storage/docs/objects#naming
    """
    size, folder = len(key.encode()), len(key[: key.rfind("/") + 1].encode())
    if size > MAX_KEY_BYTES:
        return f"makes a key of {size} bytes, Google Cloud Storage allows {MAX_KEY_BYTES}"
    if folder + _OVERHEAD > MAX_KEY_BYTES:
        most = MAX_KEY_BYTES - _OVERHEAD
        return f"lies in a folder of {folder} bytes, which leaves no room for the pieces of a large file (at most {most})"
    if "\r" in key or "\n" in key:
        return "has a line break, which Google Cloud Storage refuses"
    if key.startswith(".well-known/acme-challenge/"):
        return "makes a key that begins with '.well-known/acme-challenge/', which Google reserves"
    if key in (".", ".."):
        return "is '.' or '..', which Google Cloud Storage refuses"
    if key.endswith(SUFFIX):
        return f"ends with '{SUFFIX}', like the pieces of unfinished uploads that a lifecycle rule removes"
    return None
