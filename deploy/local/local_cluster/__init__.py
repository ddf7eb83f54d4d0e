"""A local cluster and object store from real parts, for tests and for a shell, without containers or root."""

from .errors import LocalClusterError
from .providers import Cluster, start
from .seaweedfs import Identity, ObjectStore, start_object_store

__all__ = ["Cluster", "Identity", "LocalClusterError", "ObjectStore", "start", "start_object_store"]
