"""A local cluster and object store from real parts, for tests and for a shell; only a node of it needs root."""

from .azurite import Azurite, ensure_azurite, start_azurite
from .errors import LocalClusterError, NodeUnavailable
from .gcs import GCSEmulator, start_fake_gcs, start_gcp_storage_emulator
from .node import NodeCluster, start_node
from .node_agents import Timings
from .providers import Cluster, start
from .seaweedfs import Identity, ObjectStore, start_object_store
from .versitygw import TLSFiles, VersityGW, start_versitygw

__all__ = [
    "Azurite",
    "Cluster",
    "GCSEmulator",
    "Identity",
    "LocalClusterError",
    "NodeCluster",
    "NodeUnavailable",
    "ObjectStore",
    "TLSFiles",
    "Timings",
    "VersityGW",
    "ensure_azurite",
    "start",
    "start_azurite",
    "start_fake_gcs",
    "start_gcp_storage_emulator",
    "start_node",
    "start_object_store",
    "start_versitygw",
]
