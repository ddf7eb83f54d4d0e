"""The file table of a checkpoint and its digests: what 'the same content' means, independent of store and time."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from checkpoint_operator.api.base import WIRE, ApiModel
from checkpoint_operator.api.uris import bad_segment

SCHEMA_VERSION = 1


class Link(ApiModel):
    """A symlink that stays inside the folder. Object stores have no links: it lives in the manifest alone."""

    path: str
    target: str


def link_problem(path: str, target: str) -> str | None:
    """Why a symlink is refused, or None: it must stay inside the folder whatever other links the folder holds.

    ``..`` may stand at the front alone. Behind a name it would be taken from where that name leads, and if that is a link,
    the lexical place and the real one differ: ``m -> a/l/..`` with ``a/l -> ..`` leaves the folder.
    """
    segments = target.split("/")
    up = next((index for index, segment in enumerate(segments) if segment != ".."), len(segments))
    if target.startswith("/") or up > path.count("/"):
        return "points out of the folder"
    for segment in segments[up:]:
        if segment not in ("", ".") and (problem := bad_segment(segment)):
            return f"points to a name with {problem}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True, config=WIRE)
class StoredFile:
    """One line of the file table. No model like the others: there are as many as files, and a model takes five times the
    memory of these slots.

    ``sha256`` is the hex digest of the whole file. ``etag`` is the store's name for exactly this version of the object; a
    removal names it. ``parts`` and ``part_size`` say how it was cut, which a composite checksum depends on.
    """

    path: str
    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, Field(max_length=64)]
    parts: int = 1
    part_size: int | None = None
    etag: str | None = None
    generation: int | None = None
    mode: int | None = None
    mtime_ns: int | None = None

    @property
    def token(self) -> str:
        """What a conditional removal names: the ETag or the generation of exactly this version."""
        return self.etag or str(self.generation)


class FileTable(ApiModel):
    """What a checkpoint holds, sorted by the UTF-8 bytes of the path."""

    files: list[StoredFile] = Field(default_factory=list)
    links: list[Link] = Field(default_factory=list)
    empty_directories: list[str] = Field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def digest_lines(lines: Iterable[Sequence[object]]) -> str:
    """``sha256:…`` over JSON lines: arrays without spaces, non-ASCII characters as they are, one newline each."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(_encode(line).encode())
        digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"


def content_digest(table: FileTable) -> str:
    """The digest by which two checkpoints are the same: paths, sizes, hashes, links, empty folders.

    Never modes, times, part sizes or etags: they differ between stores.
    """
    return digest_lines(
        chain(
            ([file.path, file.size, file.sha256] for file in sorted(table.files, key=lambda file: file.path.encode())),
            (["link", link.path, link.target] for link in sorted(table.links, key=lambda link: link.path.encode())),
            (["directory", path] for path in sorted(table.empty_directories, key=str.encode)),
        )
    )
