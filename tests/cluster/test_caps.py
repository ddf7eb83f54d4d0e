"""Who waits, who is next, who is told: caps that change while it runs, few writes, and a namespace that goes."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from conftest import BUCKET, Operator
from fault_proxy import FaultProxy

from checkpoint_operator.controller.scheduling import SAY_AGAIN
from local_cluster.operator_process import kubectl

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _mended(proxy: FaultProxy) -> Iterator[None]:
    yield
    proxy.mend()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def write_limits(operator: Operator, **limits: int) -> Path:
    """Change the file as a ConfigMap is changed: by a rename."""
    path = operator.folder / "limits.yaml"
    new = path.with_name("new")
    new.write_text(json.dumps(limits))
    return new.replace(path)


def ask(address: str, path: str) -> tuple[int, str]:
    connection = HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def number(address: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    total = 0.0
    for line in ask(address, "/metrics")[1].splitlines():
        if (
            line.partition("{")[0].partition(" ")[0] == f"checkpoint_operator_{name}"
            and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', line)).items()
        ):
            total += float(line.rpartition(" ")[2])
    return total


def seconds_between(artifact: dict[str, Any]) -> float:
    """From an artifact's creation to its start."""
    created, started = artifact["metadata"]["creationTimestamp"], artifact["status"]["startTime"]
    return (datetime.fromisoformat(started) - datetime.fromisoformat(created)).total_seconds()


def message(status: dict[str, Any]) -> str:
    return next(str(c["message"]) for c in status["conditions"] if c["type"] == "Ready")


def test_a_crowd_drains_in_order_and_each_is_written_to_three_times(make_operator: Callable[[str], Operator]) -> None:
    operator = make_operator("crowd")
    names = [f"c-{number:02}" for number in range(14)]
    for name in names:
        operator.save(name, {"weights.bin": name.encode()})
        operator.create(name)
    address = free_address()
    operator.start("--max-movers=2", "--progress-seconds=3600", f"--listen-address={address}", "--log-format=json")
    ended = [operator.wait(name, "Ready", seconds=120) for name in names]
    starts = [status["startTime"] for status in ended]
    # Two start at a time, and the second of them may be quicker; nobody passes further.
    assert all(start <= min(starts[number + 2 :], default=start) for number, start in enumerate(starts))
    assert number(address, "mover_starts_total") == len(names)
    # Queued (all but two of them), started, Ready; and a new position for each whole minute that one has waited.
    minutes = sum(int(seconds_between(operator.get(name)) / SAY_AGAIN) for name in names)
    writes = number(address, "api_requests_total", verb="patch", resource="checkpointartifacts/status", code="200")
    assert writes <= 3 * len(names) + minutes
    assert number(address, "queue_length") == 0
    assert number(address, "artifacts", phase="Ready") == len(names)
    assert operator.stop() == 0
    committed = [line for line in map(json.loads, operator.log.read_text().splitlines()) if "Committed" in line["message"]]
    assert sorted((line["namespace"], line["name"]) for line in committed) == [("crowd", name) for name in names]
    assert all(line["uid"] == operator.get(line["name"])["metadata"]["uid"] for line in committed)


