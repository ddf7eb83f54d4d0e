"""From a scheme to its backend. SDKs are imported here, at first use: who stores on s3:// needs no Azure SDK."""

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import Scheme
from checkpoint_operator.storage.backend import StorageBackend
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.local import LocalStorageBackend
from checkpoint_operator.storage.objects import ObjectStoreBackend
from checkpoint_operator.storage.transfer import DEFAULT_WORKERS


def S3StorageBackend(options: TargetOptions) -> ObjectStoreBackend:  # noqa: N802 - the library's published name
    """Artifacts on S3 and whatever speaks it. Raises BackendNotInstalled where boto3 is missing."""
    try:
        from checkpoint_operator.storage.s3 import open_s3
    except ImportError as error:
        raise StorageError(
            Reason.BACKEND_NOT_INSTALLED, "s3:// needs boto3: pip install 'checkpoint-operator[s3]'", backend="s3"
        ) from error
    return ObjectStoreBackend(lambda uri: open_s3(uri, options, DEFAULT_WORKERS))


def open_backend(scheme: Scheme, options: TargetOptions) -> StorageBackend:
    """Make the backend of a scheme.

    Raises:
        StorageError: BackendNotInstalled.
    """
    match scheme:
        case Scheme.FILE:
            return LocalStorageBackend(options.file_root or "/")
        case Scheme.S3:
            return S3StorageBackend(options)
        case Scheme.GS | Scheme.AZURE:
            raise StorageError(
                Reason.BACKEND_NOT_INSTALLED,
                f"{scheme}:// is not supported by this version: use s3:// or file://",
                backend=str(scheme),
            )
