"""What the operator can be asked for in numbers. It is told what happened; it decides nothing, and asks nobody.

Labels come from closed lists (phases, reasons, verbs, resources, status codes), never from what users write: a thousand
namespaces must not become a thousand time series.
"""

import re
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import FAILURES
from checkpoint_operator.api.protocol import Operation
from checkpoint_operator.api.status import ArtifactStatus, Phase
from checkpoint_operator.controller.scheduling import Hindrance, Key, Limits, Places

PREFIX = "checkpoint_operator"
# From a kilobyte on an idle cluster to terabytes behind a queue.
_SECONDS = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400)
_RECONCILE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_PATH = re.compile(
    r"/(?:api|apis/[^/]+)/[^/]+(?:/namespaces/[^/]+(?=/))?"
    r"/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[a-z]+))?$"
)


class Metrics:
    """One object for one registry; every method is one thing that happened."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._movers: dict[Key, tuple[datetime, Operation]] = {}
        self._stored = Counter(
            f"{PREFIX}_moved_bytes", "Bytes that movers settled in stores, sent or found there.", registry=registry
        )
        self._finished = Counter(
            f"{PREFIX}_artifacts_finished", "Artifacts that became Ready or Failed.", ("phase", "reason"), registry=registry
        )
        self._retries = Counter(
            f"{PREFIX}_retries", "Failures after which a mover is tried again.", ("operation", "reason"), registry=registry
        )
        self._deletions = Counter(
            f"{PREFIX}_deletions",
            "Artifacts that were let go, and why.",
            ("reason",),
            registry=registry,
        )
        self._starts = Counter(f"{PREFIX}_mover_starts", "Movers that were started.", ("operation",), registry=registry)
        self._durations = Histogram(
            f"{PREFIX}_artifact_duration_seconds", "From creation to Ready.", buckets=_SECONDS, registry=registry
        )
        self._runs = Histogram(
            f"{PREFIX}_mover_duration_seconds",
            "From a mover's start to its recorded end.",
            ("operation",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._reconciles = Histogram(
            f"{PREFIX}_reconcile_seconds", "One look at one artifact.", buckets=_RECONCILE_SECONDS, registry=registry
        )
        self._errors = Counter(f"{PREFIX}_reconcile_errors", "Looks that ended in an error.", ("kind",), registry=registry)
        self._calls = Counter(
            f"{PREFIX}_api_requests",
            "Requests to the Kubernetes API; code 0: no answer. The watches are not among them.",
            ("verb", "resource", "code"),
            registry=registry,
        )
        self._limits_valid = Gauge(
            f"{PREFIX}_limits_file_valid",
            "1: the limits file is good; 0: the last good one holds.",
            registry=registry,
        )
        self._limits_valid.set(1)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A counter that appears with its first count shows no increase then, and an alert would miss the first failure."""
        for operation in Operation:
            self._starts.labels(operation)
            self._runs.labels(operation)
            for reason in FAILURES:
                self._retries.labels(operation, reason)
        for reason in FAILURES:
            self._finished.labels(Phase.FAILED, reason)
        for kind in ("Conflict", "API", "Bug"):
            self._errors.labels(kind)

    def called(self, method: str, url: str, code: int) -> None:
        """A request to the API server was answered; code 0: it was not."""
        verb, resource = _verb_and_resource(method, url)
        self._calls.labels(verb, resource, str(code)).inc()

    def reconciling(self) -> AbstractContextManager[object]:
        """For the time of one look at one artifact."""
        timing: AbstractContextManager[object] = self._reconciles.time()
        return timing

    def failed_to_reconcile(self, kind: str) -> None:
        """``kind``: Conflict, API or Bug."""
        self._errors.labels(kind).inc()

    def limits_file(self, valid: bool) -> None:
        self._limits_valid.set(int(valid))

    def started(self, key: Key, operation: Operation, now: datetime) -> None:
        """A mover of this artifact was started."""
        self._starts.labels(operation).inc()
        self._movers[key] = now, operation

    def ended(self, key: Key, now: datetime) -> None:
        """It is no longer running. One that another operator started is not timed."""
        if known := self._movers.pop(key, None):
            since, operation = known
            self._runs.labels(operation).observe((now - since).total_seconds())

    def wrote(self, artifact: CheckpointArtifact, after: ArtifactStatus, now: datetime) -> None:
        """The status of an artifact was changed to this; all that it tells is in the difference."""
        before = artifact.status
        self._stored.inc(max(0, _settled(after) - _settled(before)))
        if after.retries > before.retries and after.failure and after.phase in (Phase.WAITING, Phase.DELETING):
            operation = Operation.DELETE if after.phase == Phase.DELETING else Operation.UPLOAD
            self._retries.labels(operation, after.failure.reason).inc()
        if after.phase == before.phase:
            return
        if after.phase == Phase.READY:
            self._finished.labels(Phase.READY, "Committed").inc()
            self._durations.observe(max(0.0, (now - artifact.metadata.creation_timestamp).total_seconds()))
        elif after.phase == Phase.FAILED:
            self._finished.labels(Phase.FAILED, after.failure.reason if after.failure else "").inc()

    def let_go(self, reason: str) -> None:
        """The finalizer was taken off."""
        self._deletions.labels(reason).inc()


