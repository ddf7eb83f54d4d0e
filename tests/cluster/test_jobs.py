"""Movers as Jobs on a real control plane; what a node would say is said by hand, the operator has just the chart's rights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Operator
from hand_kubelet import HandKubelet, failed, stored, until

import local_cluster as lc
from local_cluster.operator_process import kubectl

RULES = {"image": "checkpoint-operator:dev", "imagePullPolicy": "Never", "progressFromLogs": False}


def prepare(cluster: lc.Cluster, folder: Path, namespace: str) -> Operator:
    """An operator with Jobs, and a namespace with a claim that is bound (not started)."""
    config = folder / "jobs.yaml"
    config.write_text(json.dumps(RULES))
    flags = (
        f"--namespaces={namespace}",
        "--executor=job",
        f"--jobs-config={config}",
        "--backoff-seconds=0.3",
        "--backoff-max-seconds=1",
        "--log-level=debug",
    )
    kubectl(cluster, "create", "namespace", namespace)
    operator = Operator(cluster, None, namespace, folder, [], flags)  # type: ignore[arg-type]
    bound_claim(operator, "output")
    until(lambda: operator.kubectl("get", "sa", "default", check=False).returncode == 0, "the default account", operator)
    return operator


def bound_claim(operator: Operator, name: str, mode: str = "ReadWriteMany") -> None:
    volume = f"{operator.namespace}-{name}"
    common = {"storageClassName": "", "accessModes": [mode]}
    size = {"storage": "1Gi"}
    claim_ref = {"namespace": operator.namespace, "name": name}
    bodies = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {**common, "capacity": size, "hostPath": {"path": "/nonexistent"}, "claimRef": claim_ref},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name},
            "spec": {**common, "resources": {"requests": size}, "volumeName": volume},
        },
    ]
    operator.kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": bodies}))
    operator.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", f"pvc/{name}", "--timeout=40s")


@pytest.fixture(scope="module")
def operator(cluster: lc.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    prepared = prepare(cluster, tmp_path_factory.mktemp("jobs"), "jobs")
    prepared.start()
    yield prepared
    assert prepared.process is not None
    assert prepared.process.poll() is None, "the operator died"
    assert prepared.stop() == 0


@pytest.fixture(scope="module")
def kubelet(operator: Operator) -> HandKubelet:
    return HandKubelet(operator)


def create(operator: Operator, name: str, **spec: Any) -> None:
    target = {"credentialsSecretRef": {"name": "keys"}, **spec.pop("target", {})}
    operator.create(name, uri=f"s3://bucket/{operator.namespace}/{name}", target=target, **spec)


def test_an_artifact_becomes_ready_by_what_its_mover_says_and_its_job_goes(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "happy")
    kubelet.complete("happy")
    status = operator.wait("happy", "Ready")
    assert (status["launches"], status["attempts"], status["sizeBytes"]) == (1, 1, 2048)
    assert status["mover"]["done"] is True
    until(lambda: kubelet.jobs("happy") == [], "the Job to be deleted", operator)
    assert ("Normal", "Committed") in {event[:2] for event in operator.events("happy")}