def test_a_raised_cap_takes_effect_at_once_and_a_lowered_one_stops_nothing(
    make_operator: Callable[[str], Operator], proxy: FaultProxy
) -> None:
    operator = make_operator("caps")
    limits = write_limits(operator, maxMovers=1)
    address = free_address()
    operator.start(f"--limits-file={limits}", f"--listen-address={address}")
    proxy.bytes_per_second = MIB // 2
    for name in ("first", "second", "third"):
        operator.save(name, {"weights.bin": os.urandom(24 * MIB)})
        operator.create(name, uri=f"s3://{BUCKET}/caps/proxied/{name}")
        operator.wait(name, "Uploading" if name == "first" else "Queued")
    assert message(operator.status("second")) == "position 1 of 1 in the queue; 1 mover is running (maxMovers 1)"
    assert message(operator.status("third")) == "position 2 of 2 in the queue; 1 mover is running (maxMovers 1)"
    assert number(address, "queue_length", reason="MaxMovers") == 2
    write_limits(operator, maxMovers=2)
    operator.wait("second", "Uploading")
    assert operator.status("third")["phase"] == "Queued"
    write_limits(operator, maxMovers=1, maxMoversPerBucket=1)
    operator.until("third", lambda _: number(address, "movers_limit", scope="cluster") == 1, "the lower cap")
    assert {operator.status(name)["phase"] for name in ("first", "second")} == {"Uploading"}
    # On few cores the operator has to stay quick beside them.
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in operator.mover_pids()} == {10}
    write_limits(operator, maxMovers=0)
    operator.until("third", lambda _: number(address, "limits_file_valid") == 0, "that the file is wrong")
    assert number(address, "movers_limit", scope="cluster") == 1
    proxy.mend()
    for name in ("first", "second", "third"):
        operator.wait(name, "Ready", seconds=90)
    assert operator.stop() == 0


def test_a_bucket_has_its_own_cap_and_holds_up_no_other(make_operator: Callable[[str], Operator], proxy: FaultProxy) -> None:
    operator = make_operator("buckets")
    operator.start("--max-movers-per-bucket=1")
    proxy.bytes_per_second = MIB // 2
    operator.save("first", {"weights.bin": os.urandom(24 * MIB)})
    for name in ("second", "elsewhere"):
        operator.save(name)
    operator.create("first", uri=f"s3://{BUCKET}/buckets/proxied/first")
    operator.wait("first", "Uploading")
    operator.create("second")
    assert message(operator.wait("second", "Queued")) == (
        f"position 1 of 1 in the queue; 1 mover is writing to s3://{BUCKET} (maxMoversPerBucket 1)"
    )
    archive = {"uri": "file:///elsewhere", "persistentVolumeClaim": {"claimName": "archive"}}
    operator.create("elsewhere", uri=archive["uri"], target=archive)
    operator.wait("elsewhere", "Ready")
    assert operator.status("second")["phase"] == "Queued"
    proxy.mend()
    operator.wait("second", "Ready", seconds=90)
    assert operator.stop() == 0


def test_an_api_server_that_is_away_is_told_by_a_number_and_is_no_sickness(make_operator: Callable[[str], Operator]) -> None:
    operator = make_operator("deaf")
    with FaultProxy(int(operator.cluster.server.rpartition(":")[2])) as api:
        operator.api = api
        address = free_address()
        operator.start(f"--listen-address={address}", "--resync-seconds=10")
        operator.save("before")
        operator.create("before")
        operator.wait("before", "Ready")
        api.cut()
        operator.until("before", lambda _: number(address, "watch_age_seconds") > 12, "that nothing is heard")
        for path in ("/healthz", "/readyz"):
            assert ask(address, path) == (200, "ok\n")
        api.mend()
        operator.save("after")
        operator.create("after")
        operator.wait("after", "Ready", seconds=90)
        assert number(address, "api_requests_total", code="0") > 0
        assert operator.stop() == 0


def test_a_namespace_that_is_deleted_takes_no_checkpoint_along(make_operator: Callable[[str], Operator]) -> None:
    operator = make_operator("leaving")
    operator.start()
    operator.save("kept")
    operator.create("kept", deletionPolicy="Delete")
    operator.wait("kept", "Ready")
    stored = operator.objects("leaving/kept")
    assert stored
    operator.kubectl("delete", "namespace", "leaving", "--timeout=60s")
    assert operator.objects("leaving/kept") == stored
    events = json.loads(kubectl(operator.cluster, "-n", "default", "get", "events.events.k8s.io", "-o", "json").stdout)
    assert [
        (item["type"], item["reason"], item["note"])
        for item in events["items"]
        if item["regarding"].get("kind") == "Namespace" and item["regarding"]["name"] == "leaving"
    ] == [
        (
            "Warning",
            "DataKept",
            f"kept: s3://{BUCKET}/leaving/kept was left as it is, since a whole namespace is being deleted",
        )
    ]
    assert operator.stop() == 0
