"""What becomes of data when its object goes: as its policy says, and nothing by surprise."""

from __future__ import annotations

from collections.abc import Callable

from space import Space, Store

MIB = 1 << 20


def test_data_goes_or_stays_as_the_policy_says_and_what_was_not_done_leaves_nothing(space: Space) -> None:
    space.claim("output")
    slow = {"maxBytesPerSecond": MIB}
    space.train(
        {"run": "sample", "large": {"model.bin": 32 * MIB, "other.bin": MIB}},
        space.artifact("removed", "run", deletionPolicy="Delete"),
        space.artifact("retained", "run", deletionPolicy="Retain"),
        space.artifact("cancelled", "large", mover=slow),
    )
    space.ready("removed", "retained")
    space.sends("cancelled")
    space.kubectl("delete", "ckpt", "removed", "retained", "cancelled", "--timeout=90s")

    assert space.objects("removed") == {}
    assert len(space.objects("retained")) == 12
    assert (space.objects("cancelled"), space.uploads("cancelled")) == ({}, [])
    space.without_jobs("removed", "retained", "cancelled")


def test_a_deletion_waits_for_a_store_that_is_away_and_an_admin_may_let_go(space: Space, store: Store) -> None:
    space.claim("output")
    space.train(
        {"run": "sample"},
        *(space.artifact(name, "run", deletionPolicy="Delete") for name in ("patient", "abandoned")),
    )
    space.ready("patient", "abandoned")
    store.wire.cut()
    space.kubectl("delete", "ckpt", "patient", "abandoned", "--wait=false")
    for name in ("patient", "abandoned"):
        assert "abandon-data" in space.waits(name, "StoreUnavailable", phase="Deleting")
    space.kubectl("annotate", "ckpt", "abandoned", "checkpoints.rlhf.dev/abandon-data=true")
    space.gone("abandoned")
    store.wire.mend()
    space.retry("patient")
    space.gone("patient")
    assert space.objects("patient") == {}
    assert len(space.objects("abandoned")) == 12


def test_a_namespace_that_goes_takes_no_data_with_it(new_space: Callable[[str], Space]) -> None:
    space = new_space("")
    space.claim("output")
    space.train({"run": "sample"}, space.artifact("kept", "run", deletionPolicy="Delete"))
    space.ready("kept")
    before = space.objects("kept")
    space.kubectl("delete", "namespace", space.name, "--timeout=90s")
    assert space.objects("kept") == before
