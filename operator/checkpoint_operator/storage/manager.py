"""The front door of the library: one object that picks the backend by the URI's scheme."""

import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, Stored, TargetOptions
from checkpoint_operator.api.uris import InvalidURI, Scheme, TargetURI
from checkpoint_operator.storage.backend import DeleteRequest, OnProgress, StorageBackend, UploadRequest
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.registry import open_backend
from checkpoint_operator.storage.source import Selection


class StorageManager:
    """Upload, download, delete, list, get_metadata for every scheme; backends are made once and kept.

    ``options`` say where the store is; without them the environment does: ``RLHF_STORAGE_PATH`` is the folder below which
    ``file://`` URIs lie (default ``/``), and the AWS SDK's own chain is untouched.
    """

    def __init__(self, options: TargetOptions | None = None) -> None:
        self._options = options or TargetOptions(
            file_root=os.environ.get("RLHF_STORAGE_PATH", "/"), allow_ambient_credentials=True
        )
        self._backends: dict[Scheme, StorageBackend] = {}
        self._lock = threading.Lock()

    def backend(self, scheme: Scheme) -> StorageBackend:
        """The backend of a scheme. Raises UnsupportedURI or BackendNotInstalled."""
        with self._lock:
            if scheme not in self._backends:
                self._backends[scheme] = open_backend(scheme, self._options)
            return self._backends[scheme]

    def upload(
        self,
        source: str | Path,
        uri: str,
        metadata: ArtifactMetadata | None = None,
        *,
        uid: str | None = None,
        layout: Layout = Layout.PLAIN,
        selection: Selection | None = None,
        force: bool = False,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Stored:
        """Store a folder (or a file) at a URI and commit it. See :class:`StorageBackend` for what is raised."""
        source = Path(source).absolute()
        target = parse_uri(uri)
        return self.backend(target.scheme).upload_artifact(
            UploadRequest(
                root=str(source.parent),
                path=source.name,
                uri=target,
                metadata=metadata or ArtifactMetadata(),
                uid=uid,
                layout=layout,
                selection=selection or Selection(),
                force=force,
                progress=progress,
                cancelled=cancelled or threading.Event(),
            )
        )

    def download(self, uri: str, destination: str | Path, *, progress: OnProgress | None = None) -> ArtifactMetadata:
        """Fetch a committed artifact into a folder that does not exist yet."""
        target = parse_uri(uri)
        return self.backend(target.scheme).download_artifact(target, Path(destination), progress)

    def delete(self, uri: str, *, force: bool = False) -> str:
        """Remove the artifact at a URI; ``force`` also removes what was never committed (its writer must be gone)."""
        target = parse_uri(uri)
        return self.backend(target.scheme).delete_artifact(DeleteRequest(target, force=force))

    def list(self, prefix: str, *, artifact_type: str | None = None) -> Iterator[ArtifactMetadata]:
        """Every committed artifact at or below a prefix (which may be a whole bucket)."""
        target = parse_uri(prefix, allow_root=True)
        return self.backend(target.scheme).list_artifacts(target, artifact_type)

    def get_metadata(self, uri: str) -> ArtifactMetadata:
        """What is known about the committed artifact at a URI."""
        target = parse_uri(uri)
        return self.backend(target.scheme).get_metadata(target)


def parse_uri(text: str, *, allow_root: bool = False) -> TargetURI:
    """Parse a URI; raises :class:`StorageError` (UnsupportedURI) instead of ValueError."""
    try:
        return TargetURI.parse(text, allow_root=allow_root)
    except InvalidURI as error:
        raise StorageError(Reason.UNSUPPORTED_URI, str(error)) from error


@cache
def get_storage_manager() -> StorageManager:
    """The process's manager, configured by the environment."""
    return StorageManager()
