"""The front door of the library: one object that picks the backend by the URI's scheme."""

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, TargetOptions
from checkpoint_operator.api.uris import bad_segment
from checkpoint_operator.storage.backend import DeleteRequest, OnProgress, StorageBackend, UploadRequest
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.listing import Filters, matches
from checkpoint_operator.storage.places import Place, find_place
from checkpoint_operator.storage.registry import open_backend
from checkpoint_operator.storage.source import Selection

URI = str | os.PathLike[str]
"""``file:///path``, ``/path``, ``relative/path``, ``s3://``, ``gs://``, ``azure://`` (``az://``, ``abfss://``), or a scheme
that another package registered."""


class StorageManager:
    """Upload, download, verify, delete, list, get_metadata for every scheme; backends are made once and kept.

    ``options`` say where the stores are; without them the environment does, by the SDKs' own variables. Every method may be
    called from several threads at once. Every method raises :class:`StorageError`, whose context says what was being done
    where, and :class:`Cancelled` once the event that it was given as ``cancelled`` is set; :class:`StorageBackend` says
    which reasons each has.
    """

    def __init__(self, options: TargetOptions | None = None) -> None:
        self._options = options or TargetOptions(allow_ambient_credentials=True)
        self._backends: dict[tuple[str, str | None], StorageBackend] = {}
        self._opening = threading.Lock()

    def backend(self, scheme: str, azure_account: str | None = None) -> StorageBackend:
        """The backend of a scheme, and of a storage account where one is named.

        Raises:
            StorageError: BackendNotInstalled; UnsupportedURI where nobody knows the scheme, or where the options name
                another account.
        """
        options = self._options
        if azure_account and azure_account != options.azure_account:
            if options.azure_account:
                raise StorageError(
                    Reason.UNSUPPORTED_URI,
                    f"the URI names the storage account '{azure_account}', the options '{options.azure_account}': "
                    "use azure://, or a manager of its own for each account",
                    backend=scheme,
                )
            options = options.replace(azure_account=azure_account)
        with self._opening:
            key = (scheme, options.azure_account)
            if key not in self._backends:
                self._backends[key] = open_backend(scheme, options)
            return self._backends[key]

    def upload(
        self,
        source: str | Path,
        uri: URI,
        metadata: ArtifactMetadata | None = None,
        *,
        uid: str | None = None,
        layout: Layout = Layout.PLAIN,
        selection: Selection | None = None,
        force: bool = False,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> str:
        """Store a folder (or a file) at a URI and commit it; the URI by which every other method finds it.

        ``uid`` names the artifact; without one it follows from the URI and the source, so that a second call finds what
        the first left. With ``layout=Layout.UNIQUE`` the artifact gets a folder of its own below ``uri``. ``force``: you
        know that no earlier upload of this artifact is running.
        """
        place, cancelled = self._place(uri), cancelled or threading.Event()
        source = Path(source).absolute()
        with _during("upload", place, cancelled):
            stored = self._backend_of(place).upload_artifact(
                UploadRequest(
                    root=str(source.parent),
                    path=source.name,
                    uri=place.uri,
                    metadata=metadata or ArtifactMetadata(),
                    uid=uid,
                    layout=layout,
                    selection=selection or Selection(),
                    force=force,
                    progress=progress,
                    cancelled=cancelled,
                    max_bytes_per_second=self._options.max_bytes_per_second,
                )
            )
        return place.written(stored.storage_uri)

    def download(
        self,
        uri: URI,
        destination: str | Path,
        *,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> ArtifactMetadata:
        """Fetch a committed artifact, verified, into a folder that does not exist yet."""
        place, cancelled = self._place(uri), cancelled or threading.Event()
        with _during("download", place, cancelled):
            found = self._backend_of(place).download_artifact(place.uri, Path(destination), progress, cancelled)
        return _found_at(place, found)

    def verify(
        self,
        uri: URI,
        *,
        manifest_digest: str | None = None,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> ArtifactMetadata:
        """Read a committed artifact back, every byte, and compare it with its manifest.

        ``manifest_digest``: what the manifest itself must be (``status.manifestDigest`` of the custom resource).
        """
        place, cancelled = self._place(uri), cancelled or threading.Event()
        with _during("verify", place, cancelled):
            manifest = self._backend_of(place).verify_artifact(place.uri, manifest_digest, progress, cancelled)
        return _found_at(place, manifest.metadata)

    def delete(self, uri: URI, *, force: bool = False) -> str:
        """Remove the artifact at a URI; one sentence about what was removed.

        ``force`` also removes what was never committed: its writer must be gone.
        """
        place = self._place(uri)
        with _during("delete", place):
            return self._backend_of(place).delete_artifact(DeleteRequest(place.uri, force=force))

    def get_metadata(self, uri: URI) -> ArtifactMetadata:
        """What is known about the committed artifact at a URI."""
        place = self._place(uri)
        with _during("get metadata", place):
            found = self._backend_of(place).get_metadata(place.uri)
        return _found_at(place, found)

    def list(
        self,
        uri: URI,
        *,
        prefix: str = "",
        artifact_type: str | None = None,
        cancelled: threading.Event | None = None,
        **filters: Unpack[Filters],
    ) -> Generator[ArtifactMetadata, None, None]:
        """Every committed artifact at or below a URI (which may be a whole bucket), one after the other.

        ``prefix`` is the beginning of the path below the URI, as a plain string: ``"experiments/d"`` finds
        ``experiments/dpo/checkpoint-1000``. ``filters`` are fields of the metadata: :class:`Filters`.

        Raises:
            TypeError: for a filter that does not exist.
        """
        place = self._place(uri, allow_root=True)
        _check_prefix(prefix)
        matches(ArtifactMetadata(), filters)
        return self._list(place, artifact_type, prefix, filters, cancelled or threading.Event())

    def _list(
        self, place: Place, artifact_type: str | None, prefix: str, filters: Filters, cancelled: threading.Event
    ) -> Generator[ArtifactMetadata, None, None]:
        with _during("list", place, cancelled):
            for found in self._backend_of(place).list_artifacts(place.uri, artifact_type, prefix):
                if cancelled.is_set():
                    raise Cancelled
                if matches(found, filters):
                    yield found.replace(storage_path=place.written(found.storage_path or str(place.uri)))

    def _place(self, uri: URI, *, allow_root: bool = False) -> Place:
        return find_place(uri, rooted=self._options.file_root is not None, allow_root=allow_root)

    def _backend_of(self, place: Place) -> StorageBackend:
        return self.backend(place.uri.scheme, place.azure_account)


def _found_at(place: Place, metadata: ArtifactMetadata) -> ArtifactMetadata:
    """A manifest remembers where it was written; a folder may have been moved, or mounted elsewhere, since."""
    return metadata.replace(storage_path=place.written(str(place.uri)))


def _check_prefix(prefix: str) -> None:
    if prefix.startswith("/") or any(bad_segment(segment) for segment in prefix.split("/")[:-1]):
        raise StorageError(
            Reason.UNSUPPORTED_URI, f"the prefix {prefix!r} can begin no path below the URI: write it as 'folder/beginning'"
        )


@contextmanager
def _during(operation: str, place: Place, cancelled: threading.Event | None = None) -> Iterator[None]:
    """What an error does not know yet, it is told: what was being done, and where."""
    if cancelled and cancelled.is_set():
        raise Cancelled
    try:
        yield
    except StorageError as error:
        error.locate(operation, uri=str(place.uri), backend=str(place.uri.scheme))
        raise


_managers: dict[int, StorageManager] = {}


def get_storage_manager() -> StorageManager:
    """The process's manager, configured by the environment. A forked child gets its own: connections are not shared."""
    return _managers.setdefault(os.getpid(), StorageManager())
