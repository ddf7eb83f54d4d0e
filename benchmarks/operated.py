"""The operator's process and its artifacts as a benchmark sees them: from outside, by watches and the kernel's counts."""

import http.client
import math
import os
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kubernetes import client, config, watch

import local_cluster as lc
from checkpoint_operator.api import names

THREADS = 16
"""Requests that a benchmark makes at once."""
PROGRESS = 10.0
HEALTH_EVERY, HEALTH_TIMEOUT = 0.2, 5.0
QUIET_SHARE, QUIET_MAX = 0.05, 60.0
"""An operator that uses less of a core for a second has worked off its start; after so many seconds we wait no longer."""

Key = tuple[str, str]
Object = dict[str, Any]


class BenchmarkError(Exception):
    """There is nothing to measure: the operator died, or an artifact did not become Ready."""


def connect(cluster: lc.Cluster) -> Any:
    """A client with a connection for each thread."""
    configuration = client.Configuration()
    config.load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
    configuration.connection_pool_maxsize = 2 * THREADS
    return client.CustomObjectsApi(client.ApiClient(configuration))


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
        return self._memory("VmHWM")

    def resident_mb(self) -> float:
        """Its resident memory now."""
        return self._memory("VmRSS")

    def _memory(self, name: str) -> float:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
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
def run_process(argv: Sequence[str], env: Mapping[str, str], log: Path, port: int) -> Iterator[Operator]:
    """An operator that listens on this port, until the end of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(argv, env={**env, "PATH": os.environ["PATH"]}, stdout=output, stderr=output)
    try:
        yield Operator(process, port, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Watcher:
    """When a watch showed each artifact Ready or Failed, and how often it changed."""

    def __init__(self, api: Any) -> None:
        self.ended: dict[Key, float] = {}
        self.failed: set[Key] = set()
        self.changes: Counter[Key] = Counter()
        self._api = api
        self._watch = watch.Watch()
        self._news = threading.Condition()
        self._closed = False
        newest = api.list_cluster_custom_object(names.GROUP, names.VERSION, names.PLURAL, limit=1)
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
