"""Does the operator keep its promises about time, memory and API writes, on a real API server and as its own process?

Three measurements, each with a control plane, a store and an operator of its own: ``latency`` (one artifact on an idle
operator), ``burst`` (many at once) and ``start`` (an operator that starts among many finished ones). Times are taken from a
watch; API writes are what the API server counted (``apiserver_request_total``), not what the operator says. The control
plane, the movers and this program share the machine's cores with the operator. Nothing is asserted.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bars import Bar
from operated import (
    BenchmarkError,
    HealthPoll,
    Key,
    Object,
    Operator,
    Watcher,
    connect,
    free_port,
    in_threads,
    percentile,
    run_process,
)

import local_cluster as lc
from checkpoint_operator.api import names
from local_cluster.operator_process import ROOT, install, kubectl, operator_command

SAMPLE = ROOT / "tests" / "checkpoints" / "dpo-lora" / "checkpoint-2"
RESULTS = ROOT / "benchmarks" / "results" / "controller.json"
BUCKET = "bench"
NAMESPACES = ("team-0", "team-1", "team-2", "team-3")
FLAGS = ("--max-movers=4", "--max-movers-per-namespace=4")
WRITE_VERBS = {"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"}
LATENCY_ROUNDS = 5
TRAILING = 1.0
"""Seconds after Ready in which the last writes (an event) are awaited."""
IDLE = 20.0


@dataclass(frozen=True)
class Place:
    """Where one measurement happens."""

    cluster: lc.Cluster
    store: lc.ObjectStore
    api: Any
    folder: Path

    @property
    def volume(self) -> Path:
        return self.folder / "volume"

    @property
    def log(self) -> Path:
        return self.folder / "operator.log"

    def claims(self) -> list[Object]:
        target = {
            "prefix": f"s3://{BUCKET}",
            "endpoint": self.store.endpoint,
            "forcePathStyle": True,
            "credentialsDirectory": str(self.folder / "keys"),
        }
        return [
            {"namespace": namespace, "claim": "output", "directory": str(self.volume), "targets": [target]}
            for namespace in NAMESPACES
        ]

    def create(self, key: Key, *, finalizers: tuple[str, ...] = ()) -> Object:
        """Create an artifact for the folder of the same name."""
        namespace, name = key
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name, "finalizers": list(finalizers)},
            "spec": {
                "source": {"persistentVolumeClaim": {"claimName": "output"}, "path": name},
                "target": {"uri": f"s3://{BUCKET}/{namespace}/{name}"},
            },
        }
        made: Object = self.api.create_namespaced_custom_object(names.GROUP, names.VERSION, namespace, names.PLURAL, body)
        return made

    def get(self, key: Key) -> Object:
        found: Object = self.api.get_namespaced_custom_object(names.GROUP, names.VERSION, key[0], names.PLURAL, key[1])
        return found

    def artifacts(self) -> list[Object]:
        answer = self.api.list_cluster_custom_object(names.GROUP, names.VERSION, names.PLURAL)
        items: list[Object] = answer["items"]
        return items

    def writes(self) -> int:
        """Writes of artifacts, their status and events that the API server has counted; refused ones are counted too."""
        total = 0.0
        for line in kubectl(self.cluster, "get", "--raw", "/metrics").stdout.splitlines():
            if line.startswith("apiserver_request_total{"):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
                if labels["verb"] in WRITE_VERBS and labels["resource"] in (names.PLURAL, "events"):
                    total += float(line.rpartition(" ")[2])
        return int(total)

    def events(self, key: Key) -> int:
        answer = kubectl(self.cluster, "get", "events.events.k8s.io", "-n", key[0], "-o", "json").stdout
        return sum(item["regarding"]["name"] == key[1] for item in json.loads(answer)["items"])

    def markers(self) -> int:
        """How many checkpoints the store holds."""
        pages = self.store.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return sum(item["Key"].endswith(f"/{names.MARKER_NAME}") for page in pages for item in page.get("Contents", []))


@contextmanager
def new_place() -> Iterator[Place]:
    with (
        tempfile.TemporaryDirectory() as name,
        lc.start("bench") as cluster,
        lc.start_object_store("bench") as store,
    ):
        place = Place(cluster, store, connect(cluster), Path(name))
        place.volume.mkdir()
        keys = place.folder / "keys"
        keys.mkdir()
        (keys / "AWS_ACCESS_KEY_ID").write_text(store.access_key)
        (keys / "AWS_SECRET_ACCESS_KEY").write_text(store.secret_key)
        store.client().create_bucket(Bucket=BUCKET)
        install(cluster)
        for namespace in NAMESPACES:
            kubectl(cluster, "create", "namespace", namespace)
        yield place


@contextmanager
def run_operator(place: Place) -> Iterator[Operator]:
    port = free_port()
    flags = (*FLAGS, f"--listen-address=127.0.0.1:{port}")
    command = operator_command(place.cluster, place.folder, place.claims(), *flags)
    with run_process(command.argv, command.env, place.log, port) as operator:
        yield operator


def one_artifact(place: Place, operator: Operator, watcher: Watcher, key: Key) -> tuple[float, int]:
    """Seconds from creation to Ready of the sample checkpoint, and the API writes of others than us."""
    shutil.copytree(SAMPLE, place.volume / key[1])
    before = place.writes()
    place.create(key)
    created = time.monotonic()
    took = watcher.wait_ready(key, operator) - created
    time.sleep(TRAILING)
    return took, place.writes() - before - 1


def latency() -> Iterator[Bar]:
    with new_place() as place, run_operator(place) as operator, Watcher(place.api) as watcher:
        operator.wait_healthy()
        operator.wait_quiet()
        runs = []
        for number in range(LATENCY_ROUNDS):
            runs.append(one_artifact(place, operator, watcher, (NAMESPACES[0], f"idle-{number}")))
            print(f"  round {number}: {runs[-1][0]:.2f} s, {runs[-1][1]} writes", flush=True)
        yield Bar(f"creation to Ready, idle operator, median of {len(runs)}", statistics.median(t for t, _ in runs), "s", 3)
        yield Bar("creation to Ready, idle operator, slowest", max(t for t, _ in runs), "s")
        yield Bar("API writes for one artifact, most", max(writes for _, writes in runs), "", 6)


def make_burst(place: Place, count: int) -> list[Key]:
    """Checkpoints of 1 KB, each with content of its own."""
    keys = [(NAMESPACES[number % len(NAMESPACES)], f"burst-{number:05}") for number in range(count)]
    for _, name in keys:
        (place.volume / name).mkdir()
        (place.volume / name / "weights.bin").write_bytes(os.urandom(1024))
    return keys


def burst(count: int) -> Iterator[Bar]:
    title = f"burst of {count}: "
    with new_place() as place, run_operator(place) as operator, Watcher(place.api) as watcher:
        operator.wait_healthy()
        operator.wait_quiet()
        keys = make_burst(place, count)
        created: dict[Key, float] = {}

        def create(key: Key) -> None:
            place.create(key)
            created[key] = time.monotonic()

        writes, cpu, started = place.writes(), operator.cpu_seconds(), time.monotonic()
        with HealthPoll(operator) as health:
            in_threads(create, keys, "created")
            lost = watcher.wait(keys, operator, 120 + 2 * count, say=True)
        took, cpu = time.monotonic() - started, operator.cpu_seconds() - cpu
        time.sleep(TRAILING)
        writes = place.writes() - writes - count
        yield from burst_outcome(place, title, keys, lost)
        yield Bar(title + "operator's peak RSS", operator.peak_mb(), "MB", 250)
        yield Bar(title + f"slowest of {len(health.times)} health answers", max(health.times), "s", 0.5)
        yield Bar(title + "health requests without a 200", health.failures, "", 0)
        waits = [watcher.ended[key] - created[key] for key in keys if key not in lost]
        if waits:
            yield Bar(title + "creation to Ready, p50", percentile(waits, 0.5), "s")
            yield Bar(title + "creation to Ready, p99", percentile(waits, 0.99), "s")
        yield Bar(title + "first creation to last Ready", took, "s")
        yield Bar(title + "API writes for one artifact, mean", writes / count)
        yield Bar(title + "operator's CPU time for one artifact", 1000 * cpu / count, "ms")


def burst_outcome(place: Place, title: str, keys: list[Key], lost: set[Key]) -> Iterator[Bar]:
    found = {(item["metadata"]["namespace"], item["metadata"]["name"]): item for item in place.artifacts()}
    once = sum(key in found and found[key].get("status", {}).get("launches") == 1 for key in keys)
    yield Bar(title + "artifacts that are not Ready", len(lost | (set(keys) - found.keys())), "", 0)
    yield Bar(title + "artifacts without a checkpoint in the store", len(keys) - place.markers(), "", 0)
    yield Bar(title + "artifacts without exactly one launch", len(keys) - once, "", 0)


def real_status(place: Place) -> Object:
    """An artifact as the operator finishes it."""
    key = (NAMESPACES[0], "template")
    with run_operator(place) as operator, Watcher(place.api) as watcher:
        operator.wait_healthy()
        one_artifact(place, operator, watcher, key)
        return place.get(key)


def make_finished(place: Place, template: Object, count: int) -> None:
    """Artifacts that look as if the operator had finished them long ago."""
    text = json.dumps(template["status"])
    (namespace, name), uid = (NAMESPACES[0], template["metadata"]["name"]), template["metadata"]["uid"]

    def make(key: Key) -> None:
        made = place.create(key, finalizers=(names.FINALIZER,))
        status = text.replace(f"{namespace}/{name}", "/".join(key)).replace(uid, made["metadata"]["uid"])
        place.api.patch_namespaced_custom_object_status(
            names.GROUP, names.VERSION, key[0], names.PLURAL, key[1], {"status": json.loads(status.replace(name, key[1]))}
        )

    keys = [(NAMESPACES[number % len(NAMESPACES)], f"finished-{number:05}") for number in range(count)]
    in_threads(make, keys, "finished artifacts made")


def start(count: int) -> Iterator[Bar]:
    with new_place() as place:
        make_finished(place, real_status(place), count)
        key = (NAMESPACES[1], "new")
        shutil.copytree(SAMPLE, place.volume / key[1])
        before = place.writes()
        with Watcher(place.api) as watcher:
            started = time.monotonic()
            with run_operator(place) as operator:
                place.create(key)
                took = watcher.wait_ready(key, operator, 180) - started
                quiet = operator.wait_quiet()
                after = place.writes()
                mine = 1 + watcher.changes[key] + place.events(key)
                share = operator.cpu_share(IDLE)
                title = f"start with {count} finished: "
                yield Bar(title + "start to Ready of a new one", took, "s", 15, 8)
                yield Bar(title + "until quiet after that", quiet, "s")
                yield Bar(title + "operator's peak RSS", operator.peak_mb(), "MB", 280, 200)
                yield Bar(title + "API writes for the old ones", after - before - mine, "", 0)
                yield Bar(title + f"API writes in {IDLE:g} idle seconds", place.writes() - after, "", 0)
                yield Bar(title + "idle, share of a core", 100 * share, "%", 1)


def save(bars: list[Bar], arguments: argparse.Namespace) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    document = {
        "cores": os.cpu_count(),
        "flags": FLAGS,
        "artifacts": arguments.artifacts,
        "finished": arguments.finished,
        "bars": [asdict(bar) | {"verdict": bar.verdict} for bar in bars],
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=int, default=1000, help="how many are created at once")
    parser.add_argument("--finished", type=int, default=10000, help="how many are there when the operator starts")
    parser.add_argument("--only", choices=["latency", "burst", "start"], action="append", help="default: all of them")
    arguments = parser.parse_args()
    measurements: dict[str, Callable[[], Iterator[Bar]]] = {
        "latency": latency,
        "burst": lambda: burst(arguments.artifacts),
        "start": lambda: start(arguments.finished),
    }
    bars: list[Bar] = []
    complete = True
    for name in arguments.only or measurements:
        print(f"{name}:", flush=True)
        try:
            bars.extend(measurements[name]())
        except (BenchmarkError, lc.LocalClusterError) as error:
            complete = False
            print(f"{name}: not measured: {error}", file=sys.stderr)
        save(bars, arguments)
    print(f"\n{os.cpu_count()} cores, operator with {' '.join(FLAGS)}")
    print("\n".join(bar.row() for bar in bars))
    return 0 if complete else 1


if __name__ == "__main__":
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the operator is stopped
    sys.exit(main())
