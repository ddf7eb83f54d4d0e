"""What a user of the library may write for a place: the operator's URIs, paths, and names that other tools have.

The custom resource knows the four schemes alone (:meth:`TargetURI.parse`); everything here becomes one of its URIs, or one
of a scheme that another package serves.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.uris import InvalidURI, Scheme, TargetURI, bad_segment, without_secrets
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.registry import registered_schemes

ENV_STORAGE_PATH = "RLHF_STORAGE_PATH"
"""The folder below which relative paths lie; unset or empty, they lie below the working directory."""

# https://www.rfc-editor.org/rfc/rfc3986#section-3.1, with two letters at least: one letter is a Windows drive.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_WINDOWS = re.compile(r"[A-Za-z]:|[^:]*\\")
# https://learn.microsoft.com/azure/storage/blobs/data-lake-storage-introduction-abfs-uri
_ABFSS = re.compile(r"abfss://([^@/]+)@([a-z0-9]{3,24})\.dfs\.core\.windows\.net(/.*)?", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """A parsed place, and the storage account where the text named one (``abfss://`` does)."""

    uri: TargetURI
    azure_account: str | None = None

    def written(self, uri: str) -> str:
        """A URI of the same store as a caller can hand it in again: with the account, if that is how it came."""
        container = f"{self.uri.scheme}://{self.uri.bucket}/"
        if self.azure_account is None or not uri.startswith(container):
            return uri
        return f"abfss://{self.uri.bucket}@{self.azure_account}.dfs.core.windows.net/{uri.removeprefix(container)}"


def find_place(text: str | os.PathLike[str], *, rooted: bool = False, allow_root: bool = False) -> Place:
    """Read what a caller wrote. ``rooted``: files lie below a folder of the options, and a path is one below it.

    ``allow_root``: a whole bucket or volume is fine too (for listing; never for writing or deleting).

    Raises:
        StorageError: UnsupportedURI, with a sentence that names the text and the way out.
    """
    text = os.fspath(text)
    try:
        if _URI.match(text):
            return _from_uri(text, rooted=rooted, allow_root=allow_root)
        return Place(_from_path(text, rooted=rooted, allow_root=allow_root))
    except InvalidURI as error:
        raise StorageError(Reason.UNSUPPORTED_URI, str(error)) from error


def _from_uri(text: str, *, rooted: bool, allow_root: bool) -> Place:
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise InvalidURI(
            f"'{without_secrets(text)}' is no URI, which has '://', and too much like one for a path: write './…' for a path"
        )
    if scheme == "abfss":
        match = _ABFSS.fullmatch(text)
        if match is None:
            raise InvalidURI("an abfss:// URI is written abfss://container@account.dfs.core.windows.net/path")
        container, account, path = match.groups(default="")
        return Place(TargetURI.parse(f"azure://{container}{path}", allow_root=allow_root), account)
    if scheme == "az":
        return Place(TargetURI.parse(f"azure://{rest}", allow_root=allow_root))
    if scheme in set(Scheme):
        uri = TargetURI.parse(text, allow_root=allow_root)
        return Place(uri if uri.scheme != Scheme.FILE or rooted else _without_links(uri, allow_root=allow_root))
    others = registered_schemes()
    if scheme not in others:
        raise InvalidURI(
            f"'{without_secrets(text)}' has no supported scheme: use a path, file:///path, s3://bucket/prefix, "
            "gs://bucket/prefix or azure://container/prefix, or install the package that serves this one"
        )
    return Place(TargetURI.parse(text, allow_root=allow_root, others=others))


def _from_path(text: str, *, rooted: bool, allow_root: bool) -> TargetURI:
    if not text:
        raise InvalidURI("the URI is empty: write a path, or one like s3://bucket/prefix")
    if _WINDOWS.match(text):
        raise InvalidURI(f"{without_secrets(text)!r} is a Windows path: write it with '/' and without a drive, file:///path")
    if text.startswith("~"):
        raise InvalidURI(
            f"'{without_secrets(text)}' begins with '~', which only a shell expands: write the path out in full"
        )
    if not text.startswith("/"):
        text = _below_base(text, rooted=rooted)
    uri = TargetURI.parse(f"file://{text}", allow_root=allow_root)
    return uri if rooted else _without_links(uri, allow_root=allow_root)


def _below_base(text: str, *, rooted: bool) -> str:
    """The absolute path of a relative one, which must stay below its base."""
    inner = "" if text == "." else text.removeprefix("./")
    for segment in inner.removesuffix("/").split("/") if inner else ():
        if problem := bad_segment(segment):
            raise InvalidURI(f"{text!r} has {problem}: a relative path stays below its folder, write the path out in full")
    return os.path.join("/" if rooted else _base(), inner)


def _base() -> str:
    return os.path.abspath(os.environ.get(ENV_STORAGE_PATH) or os.getcwd())


def _without_links(uri: TargetURI, *, allow_root: bool) -> TargetURI:
    """The place with the links of the caller's own file system resolved, because the backend follows none.

    The last segment stays as it is: a link there is not the folder that it points to, least of all for a deletion. What
    is only listed may be a link itself.
    """
    path = Path("/", uri.path)
    real = Path(os.path.realpath(path)) if allow_root else Path(os.path.realpath(path.parent), path.name)
    return uri if real == path else TargetURI.parse(f"file://{real}", allow_root=allow_root)
