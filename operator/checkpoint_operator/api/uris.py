"""Target URIs are written by users, so they are hostile until they came through here."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

MAX_LENGTH = 1024


class Scheme(StrEnum):
    FILE = "file"
    S3 = "s3"
    GS = "gs"
    AZURE = "azure"


_BUCKET = {
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
    Scheme.S3: re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
    # https://cloud.google.com/storage/docs/buckets#naming
    Scheme.GS: re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"),
    # https://learn.microsoft.com/rest/api/storageservices/naming-and-referencing-containers--blobs--and-metadata
    Scheme.AZURE: re.compile(r"[a-z0-9](?:[a-z0-9]|-(?!-)){1,61}[a-z0-9]"),
}


# Markers, staging folders and probes: a target of that name would be taken for one of them.
_RESERVED = re.compile(r"\.metadata\.json|\.metadata\.deleting\.json|\.partial-.*|\.probe-.*")


class InvalidURI(ValueError):
    """The text is no target URI; the message names the text, what is wrong with it, and the way out."""


def bad_segment(segment: str) -> str | None:
    """Why a single path segment is refused, or None. Shared by URIs, source paths and names of stored files."""
    if segment in ("", ".", ".."):
        return {"": "an empty segment ('//')", ".": "a '.' segment", "..": "a '..' segment"}[segment]
    if "\\" in segment:
        return "a backslash"
    if any(ord(char) < 32 or ord(char) == 127 for char in segment):
        return "a control character"
    try:
        segment.encode("utf-8")
    except UnicodeEncodeError:
        return "a name that is not valid UTF-8"
    return None


def without_secrets(text: str) -> str:
    """The text for a message: before an '@' may stand a password, behind a '?' a signature (presigned, SAS)."""
    start, at, rest = text.rpartition("@")
    scheme, slashes, _ = start.partition("://")
    shown = f"{scheme if slashes else ''}{slashes}***@{rest}" if at else text
    before, query, _ = shown.partition("?")
    return f"{before}?***" if query else shown


def _is_bucket(scheme: str, bucket: str) -> bool:
    if scheme in _BUCKET:
        return _BUCKET[Scheme(scheme)].fullmatch(bucket) is not None
    return not bucket or bad_segment(bucket) is None


@dataclass(frozen=True)
class TargetURI:
    """A place in a store: scheme, bucket (or container; empty for ``file``), and a path that is never empty.

    ``scheme`` is a :class:`Scheme`, or, in the library alone, one that another package serves.

    The path has no leading or trailing slash. It is taken literally: ``%20`` means these three characters, because
    an object key has no escaping and a URI that is decoded by one reader and not by the next names two objects.
    """

    scheme: str
    bucket: str
    path: str

    @classmethod
    def parse(cls, text: str, *, allow_root: bool = False, others: Collection[str] = ()) -> Self:
        """Parse and normalise (one trailing slash is dropped).

        ``allow_root``: a whole bucket or volume is fine too (for listing; never for writing or deleting).
        ``others``: schemes that are fine beside the four. What a bucket is there, and whether there is one, their
        backend knows; the path keeps the rules of every path. The custom resource has the four alone.

        Raises:
            InvalidURI: with a sentence that names the text and the way out.
        """
        shown = without_secrets(text)
        scheme_text, separator, rest = text.partition("://")
        if not separator or scheme_text not in {*Scheme, *others}:
            raise InvalidURI(
                f"'{shown}' has no supported scheme: use file:///path, s3://bucket/prefix, gs://bucket/prefix "
                "or azure://container/prefix"
            )
        if len(text) > MAX_LENGTH:
            raise InvalidURI(f"'{shown[:60]}…' has {len(text)} characters: at most {MAX_LENGTH} are allowed")
        scheme = Scheme(scheme_text) if scheme_text in set(Scheme) else scheme_text
        bucket, slash, path = rest.partition("/")
        if "@" in bucket or (":" in bucket and "@" in path):  # a secret key may hold a '/' itself
            raise InvalidURI(f"a {scheme}:// URI has user information before '@': credentials never go into a URI")
        for char, name in (("?", "a query"), ("#", "a fragment")):
            if char in rest:
                raise InvalidURI(f"'{shown}' has {name} ('{char}'): a target is a plain place, remove it")
        if scheme is Scheme.FILE:
            if bucket:
                raise InvalidURI(f"'{shown}' names a host: a file URI has three slashes, file:///path")
        elif not _is_bucket(scheme, bucket):
            raise InvalidURI(f"'{shown}' names no valid bucket or container: see the store's naming rules")
        path = path.removesuffix("/")
        if not path and allow_root:
            return cls(scheme, bucket, "")
        if not slash or not path:
            raise InvalidURI(
                f"'{shown}' names a whole {'volume' if scheme is Scheme.FILE else 'bucket'}: add a path, one folder "
                "for each checkpoint"
            )
        for segment in path.split("/"):
            if problem := bad_segment(segment):
                raise InvalidURI(f"{shown!r} has {problem} in its path: write the path out in full")
            if _RESERVED.fullmatch(segment):
                raise InvalidURI(f"'{shown}' uses '{segment}', a name of the operator's own: choose another one")
        return cls(scheme, bucket, path)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.path}"

    def child(self, name: str) -> "TargetURI":
        """The place one or more segments below this one; it may be longer than what a user may write."""
        return TargetURI(self.scheme, self.bucket, f"{self.path}/{name}")

    def is_within(self, prefix: "str") -> bool:
        """Whether this place lies at or below an admin's prefix, by whole segments (``s3://b/a`` is not in ``s3://b/ab``).

        A prefix may be a whole bucket (``s3://bucket/``) or, for files, the whole claim (``file:///``).
        """
        scheme, _, rest = prefix.partition("://")
        bucket, _, path = rest.strip("/").partition("/") if scheme != Scheme.FILE else ("", "", rest.strip("/"))
        if scheme != self.scheme or bucket != self.bucket:
            return False
        return path == "" or self.path == path or self.path.startswith(path + "/")
