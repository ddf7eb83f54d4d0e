"""A local cluster and object store from real parts, for tests and for a shell, without containers or root."""

from .azurite import Azurite, ensure_azurite, start_azurite
from .errors import LocalClusterError
from .gcs import GCSEmulator, start_fake_gcs, start_gcp_storage_emulator
from .providers import Cluster, start
from .seaweedfs import Identity, ObjectStore, start_object_store
from .versitygw import TLSFiles, VersityGW, start_versitygw

__all__ = [
    "Azurite",
    "Cluster",
    "GCSEmulator",
    "Identity",
    "LocalClusterError",
    "ObjectStore",
    "TLSFiles",
    "VersityGW",
    "ensure_azurite",
    "start",
    "start_azurite",
    "start_fake_gcs",
    "start_gcp_storage_emulator",
    "start_object_store",
    "start_versitygw",
]
