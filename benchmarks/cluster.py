"""What does an artifact cost on a real node: seconds, API calls, memory; and does a restart of the operator lose a mover?

A whole node (kubelet, containerd, runc) runs on this machine, and so does an operator as a process, with the chart's rights
and no others. The pods are real: the image is the product's. API calls are counted by the API server (its audit log, by
user), not by the operator; times are taken from watches. Everything shares the machine's cores. Nothing is asserted.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bars import Bar
from kubernetes import client, watch
from operated import BenchmarkError, Key, Object, Operator, Watcher, connect, free_port, in_threads, run_process

import local_cluster as lc
from checkpoint_operator.api import names
from local_cluster.image import TAG, ensure_image
from local_cluster.operator_process import ACCOUNT, NAMESPACE, ROOT, install, kubectl, operator_command

RESULTS = ROOT / "benchmarks" / "results" / "cluster.json"
BUCKET, SPACE = "bench", "team"
OPERATOR = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
ROUNDS = 7
MOVER_USER = 65532
IDLE = 60.0
"""Seconds in which an operator that has nothing to do is looked at."""
TRAILING = 3.0
"""Seconds after Ready in which the last calls (an event, the Job's deletion) are awaited."""
SLOW_BYTES, SLOW_RATE = 16 << 20, 64 << 10
"""What a mover of the restart test has to do: four minutes, and hardly any CPU."""
WRITES = {"create", "update", "patch", "delete", "deletecollection"}


@dataclass(frozen=True)
class Audited:
    """An API server that writes down every request of the operator."""

    policy: Path
    log: Path

    @property
    def server_flags(self) -> tuple[str, ...]:
        return f"--audit-policy-file={self.policy}", f"--audit-log-path={self.log}"

    @classmethod
    def into(cls, folder: Path) -> "Audited":
        rules = [{"level": "Metadata", "users": [OPERATOR]}, {"level": "None"}]
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": rules}
        (folder / "audit.yaml").write_text(json.dumps(policy))
        return cls(policy=folder / "audit.yaml", log=folder / "audit.log")

    def calls(self) -> Counter[str]:
        """Requests so far, by verb and resource. A watch is one request, however long: it is left out."""
        found: Counter[str] = Counter()
        for line in self.log.read_text().splitlines():
            event = json.loads(line)
            if event["verb"] != "watch" and event["stage"] == "ResponseComplete":
                target = event.get("objectRef", {})
                parts = [target.get("resource", event["requestURI"]), target.get("subresource")]
                found[f"{event['verb']} {'/'.join(part for part in parts if part)}"] += 1
        return found


@dataclass(frozen=True)
class Place:
    """One node, one store, one namespace with a claim."""

    cluster: lc.NodeCluster
    store: lc.ObjectStore
    api: Any
    audit: Audited
    folder: Path

    @property
    def volume(self) -> Path:
        return self.cluster.volumes / "output"

    def save(self, name: str, size: int) -> None:
        """A checkpoint of one file in the claim, as the mover's user has it."""
        (self.volume / name).mkdir()
        (self.volume / name / "weights.bin").write_bytes(os.urandom(size))

    def create(self, key: Key, path: str, **mover: object) -> None:
        spec: Object = {
            "source": {"persistentVolumeClaim": {"claimName": "output"}, "path": path},
            "target": {
                "uri": f"s3://{BUCKET}/{key[0]}/{key[1]}",
                "endpoint": self.store.endpoint,
                "s3": {"forcePathStyle": True},
                "credentialsSecretRef": {"name": "keys"},
            },
        }
        if mover:
            spec["mover"] = mover
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": key[1]}, "spec": spec}
        self.api.create_namespaced_custom_object(names.GROUP, names.VERSION, key[0], names.PLURAL, body)

    def artifacts(self) -> dict[Key, Object]:
        answer = self.api.list_cluster_custom_object(names.GROUP, names.VERSION, names.PLURAL)
        return {(item["metadata"]["namespace"], item["metadata"]["name"]): item for item in answer["items"]}

    def jobs(self) -> dict[str, str]:
        """The uid of each mover's Job, by its name."""
        items = json.loads(kubectl(self.cluster, "get", "jobs", "-n", SPACE, "-o", "json").stdout)["items"]
        return {item["metadata"]["name"]: item["metadata"]["uid"] for item in items}

    def running_pods(self) -> int:
        command = ("get", "pods", "-n", SPACE, "--field-selector=status.phase=Running", "-o", "name")
        return len(kubectl(self.cluster, *command).stdout.split())


@contextmanager
def new_place() -> Iterator[Place]:
    archive = ensure_image(lambda text: print(f"  {text}", flush=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audit = Audited.into(folder)
        with (
            lc.start_node(nodes=1, name="bench", images=[archive], server_flags=audit.server_flags) as cluster,
            lc.start_object_store("bench", address=cluster.host_address) as store,
        ):
            store.client().create_bucket(Bucket=BUCKET)
            place = Place(cluster, store, connect(cluster), audit, folder)
            install(cluster)
            prepare(place)
            yield place


def prepare(place: Place) -> None:
    """The namespace of a user: a claim that is bound, and keys."""
    place.volume.mkdir()
    os.chown(place.volume, MOVER_USER, MOVER_USER)
    volume = {"accessModes": ["ReadWriteMany"], "storageClassName": "by-hand"}
    size = {"storage": "1Gi"}
    keys = {"AWS_ACCESS_KEY_ID": place.store.access_key, "AWS_SECRET_ACCESS_KEY": place.store.secret_key}
    bodies: list[Object] = [
        {"kind": "Namespace", "metadata": {"name": SPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
        {"kind": "Secret", "metadata": {"name": "keys", "namespace": SPACE}, "stringData": keys},
        {
            "kind": "PersistentVolume",
            "metadata": {"name": "output"},
            "spec": {**volume, "capacity": size, "hostPath": {"path": str(place.volume)}},
        },
        {
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "output", "namespace": SPACE},
            "spec": {**volume, "resources": {"requests": size}, "volumeName": "output"},
        },
    ]
    listed = {"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", **body} for body in bodies]}
    kubectl(place.cluster, "apply", "-f", "-", stdin=json.dumps(listed))
    kubectl(place.cluster, "wait", "--for=jsonpath={.status.phase}=Bound", "pvc/output", "-n", SPACE, "--timeout=60s")


@contextmanager
def run_operator(place: Place, *flags: str) -> Iterator[Operator]:
    rules = {
        "image": TAG,
        "imagePullPolicy": "Never",
        "allowedEndpoints": [place.store.endpoint],
        # So little that a hundred fit on a node of two cores.
        "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "512Mi"}},
    }
    (place.folder / "jobs.yaml").write_text(json.dumps(rules))
    port = free_port()
    more = ("--executor=job", f"--jobs-config={place.folder / 'jobs.yaml'}", f"--listen-address=127.0.0.1:{port}")
    command = operator_command(place.cluster, place.folder, [], *more, *flags)
    with run_process(command.argv, command.env, place.folder / "operator.log", port) as operator:
        operator.wait_healthy()
        yield operator


class PodWatch:
    """When watches showed each artifact's Job, and the start and the end of its mover."""

    def __init__(self, api: Any) -> None:
        self.job: dict[str, float] = {}
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        core, batch = client.CoreV1Api(api.api_client), client.BatchV1Api(api.api_client)
        for kind, see in ((core.list_namespaced_pod, self._pod), (batch.list_namespaced_job, self._job)):
            threading.Thread(target=self._follow, args=(kind, see), daemon=True).start()

    def _follow(self, kind: Callable[..., Any], see: Callable[[str, Object, float], None]) -> None:
        for event in watch.Watch().stream(kind, SPACE, timeout_seconds=24 * 3600, deserialize=False):
            body, now = event["object"], time.monotonic()
            name = body["metadata"].get("labels", {}).get(names.LABEL_ARTIFACT_NAME)
            if name:
                see(name, body, now)

    def _job(self, name: str, body: Object, now: float) -> None:
        self.job.setdefault(name, now)

    def _pod(self, name: str, body: Object, now: float) -> None:
        for container in body.get("status", {}).get("containerStatuses", []):
            if "running" in container["state"] or "terminated" in container["state"]:
                self.started.setdefault(name, now)
            if "terminated" in container["state"]:
                self.ended.setdefault(name, now)


def latency(place: Place) -> Iterator[Bar]:
    with run_operator(place) as operator, Watcher(place.api) as watcher:
        pods = PodWatch(place.api)
        operator.wait_quiet()
        took, shares, starts, calls = [], [], [], Counter[str]()
        for number in range(ROUNDS):
            key = (SPACE, f"idle-{number}")
            place.save(key[1], 1_000_000)
            before = place.audit.calls()
            created = time.monotonic()
            place.create(key, key[1])
            ready = watcher.wait_ready(key, operator)
            time.sleep(TRAILING)
            calls = place.audit.calls() - before
            took.append(ready - created)
            starts.append(pods.started[key[1]] - created)
            shares.append(pods.job[key[1]] - created + ready - pods.ended[key[1]])
            each = ", ".join(f"{count} {what}" for what, count in sorted(calls.items()))
            print(
                f"  round {number}: {took[-1]:.2f} s, operator {shares[-1]:.2f} s; {calls.total()} calls: {each}", flush=True
            )
        title = f"1 MB, idle node, median of {ROUNDS}: "
        yield Bar(title + "creation to Ready", statistics.median(took), "s", 6)
        yield Bar(title + "creation to mover running", statistics.median(starts), "s")
        yield Bar(title + "of it the operator's", statistics.median(shares), "s", 0.5)
        progress = calls["get pods/log"]
        yield Bar("API calls of the operator for the last one, without progress", calls.total() - progress, "", 8)
        operator.wait_quiet()
        before = place.audit.calls()
        share = operator.cpu_share(IDLE)
        calls = place.audit.calls() - before
        yield Bar(
            f"idle for {IDLE:g} s: API writes", sum(n for what, n in calls.items() if what.split()[0] in WRITES), "", 0
        )
        yield Bar("idle, share of a core", 100 * share, "%", 1)
        yield Bar("idle, operator's RSS", operator.resident_mb(), "MB", 120)


def restart(place: Place, total: int, running: int) -> Iterator[Bar]:
    flags = (f"--max-movers={running}", f"--max-movers-per-namespace={running}")
    place.save("slow", SLOW_BYTES)
    keys = [(SPACE, f"slow-{number:04}") for number in range(total)]
    with run_operator(place, *flags) as operator:
        in_threads(lambda key: place.create(key, "slow", maxBytesPerSecond=SLOW_RATE), keys, "created")
        wait_until(lambda: place.running_pods() >= running, operator, 900, f"{running} movers to run")
        print(f"  {running} movers run", flush=True)
        yield Bar(f"{total} in flight: operator's peak RSS", operator.peak_mb(), "MB", 250)
        operator.process.send_signal(signal.SIGKILL)
        operator.process.wait()
    before = place.jobs()
    mine = {key for key, item in place.artifacts().items() if item.get("status", {}).get("mover", {}).get("name") in before}
    with run_operator(place, *flags) as operator, Watcher(place.api) as watcher:
        watcher.ended.update(dict.fromkeys((key for key in mine if is_ready(place, key)), 0.0))
        lost = watcher.wait(mine, operator, 900, say=True)
        found = place.artifacts()
        twice = [key for key in mine if found[key]["status"].get("launches") != 1]
        title = f"SIGKILL of the operator, {len(before)} movers running: "
        yield Bar(title + "not Ready after", len(lost), "", 0)
        yield Bar(title + "started twice", len(twice), "", 0)


def is_ready(place: Place, key: Key) -> bool:
    return bool(place.artifacts()[key].get("status", {}).get("phase") == "Ready")


def wait_until(ready: Callable[[], bool], operator: Operator, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        operator.check()
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {seconds:g} s for {what}: {operator.log.read_text()[-2000:]}")
        time.sleep(1.0)


def save(bars: list[Bar]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    document = {"cores": os.cpu_count(), "bars": [asdict(bar) | {"verdict": bar.verdict} for bar in bars]}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=int, default=1000, help="in flight when the operator is killed")
    parser.add_argument("--running", type=int, default=100, help="of them with a mover that runs")
    parser.add_argument("--only", choices=["latency", "restart"], action="append", help="default: both")
    arguments = parser.parse_args()
    measurements: dict[str, Callable[[Place], Iterator[Bar]]] = {
        "latency": latency,
        "restart": lambda place: restart(place, arguments.artifacts, arguments.running),
    }
    bars: list[Bar] = []
    complete = True
    for name in arguments.only or measurements:
        print(f"{name}:", flush=True)
        try:
            with new_place() as place:
                bars.extend(measurements[name](place))
        except (BenchmarkError, lc.LocalClusterError) as error:
            complete = False
            print(f"{name}: not measured: {error}", file=sys.stderr)
        save(bars)
    print("\n".join(bar.row() for bar in bars))
    return 0 if complete else 1


if __name__ == "__main__":
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the node is stopped
    sys.exit(main())
