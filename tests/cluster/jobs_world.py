"""A namespace with claims, and an operator that runs movers as Jobs in it: what the tests of Jobs begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import Operator
from hand_kubelet import until

import local_cluster as lc
from local_cluster.operator_process import kubectl

RULES = {"image": "checkpoint-operator:dev", "imagePullPolicy": "Never", "progressFromLogs": False}


def prepare(cluster: lc.Cluster, folder: Path, namespace: str, *flags: str) -> Operator:
    """An operator with Jobs, and a namespace with a claim that is bound (not started)."""
    config = folder / "jobs.yaml"
    config.write_text(json.dumps(RULES))
    chosen = (
        f"--namespaces={namespace}",
        "--executor=job",
        f"--jobs-config={config}",
        "--backoff-seconds=0.3",
        "--backoff-max-seconds=1",
        "--max-movers=100",
        "--max-movers-per-namespace=100",
        "--max-movers-per-bucket=100",
        "--log-level=debug",
        *flags,
    )
    kubectl(cluster, "create", "namespace", namespace)
    operator = Operator(cluster, None, namespace, folder, [], chosen)  # type: ignore[arg-type]
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


def create(operator: Operator, name: str, **spec: Any) -> None:
    target = {"credentialsSecretRef": {"name": "keys"}, **spec.pop("target", {})}
    operator.create(name, uri=f"s3://bucket/{operator.namespace}/{name}", target=target, **spec)


def environment(job: dict[str, Any]) -> dict[str, str]:
    [container] = job["spec"]["template"]["spec"]["containers"]
    return {item["name"]: item["value"] for item in container["env"]}


def ready_condition(status: dict[str, Any]) -> dict[str, Any]:
    return next((item for item in status.get("conditions", []) if item["type"] == "Ready"), {})


def reason_of(status: dict[str, Any]) -> str:
    return str(ready_condition(status).get("reason"))


def message_of(status: dict[str, Any]) -> str:
    return str(ready_condition(status).get("message"))
