"""Does the operator keep its promises about time, memory and API writes, on a real API server and as its own process?

Three measurements, each with a control plane, a store and an operator of its own: ``latency`` (one artifact on an idle
operator), ``burst`` (many at once) and ``start`` (an operator that starts among many finished ones). Times are taken from a
watch; API writes are what the API server counted (``apiserver_request_total``), not what the operator says. The control
plane, the movers and this program share the machine's cores with the operator. Nothing is asserted.
"""

import argparse
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bars import Bar
from kubernetes import client, config, watch

import local_cluster as lc
from checkpoint_operator.api import names
from local_cluster.operator_process import ROOT, install, kubectl, operator_command

SAMPLE = ROOT / "tests" / "checkpoints" / "dpo-lora" / "checkpoint-2"
RESULTS = ROOT / "benchmarks" / "results" / "controller.json"
BUCKET = "bench"
NAMESPACES = ("team-0", "team-1", "team-2", "team-3")
FLAGS = ("--max-movers=4", "--max-movers-per-namespace=4")
WRITE_VERBS = {"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"}
THREADS = 16
"""Requests that this program makes at once."""
LATENCY_ROUNDS = 5
PROGRESS = 10.0
HEALTH_EVERY, HEALTH_TIMEOUT = 0.2, 5.0
TRAILING = 1.0
"""Seconds after Ready in which the last writes (an event) are awaited."""
IDLE = 20.0
QUIET_SHARE, QUIET_MAX = 0.05, 60.0
"""An operator that uses less of a core for a second has worked off its start; after so many seconds we wait no longer."""

Key = tuple[str, str]
Object = dict[str, Any]


class BenchmarkError(Exception):
    """There is nothing to measure: the operator died, or an artifact did not become Ready."""


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


def connect(cluster: lc.Cluster) -> Any:
    """A client with a connection for each thread."""
    configuration = client.Configuration()
    config.load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
    configuration.connection_pool_maxsize = 2 * THREADS
    return client.CustomObjectsApi(client.ApiClient(configuration))


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


@dataclass(frozen=True)
class Operator:
    """The operator's process, seen from outside."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def check(self) -> None:
        if self.process.poll() is not None:
            said = self.log.read_text()[-2000:]
            raise BenchmarkError(f"the operator ended with status {self.process.returncode}: {said}")

    def peak_mb(self) -> float:
        """Peak resident memory of the operator alone, without its movers."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024 / 1e6

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def cpu_share(self, seconds: float) -> float:
        """The part of a core that is used in the next seconds."""
        before, started = self.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / (time.monotonic() - started)

    def healthy(self) -> bool:
        """Whether the liveness probe is answered, over a connection of its own as the kubelet's is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HEALTH_TIMEOUT)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def wait_healthy(self) -> None:
        while not self.healthy():
            self.check()
            time.sleep(0.05)

    def wait_quiet(self) -> float:
        """Seconds until the operator does nothing (or until we wait no longer)."""
        started = time.monotonic()
        while time.monotonic() - started < QUIET_MAX and self.cpu_share(1.0) > QUIET_SHARE:
            self.check()
        return time.monotonic() - started


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def run_operator(place: Place) -> Iterator[Operator]:
    port = free_port()
    flags = (*FLAGS, f"--listen-address=127.0.0.1:{port}")
    command = operator_command(place.cluster, place.folder, place.claims(), *flags)
    with place.log.open("ab") as log:
        process = subprocess.Popen(command.argv, env={**command.env, "PATH": os.environ["PATH"]}, stdout=log, stderr=log)
    try:
        yield Operator(process, port, place.log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Watcher:
    """When a watch showed each artifact Ready or Failed, and how often it changed."""

    def __init__(self, place: Place) -> None:
        self.ended: dict[Key, float] = {}
        self.failed: set[Key] = set()
        self.changes: Counter[Key] = Counter()
        self._api = place.api
        self._watch = watch.Watch()
        self._news = threading.Condition()
        self._closed = False
        newest = place.api.list_cluster_custom_object(names.GROUP, names.VERSION, names.PLURAL, limit=1)
        self._version = newest["metadata"]["resourceVersion"]
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed = True
        self._watch.stop()

    def _follow(self) -> None:
        events = self._watch.stream(
            self._api.list_cluster_custom_object,
            names.GROUP,
            names.VERSION,
            names.PLURAL,
            resource_version=self._version,
            timeout_seconds=24 * 3600,
            deserialize=False,
        )
        try:
            for event in events:
                self._saw(event["type"], event["object"], time.monotonic())
        except Exception:
            if not self._closed:  # whoever waits runs into its deadline
                raise

    def _saw(self, kind: str, body: Object, now: float) -> None:
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        phase = body.get("status", {}).get("phase")
        with self._news:
            self.changes[key] += kind == "MODIFIED"
            if phase in ("Ready", "Failed") and key not in self.ended:
                self.ended[key] = now
                if phase == "Failed":
                    self.failed.add(key)
                self._news.notify_all()

    def wait(self, keys: Collection[Key], operator: Operator, seconds: float, *, say: bool = False) -> set[Key]:
        """Those of the artifacts that are not Ready: they failed, or it took too long."""
        started = reported = time.monotonic()
        with self._news:
            while open_keys := set(keys) - self.ended.keys():
                self._news.wait(1.0)
                operator.check()
                now = time.monotonic()
                if now - started > seconds:
                    break
                if say and now - reported >= PROGRESS:
                    reported = now
                    print(f"  {now - started:4.0f} s: {len(keys) - len(open_keys)} of {len(keys)} have ended", flush=True)
            return open_keys | (self.failed & set(keys))

    def wait_ready(self, key: Key, operator: Operator, seconds: float = 60) -> float:
        """The moment at which this artifact was Ready."""
        if self.wait([key], operator, seconds):
            raise BenchmarkError(f"{'/'.join(key)} is not Ready after {seconds:g} s: {operator.log.read_text()[-2000:]}")
        return self.ended[key]


class HealthPoll:
    """Asks for the liveness probe all the time, as an impatient kubelet would."""

    def __init__(self, operator: Operator) -> None:
        self.times: list[float] = []
        self.failures = 0
        self._operator = operator
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "HealthPoll":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._end.wait(HEALTH_EVERY):
            started = time.monotonic()
            self.failures += not self._operator.healthy()
            self.times.append(time.monotonic() - started)


def in_threads(action: Callable[[Key], None], keys: Collection[Key], what: str) -> None:
    started = reported = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for number, _ in enumerate(pool.map(action, keys), 1):
            if time.monotonic() - reported >= PROGRESS:
                reported = time.monotonic()
                print(f"  {reported - started:4.0f} s: {number} of {len(keys)} {what}", flush=True)
    print(f"  {len(keys)} {what} in {time.monotonic() - started:.1f} s", flush=True)


def percentile(values: Collection[float], part: float) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


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
    with new_place() as place, run_operator(place) as operator, Watcher(place) as watcher:
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
    with new_place() as place, run_operator(place) as operator, Watcher(place) as watcher:
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
    with run_operator(place) as operator, Watcher(place) as watcher:
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
        with Watcher(place) as watcher:
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
