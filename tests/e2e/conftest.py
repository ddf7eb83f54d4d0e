"""The operator as users install it: Helm, a real node, an S3, and for each test a namespace of its own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from fault_proxy import FaultProxy  # noqa: E402
from providers import Place, Unavailable, chosen  # noqa: E402
from release import NAME, Release  # noqa: E402
from space import BUCKET, Space, Store  # noqa: E402

import local_cluster as lc  # noqa: E402
from local_cluster.helm import ensure_helm  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for all that is shared; others for nodes to be given up."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def place() -> Iterator[Place]:
    """Skips where this machine cannot; what it should be able to and does not is an error."""
    try:
        with chosen() as found:
            yield found
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def store(place: Place) -> Iterator[Store]:
    with lc.start_object_store("e2e") as server:
        server.client().create_bucket(Bucket=BUCKET)
        with FaultProxy(int(server.endpoint.rpartition(":")[2]), place.host_address) as wire:
            yield Store(server, wire)


@pytest.fixture(scope="session")
def release(place: Place, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    repository, _, tag = place.image.rpartition(":")
    values = {
        "image": {"repository": repository, "tag": tag, "pullPolicy": place.pull_policy},
        "movers": {"allowedEndpoints": [store.wire.endpoint], "nodeLostSeconds": 4, "terminationGraceSeconds": 10},
        # So long that whoever is tried again sooner was asked for; no test waits for it.
        "settings": {"backoff_seconds": 60, "progress_seconds": 1},
        "limits": {"maxMovers": 16, "maxMoversPerNamespace": 8, "maxMoversPerBucket": 16},
        "log": {"level": "info", "format": "plain"},
        # The other nodes may be lost.
        "nodeSelector": {"kubernetes.io/hostname": place.nodes[0]},
    }
    made = Release(place, ensure_helm(print), tmp_path_factory.mktemp("helm"), values)
    made.install()
    yield made
    if not place.is_ours:
        made.run("uninstall", NAME, "--wait", check=False)


@pytest.fixture
def new_space(
    place: Place, store: Store, release: Release, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Space]]:
    """Makes namespaces that are named after the test, and never twice the same on a cluster that stays."""
    made: list[Space] = []

    def make(suffix: str = "") -> Space:
        name = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[:40].strip("-")
        made.append(Space(place, store, f"{name}{suffix}-{os.urandom(2).hex()}", release.log))
        made[-1].create()
        return made[-1]

    yield make
    store.wire.mend()
    for space in made:
        space.close()


@pytest.fixture
def space(new_space: Callable[[str], Space]) -> Space:
    return new_space("")
