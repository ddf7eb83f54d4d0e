"""Fixtures of the tests of the local cluster: its package on the path, a real build, a cache of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent
for folder in (_HERE, _HERE.parents[1] / "deploy" / "local"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from local_helpers import CommandLine  # noqa: E402

from local_cluster.paths import cache_root  # noqa: E402


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("CLUSTER_PROVIDER", "KUBEBUILDER_ASSETS", "KUBECONFIG"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def programs() -> Path:
    from local_cluster.build import build

    return build()


@pytest.fixture
def command_line(programs: Path, tmp_path: Path) -> Iterator[CommandLine]:
    """Its cache links to the real build, so that nothing is built here; its cluster `t` is stopped at the end."""
    cache = tmp_path / "cache"
    (cache / "kube").mkdir(parents=True)
    (cache / "kube" / programs.name).symlink_to(cache_root() / "kube" / programs.name)
    line = CommandLine(cache)
    yield line
    line.run("down", "--name", "t")
