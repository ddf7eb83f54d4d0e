"""A local cluster and object store from real parts, for tests and for a shell, without containers or root."""

from .errors import LocalClusterError
from .providers import Cluster, start
from .seaweedfs import Identity, ObjectStore, start_object_store
from .versitygw import TLSFiles, VersityGW, start_versitygw

__all__ = [
    "Cluster",
    "Identity",
    "LocalClusterError",
    "ObjectStore",
    "TLSFiles",
    "VersityGW",
    "start",
    "start_object_store",
    "start_versitygw",
]
