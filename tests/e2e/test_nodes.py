"""Nodes that are drained or lost while they move a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from space import Space, Store

MIB = 1 << 20
SLOW = {"maxBytesPerSecond": MIB}
FILES = {f"part-{number:02}.bin": MIB for number in range(32)}


@contextmanager
def cordoned(space: Space, node: str) -> Iterator[None]:
    space.kubectl("cordon", node)
    try:
        yield
    finally:
        space.kubectl("uncordon", node)


@pytest.fixture(autouse=True)
def _two_nodes(space: Space) -> None:
    if len(space.place.nodes) < 2:
        pytest.skip("this cluster has one node")


def test_a_drained_node_hands_its_mover_over_and_nothing_stored_is_sent_again(space: Space, store: Store) -> None:
    stays, goes = space.place.nodes[0], space.place.nodes[-1]
    space.claim("output", mode="ReadWriteMany")
    with cordoned(space, stays):
        space.train({"run": FILES}, space.artifact("moved", "run", mover=SLOW))
        space.sends("moved", 4 * MIB)
    with cordoned(space, goes):
        space.kubectl("drain", goes, "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=60s")
        message = space.waits("moved", "MoverDisrupted")
        assert "Eviction API" in message
        kept = sum(len(content) for content in space.objects("moved").values())
        sent = store.wire.forwarded
        space.patch("moved", mover=None)  # a changed spec is tried at once
        status = space.ready("moved")
    assert [pod["spec"]["nodeName"] for pod in space.movers("moved")] == [goes, stays]
    assert status["attempts"] == 1, "a drain is nobody's fault"
    assert store.wire.forwarded - sent < len(FILES) * MIB - kept + MIB, "headers, and not one file twice"


def test_a_lost_node_holds_up_only_what_lies_on_it(space: Space) -> None:
    if space.place.kill_kubelet is None or space.place.restart_kubelet is None:
        pytest.skip("the nodes of this cluster cannot be killed from here")
    stays, goes = space.place.nodes[0], space.place.nodes[-1]
    space.claim("shared", mode="ReadWriteMany")
    space.claim("local", node=goes)
    slow = {"maxBytesPerSecond": MIB // 4}
    with cordoned(space, stays):
        shared = space.artifact("shared", "run", claim="shared", mover=slow)
        local = space.artifact("local", "run", claim="local", mover=slow)
        space.train({"run": FILES}, shared, claim="shared", name="one")
        space.train({"run": FILES}, local, claim="local", name="two")
        space.sends("shared")
        space.sends("local")
    space.place.kill_kubelet(goes)
    try:
        for name in ("shared", "local"):
            space.waits(name, "MoverDisrupted")
            space.patch(name, mover=None)  # a changed spec is tried at once
        space.ready("shared")
        assert space.movers("shared")[-1]["spec"]["nodeName"] == stays
        message = space.waits("local", "Unschedulable")
        assert "0/2 nodes are available" in message
    finally:
        space.place.restart_kubelet(goes)
        space.kubectl("wait", "--for=condition=Ready", f"node/{goes}", "--timeout=90s")
    space.ready("local")
