"""What every test may rely on: no credentials and no cluster of whoever runs the tests, nothing that leaves this machine."""

import os
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
# In this order, since what takes longest must not come last. Each of `_SHARED` has one cluster, or one machine, for all its
# tests, and so one of pytest-xdist's workers; elsewhere each file is a unit of its own.
_ORDER = ("e2e", "cluster", "storage", "local", "demo", "chart", "unit")
_SHARED = {"e2e", "cluster", "local", "demo", "chart"}

_FOREIGN = ("AWS_", "AZURE_", "GOOGLE_", "CHECKPOINT_", "RLHF_", "S3_ENDPOINT_URL")


def pytest_configure(config: pytest.Config) -> None:
    for name in [name for name in os.environ if name.startswith(_FOREIGN) and name != "CHECKPOINT_OPERATOR_CACHE"]:
        del os.environ[name]
    # Else an AWS client without credentials asks the metadata address of a cloud.
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _ORDER.index(item.path.relative_to(_HERE).parts[0]))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # By a scheduler and not by marks: pytest-xdist 3.8 notes its groups in a way that pytest 9.2 does not hear of.
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            return path.parent.name if path.parent.name in _SHARED else path.name

    return ByFolder(config, log)
