"""Movers, operators and wires die in the middle; what is called a checkpoint is one all the same."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import BUCKET, Operator
from fault_proxy import FaultProxy

MIB = 1 << 20


@pytest.fixture(scope="module")
def operator(make_operator: Callable[[str], Operator]) -> Operator:
    started = make_operator("faults")
    started.start()
    return started


@pytest.fixture(autouse=True)
def _mended(proxy: FaultProxy) -> Iterator[None]:
    yield
    proxy.mend()


def slow_upload(operator: Operator, proxy: FaultProxy, name: str, **spec: object) -> dict[str, bytes]:
    """Create an artifact whose upload (several parts) takes long, and return when bytes of it are moving."""
    files = {"config.json": b"{}", "weights.bin": os.urandom(40 * MIB)}
    operator.save(name, files)
    proxy.bytes_per_second = 4 * MIB
    before = proxy.forwarded
    operator.create(name, uri=uri_of(name), **spec)  # type: ignore[arg-type]
    deadline = time.monotonic() + 30
    while proxy.forwarded < before + 2 * MIB:
        assert time.monotonic() < deadline, operator.log.read_text()[-2000:]
        time.sleep(0.05)
    return files


def uri_of(name: str) -> str:
    return f"s3://{BUCKET}/faults/proxied/{name}"


def stored(operator: Operator, name: str) -> dict[str, bytes]:
    return operator.objects(f"faults/proxied/{name}")


def assert_whole(operator: Operator, name: str, files: dict[str, bytes]) -> None:
    found = stored(operator, name)
    assert found.pop(".metadata.json")
    assert found == files
    assert operator.uploads(f"faults/proxied/{name}") == []


def test_progress_is_shown_while_it_uploads(operator: Operator, proxy: FaultProxy) -> None:
    files = slow_upload(operator, proxy, "progress")
    status = operator.until(
        "progress", lambda status: 0 < status.get("progress", {}).get("percent", 0) < 100, "progress in between"
    )
    assert status["phase"] == "Uploading"
    assert status["size"] == "40Mi"
    assert status["progress"]["bytesTotal"] == 40 * MIB + 2
    proxy.mend()
    operator.wait("progress", "Ready")
    assert_whole(operator, "progress", files)


def test_a_killed_mover_is_tried_again_and_counted(operator: Operator, proxy: FaultProxy) -> None:
    files = slow_upload(operator, proxy, "killed-mover")
    [pid] = operator.mover_pids()
    os.kill(pid, signal.SIGKILL)
    proxy.mend()
    status = operator.wait("killed-mover", "Ready")
    assert (status["launches"], status["attempts"]) == (2, 2)
    assert_whole(operator, "killed-mover", files)
    assert ("Warning", "MoverKilled") in {event[:2] for event in operator.events("killed-mover")}


def test_a_killed_operator_goes_on_where_it_was_and_counts_no_attempt(operator: Operator, proxy: FaultProxy) -> None:
    files = slow_upload(operator, proxy, "killed-operator")
    operator.stop(signal.SIGKILL)
    proxy.mend()
    operator.start()
    status = operator.wait("killed-operator", "Ready")
    assert status["attempts"] == 1
    assert status["launches"] >= 2
    assert_whole(operator, "killed-operator", files)


def test_an_operator_that_is_stopped_in_order_leaves_no_mover_and_the_next_one_goes_on(
    operator: Operator, proxy: FaultProxy
) -> None:
    files = slow_upload(operator, proxy, "stopped-operator")
    [pid] = operator.mover_pids()
    assert operator.stop() == 0
    assert not os.path.exists(f"/proc/{pid}")
    proxy.mend()
    operator.start()
    assert operator.wait("stopped-operator", "Ready")["attempts"] == 1
    assert_whole(operator, "stopped-operator", files)


def test_a_suspended_artifact_stops_and_goes_on_when_it_may(operator: Operator, proxy: FaultProxy) -> None:
    files = slow_upload(operator, proxy, "suspended")
    operator.patch("suspended", {"spec": {"suspend": True}})
    status = operator.wait("suspended", "Suspended")
    assert operator.mover_pids() == []
    assert status["attempts"] == 0
    assert ".metadata.json" in stored(operator, "suspended")
    proxy.mend()
    operator.patch("suspended", {"spec": {"suspend": False}})
    operator.wait("suspended", "Ready")
    assert_whole(operator, "suspended", files)


def test_an_outage_of_the_store_is_waited_out(operator: Operator, proxy: FaultProxy) -> None:
    operator.save("outage")
    proxy.cut()
    operator.create("outage", uri=uri_of("outage"))
    status = operator.wait("outage", "Waiting", seconds=90)
    assert status["failure"]["reason"] == "StoreUnavailable"
    assert status["failure"]["retryable"] is True
    assert status["attempts"] == 0
    assert "nextRetryTime" in status
    proxy.mend()
    operator.wait("outage", "Ready", seconds=90)


@pytest.mark.parametrize("policy", ["Retain", "Delete"])
def test_an_artifact_that_is_deleted_while_it_uploads_leaves_nothing_behind(
    operator: Operator, proxy: FaultProxy, policy: str
) -> None:
    name = f"deleted-{policy.lower()}"
    slow_upload(operator, proxy, name, deletionPolicy=policy)
    proxy.bytes_per_second = None
    operator.kubectl("delete", "ckpt", name, "--wait=false")
    operator.wait_gone(name)
    assert stored(operator, name) == {}
    assert operator.uploads(f"faults/proxied/{name}") == []


def test_an_artifact_whose_finalizer_was_torn_off_stops_its_mover(operator: Operator, proxy: FaultProxy) -> None:
    slow_upload(operator, proxy, "torn-off")
    operator.kubectl("delete", "ckpt", "torn-off", "--wait=false")
    operator.patch("torn-off", {"metadata": {"finalizers": None}})
    operator.wait_gone("torn-off")
    deadline = time.monotonic() + 20
    while operator.mover_pids():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (
        ".metadata.json" not in stored(operator, "torn-off")
        or b'"Committed"' not in stored(operator, "torn-off")[".metadata.json"]
    )


def test_a_deletion_waits_for_the_store_and_can_be_abandoned(operator: Operator, proxy: FaultProxy) -> None:
    operator.save("abandoned")
    operator.create("abandoned", uri=uri_of("abandoned"), deletionPolicy="Delete")
    operator.wait("abandoned", "Ready")
    proxy.cut()
    operator.kubectl("delete", "ckpt", "abandoned", "--wait=false")
    status = operator.until("abandoned", lambda status: "failure" in status, "the failed deletion", seconds=90)
    assert status["phase"] == "Deleting"
    assert "checkpoints.rlhf.dev/abandon-data=true" in status["conditions"][3]["message"]
    operator.kubectl("annotate", "ckpt", "abandoned", "checkpoints.rlhf.dev/abandon-data=true")
    operator.wait_gone("abandoned")
    assert len(stored(operator, "abandoned")) == 12


def test_artifacts_beyond_the_cap_are_queued_with_the_reason(
    make_operator: Callable[[str], Operator], proxy: FaultProxy
) -> None:
    operator = make_operator("queued")
    operator.start("--max-movers=1")
    operator.save("first", {"weights.bin": os.urandom(20 * MIB)})
    operator.save("second")
    proxy.bytes_per_second = 4 * MIB
    operator.create("first", uri=f"s3://{BUCKET}/queued/proxied/first")
    operator.wait("first", "Uploading")
    operator.create("second")
    status = operator.wait("second", "Queued")
    assert [c["message"] for c in status["conditions"] if c["type"] == "Ready"] == [
        "position 1 of 1 in the queue; 1 mover is running (maxMovers 1)"
    ]
    proxy.mend()
    operator.wait("second", "Ready")
    operator.wait("first", "Ready")
    assert operator.stop() == 0


def test_a_deletion_does_not_take_data_that_another_artifact_becomes_ready_with(
    operator: Operator, proxy: FaultProxy
) -> None:
    files = {"weights.bin": os.urandom(64 * MIB)}
    operator.save("raced", files)
    operator.create("race-owner", path="raced", uri=uri_of("raced"), deletionPolicy="Delete")
    operator.wait("race-owner", "Ready")
    operator.create("race-sharer", path="raced", uri=uri_of("raced"))
    operator.wait("race-sharer", "Uploading", "Verifying", "Ready")
    operator.kubectl("delete", "ckpt", "race-owner", "--wait=false")
    operator.wait_gone("race-owner")
    status = operator.wait("race-sharer", "Ready", "Failed")
    if status["phase"] == "Ready" and not status["dataOwner"]:
        assert set(stored(operator, "raced")) == {"weights.bin", ".metadata.json"}
