"""The operator's numbers: each says what its name says, and no user can make a new time series."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from checkpoint_operator.api.artifact import CheckpointArtifact, parse_artifact
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation, Progress, Stored
from checkpoint_operator.api.status import ArtifactStatus, MoverStatus
from checkpoint_operator.controller import status as say
from checkpoint_operator.controller.metrics import Metrics, StateCollector, by_phase
from checkpoint_operator.controller.scheduling import Demand, Limits, Places

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
MOVER = MoverStatus.model_validate({"kind": "Job", "name": "m", "operation": "Upload"})
STORED = Stored(
    storage_uri="s3://b/c", size_bytes=2048, file_count=2, manifest_digest="m", content_digest="c", data_owner=True
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def artifact(status: ArtifactStatus | None = None) -> CheckpointArtifact:
    made = parse_artifact(
        {
            "metadata": {
                "name": "c",
                "namespace": "ns",
                "uid": "u",
                "resourceVersion": "1",
                "generation": 1,
                "creationTimestamp": "2026-11-24T11:59:00Z",
                "finalizers": [],
            },
            "spec": {
                "source": {"persistentVolumeClaim": {"claimName": "v"}, "path": "c"},
                "target": {"uri": "s3://b/c"},
            },
        }
    )
    return made.replace(status=status) if status else made


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"checkpoint_operator_{name}", labels)


def follow(metrics: Metrics, *steps: Any) -> ArtifactStatus:
    """Let the status go through these steps, and tell the metrics of each write but the first (the start)."""
    status = say.started(artifact(), MOVER, NOW)
    for step in steps:
        seen = artifact(status)
        status = step(seen)
        metrics.wrote(seen, status, NOW)
    return status


def progress(done: int) -> Any:
    return lambda seen: say.progressed(seen, Progress(bytes_done=done, bytes_total=2048, files_done=0, files_total=2), NOW)


def test_an_upload_counts_its_bytes_once_and_its_way_from_creation_to_ready(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    follow(metrics, progress(500), progress(1500), lambda seen: say.ready(seen, STORED, NOW))
    assert value(registry, "moved_bytes_total") == 2048
    assert value(registry, "artifacts_finished_total", phase="Ready", reason="Committed") == 1
    assert value(registry, "artifact_duration_seconds_sum") == 60
    assert value(registry, "artifact_duration_seconds_count") == 1


def test_a_retry_is_counted_by_its_reason_and_its_bytes_are_not_taken_back(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    failure = Failure(reason=Reason.STORE_UNAVAILABLE, message="away")
    waits = follow(metrics, progress(500), lambda seen: say.waiting(seen, failure, NOW, NOW, counts=False))
    assert value(registry, "retries_total", operation="Upload", reason="StoreUnavailable") == 1
    metrics.wrote(artifact(waits), say.started(artifact(waits), MOVER, NOW), NOW)
    assert value(registry, "moved_bytes_total") == 500
    assert value(registry, "retries_total", operation="Upload", reason="StoreUnavailable") == 1


def test_a_failure_is_counted_once_however_often_its_status_is_written(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    failure = Failure(reason=Reason.CREDENTIALS_REFUSED, message="no")
    failed = follow(metrics, lambda seen: say.failed(seen, failure, NOW, counts=True))
    metrics.wrote(artifact(failed), failed, NOW)
    assert value(registry, "artifacts_finished_total", phase="Failed", reason="CredentialsRefused") == 1


def test_a_mover_is_timed_from_its_start_to_its_end_and_one_of_an_earlier_operator_is_not(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    metrics.started(("ns", "c"), Operation.UPLOAD, NOW)
    metrics.ended(("ns", "c"), NOW + timedelta(seconds=7))
    metrics.ended(("ns", "c"), NOW + timedelta(seconds=9))
    metrics.ended(("ns", "other"), NOW)
    assert value(registry, "mover_starts_total", operation="Upload") == 1
    assert value(registry, "mover_duration_seconds_sum", operation="Upload") == 7
    assert value(registry, "mover_duration_seconds_count", operation="Upload") == 1


@pytest.mark.parametrize(
    ("method", "path", "verb", "resource"),
    [
        ("GET", "/apis/checkpoints.rlhf.dev/v1alpha1/checkpointartifacts?limit=100", "list", "checkpointartifacts"),
        ("GET", "/apis/checkpoints.rlhf.dev/v1alpha1/namespaces/a/checkpointartifacts", "list", "checkpointartifacts"),
        ("GET", "/apis/checkpoints.rlhf.dev/v1alpha1/namespaces/a/checkpointartifacts/x", "get", "checkpointartifacts"),
        (
            "PATCH",
            "/apis/checkpoints.rlhf.dev/v1alpha1/namespaces/a/checkpointartifacts/x/status",
            "patch",
            "checkpointartifacts/status",
        ),
        ("POST", "/apis/batch/v1/namespaces/a/jobs", "create", "jobs"),
        ("DELETE", "/apis/batch/v1/namespaces/a/jobs/x", "delete", "jobs"),
        ("GET", "/api/v1/namespaces/a", "get", "namespaces"),
        ("GET", "/api/v1/namespaces/a/pods/p/log?tailLines=5", "get", "pods/log"),
        ("GET", "/api/v1/nodes/n", "get", "nodes"),
        ("GET", "/version", "get", "other"),
    ],
)
def test_requests_are_counted_as_the_api_server_names_them(
    registry: CollectorRegistry, metrics: Metrics, method: str, path: str, verb: str, resource: str
) -> None:
    metrics.called(method, f"https://10.0.0.1:6443{path}", 200)
    assert value(registry, "api_requests_total", verb=verb, resource=resource, code="200") == 1


def test_names_of_users_never_become_labels(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.called("GET", "https://host/api/v1/namespaces/secret-team/persistentvolumeclaims/secret-claim", 404)
    follow(metrics, lambda seen: say.failed(seen, Failure(reason=Reason.NOT_READY, message="secret"), NOW, counts=True))
    assert b"secret" not in generate_latest(registry)


def test_the_state_is_counted_when_it_is_asked_for(registry: CollectorRegistry) -> None:
    places = Places(Limits(1, 4, 9))
    statuses: list[dict[str, object]] = [{"phase": "Ready"}, {"phase": "Ready"}, {}]
    registry.register(StateCollector(places, lambda: by_phase(statuses), lambda: 5, lambda: 2.5))
    running, waiting = (Demand(("a", name), name, NOW, "s3://b") for name in "xy")
    places.take(running)
    places.wait(waiting)
    places.explain(waiting, NOW, None)
    assert value(registry, "artifacts", phase="Ready") == 2
    assert value(registry, "artifacts", phase="Pending") == 1
    assert value(registry, "artifacts", phase="Failed") == 0
    assert value(registry, "queue_length", reason="MaxMovers") == 1
    assert value(registry, "queue_length", reason="SameTarget") == 0
    assert value(registry, "movers_running") == 1
    assert value(registry, "movers_limit", scope="bucket") == 9
    assert value(registry, "work_queue_length") == 5
    assert value(registry, "watch_age_seconds") == 2.5
    places.release(("a", "x"))
    statuses.append({"phase": "Failed"})
    assert value(registry, "movers_running") == 0
    assert value(registry, "artifacts", phase="Failed") == 1
