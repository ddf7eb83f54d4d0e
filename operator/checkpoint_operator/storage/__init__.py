"""The storage layer as a library of its own: usable with no cluster, no operator and no Kubernetes client."""

from typing import TYPE_CHECKING, Any

from checkpoint_operator.api.errors import ErrorCode, Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, Progress, Stored, TargetOptions
from checkpoint_operator.storage.backend import DeleteRequest, OnProgress, StorageBackend, UploadRequest
from checkpoint_operator.storage.errors import Cancelled, RLHFStorageError, StorageError
from checkpoint_operator.storage.listing import Filters
from checkpoint_operator.storage.local import LocalStorageBackend
from checkpoint_operator.storage.manager import StorageManager, get_storage_manager
from checkpoint_operator.storage.registry import AzureBlobStorageBackend, GCSStorageBackend, S3StorageBackend

if TYPE_CHECKING:
    from checkpoint_operator.storage.aio import AsyncStorageManager

__all__ = [
    "ArtifactMetadata",
    "AsyncStorageManager",
    "AzureBlobStorageBackend",
    "Cancelled",
    "DeleteRequest",
    "ErrorCode",
    "Filters",
    "GCSStorageBackend",
    "Layout",
    "LocalStorageBackend",
    "OnProgress",
    "Progress",
    "RLHFStorageError",
    "Reason",
    "S3StorageBackend",
    "StorageBackend",
    "StorageError",
    "StorageManager",
    "Stored",
    "TargetOptions",
    "UploadRequest",
    "get_storage_manager",
]


def __getattr__(name: str) -> Any:
    # A mover starts once for each artifact: who does not use asyncio does not wait for it.
    if name == "AsyncStorageManager":
        from checkpoint_operator.storage.aio import AsyncStorageManager

        return AsyncStorageManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
