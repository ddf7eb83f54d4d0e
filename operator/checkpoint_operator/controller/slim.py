"""Keeps the half of the Kubernetes client that nobody here uses out of the operator: 50 MB, and a quarter of its start."""

import sys
from importlib.util import find_spec
from types import ModuleType


def without_synchronous_client() -> None:
    """Let ``kubernetes.aio`` be imported alone. For the operator's own process, before anything imports kubernetes or kopf.

    ``kubernetes/__init__`` imports the synchronous client with its 830 modules, and kopf does too where it finds it, for the
    sake of two classes that nobody hands to it here. So the package is entered without running its ``__init__``, and the
    synchronous client is said not to be there, which kopf allows for.
    """
    found = find_spec("kubernetes")
    if found is None or found.submodule_search_locations is None or "kubernetes" in sys.modules:
        return
    package = ModuleType("kubernetes")
    package.__spec__, package.__path__ = found, list(found.submodule_search_locations)
    sys.modules["kubernetes"] = package
    sys.modules["kubernetes.client"] = None  # type: ignore[assignment]  # what import takes for "there is none"
