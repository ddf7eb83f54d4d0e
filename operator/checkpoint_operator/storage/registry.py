"""From a scheme to its backend. SDKs are imported here, at first use: who stores on s3:// needs no Azure SDK.

Another package adds a scheme by an entry point; the schemes of this package cannot be replaced::

    [project.entry-points."checkpoint_operator.backends"]
    hub = "my_package.backend:open_hub"         # a callable (TargetOptions) -> StorageBackend; serves hub://…
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import Scheme, TargetURI
from checkpoint_operator.storage.backend import StorageBackend
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.local import LocalStorageBackend
from checkpoint_operator.storage.objects import ObjectStoreBackend
from checkpoint_operator.storage.ranges import SMALL_WORKERS
from checkpoint_operator.storage.store import ObjectStore

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "checkpoint_operator.backends"
"""The entry point group: the name is the scheme, the value a callable (TargetOptions) -> StorageBackend."""


def S3StorageBackend(options: TargetOptions) -> ObjectStoreBackend:  # noqa: N802 - the library's published name
    """Artifacts on S3 and whatever speaks it. Raises BackendNotInstalled where boto3 is missing."""
    with _extra(Scheme.S3, "s3", "boto3"):
        from checkpoint_operator.storage.s3 import open_s3
    return ObjectStoreBackend(_once_per_bucket(lambda uri: open_s3(uri, options, SMALL_WORKERS)))


def GCSStorageBackend(options: TargetOptions) -> ObjectStoreBackend:  # noqa: N802 - the library's published name
    """Artifacts on Google Cloud Storage. Raises BackendNotInstalled where google-cloud-storage is missing."""
    with _extra(Scheme.GS, "gcs", "google-cloud-storage"):
        from checkpoint_operator.storage.gcs import open_gcs
    return ObjectStoreBackend(_once_per_bucket(lambda uri: open_gcs(uri, options, SMALL_WORKERS)))


def AzureBlobStorageBackend(options: TargetOptions) -> ObjectStoreBackend:  # noqa: N802 - the library's published name
    """Artifacts on Azure Blob Storage. Raises BackendNotInstalled where azure-storage-blob is missing."""
    with _extra(Scheme.AZURE, "azure", "azure-storage-blob"):
        from checkpoint_operator.storage.azure import open_azure
    return ObjectStoreBackend(_once_per_bucket(lambda uri: open_azure(uri, options, SMALL_WORKERS)))


def open_backend(scheme: str, options: TargetOptions) -> StorageBackend:
    """Make the backend of a scheme: one of ours, or one that another package registered.

    Raises:
        StorageError: BackendNotInstalled, which names the extra to install or the package that is broken; UnsupportedURI
            where nobody knows the scheme.
    """
    match scheme:
        case Scheme.FILE:
            return LocalStorageBackend(options.file_root or "/")
        case Scheme.S3:
            return S3StorageBackend(options)
        case Scheme.GS:
            return GCSStorageBackend(options)
        case Scheme.AZURE:
            return AzureBlobStorageBackend(options)
        case _:
            return _open_registered(scheme, options)


def registered_schemes() -> frozenset[str]:
    """The schemes that other packages add."""
    from importlib.metadata import entry_points

    return frozenset(entry_points(group=ENTRY_POINTS).names) - frozenset(Scheme)


def _open_registered(scheme: str, options: TargetOptions) -> StorageBackend:
    from importlib.metadata import entry_points

    found = list(entry_points(group=ENTRY_POINTS, name=scheme))
    if not found:
        raise StorageError(Reason.UNSUPPORTED_URI, f"no package serves {scheme}://: install the one that does")
    if len(found) > 1:
        raise StorageError(
            Reason.BACKEND_NOT_INSTALLED,
            f"{' and '.join(sorted(map(_package, found)))} both register {scheme}://: uninstall one of them",
            backend=scheme,
        )
    try:
        backend: StorageBackend = found[0].load()(options)
    except StorageError:
        raise
    except Exception as error:  # whatever their code does; its text may hold anything, so it stays in the chain
        raise StorageError(
            Reason.BACKEND_NOT_INSTALLED,
            f"the package '{_package(found[0])}' registers {scheme}:// but '{found[0].value}' cannot be used "
            f"({type(error).__name__}): repair or uninstall it",
            backend=scheme,
        ) from error
    return backend


def _package(entry: "EntryPoint") -> str:
    return entry.dist.name if entry.dist else "unknown"


@contextmanager
def _extra(scheme: Scheme, extra: str, sdk: str) -> Iterator[None]:
    """An SDK that is missing is named together with the command that installs it."""
    try:
        yield
    except ImportError as error:
        raise StorageError(
            Reason.BACKEND_NOT_INSTALLED,
            f"{scheme}:// needs {sdk}: pip install 'checkpoint-operator[{extra}]'",
            backend=str(scheme),
        ) from error


def _once_per_bucket(open_store: Callable[[TargetURI], ObjectStore]) -> Callable[[TargetURI], ObjectStore]:
    """One client for each bucket, kept: making one takes longer than most requests, and its connections are reused."""
    stores: dict[str, ObjectStore] = {}
    making = threading.Lock()

    def opened(uri: TargetURI) -> ObjectStore:
        with making:
            if uri.bucket not in stores:
                stores[uri.bucket] = open_store(uri)
            return stores[uri.bucket]

    return opened