def _settled(status: ArtifactStatus) -> int:
    return (status.progress.bytes_done or 0) if status.progress else 0


def _verb_and_resource(method: str, url: str) -> tuple[str, str]:
    """As the API server's own metrics name them; what is no resource (a login, a version) is "other"."""
    found = _PATH.search(url.partition("?")[0])
    if found is None:
        return method.lower(), "other"
    resource = found["resource"] + (f"/{found['sub']}" if found["sub"] else "")
    verbs = {"GET": "get" if found["name"] else "list", "POST": "create", "PUT": "update"}
    return verbs.get(method, method.lower()), resource


class StateCollector(Collector):
    """What is true at the moment of the question, counted then. Called from another thread than the operator's loop.

    ``phases`` counts the artifacts by phase; ``keys`` is how many keys wait for a worker or are being worked on;
    ``heard`` is how many seconds ago the cluster was last heard of.
    """

    def __init__(
        self,
        places: Places,
        phases: Callable[[], Mapping[str, int]],
        keys: Callable[[], int],
        heard: Callable[[], float],
    ) -> None:
        self._places = places
        self._phases = phases
        self._keys = keys
        self._heard = heard

    def describe(self) -> list[Metric]:
        return []  # a registry that asks for names must not ask for the cluster

    def collect(self) -> Iterator[Metric]:
        phases = self._phases()
        yield _gauge("artifacts", "Artifacts by phase.", "phase", {phase: phases.get(phase, 0) for phase in Phase})
        reasons = self._places.reasons()
        yield _gauge(
            "queue_length", "Artifacts that wait for a mover.", "reason", {why: reasons.get(why, 0) for why in Hindrance}
        )
        yield GaugeMetricFamily(f"{PREFIX}_movers_running", "Movers that have a place.", self._places.running)
        yield _gauge("movers_limit", "How many movers may run at once.", "scope", _caps(self._places.limits))
        yield GaugeMetricFamily(f"{PREFIX}_work_queue_length", "Artifacts that are about to be looked at.", self._keys())
        yield GaugeMetricFamily(
            f"{PREFIX}_watch_age_seconds", "Since an event or a listing last came from the API server.", self._heard()
        )


def _caps(limits: Limits) -> Mapping[str, int]:
    return {"cluster": limits.total, "namespace": limits.per_namespace, "bucket": limits.per_bucket}


def _gauge(name: str, help_text: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", help_text, labels=(label,))
    for value, count in values.items():
        family.add_metric((str(value),), count)
    return family


def by_phase(statuses: Iterable[Mapping[str, object]]) -> Mapping[str, int]:
    """How many artifacts are in which phase; one that nobody has looked at yet is Pending."""
    return Tally(str(status.get("phase") or Phase.PENDING) for status in statuses)
