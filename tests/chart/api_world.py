"""What the tests of the chart do with a real API server: put objects there, run Helm, ask what somebody may do."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import yaml
from manifests import NAMESPACE, Manifest, helm

import local_cluster as lc
from local_cluster.operator_process import kubectl

CRD = "checkpointartifacts.checkpoints.rlhf.dev"
OPERATOR = f"system:serviceaccount:{NAMESPACE}:checkpoint-operator"

AsHook = Callable[..., subprocess.CompletedProcess[str]]
Rights = dict[str, set[str]]


def apply(cluster: lc.Cluster, manifests: list[Manifest]) -> None:
    kubectl(cluster, "apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))


def namespace(cluster: lc.Cluster, name: str, **labels: str) -> str:
    metadata = {"name": name, "labels": labels}
    apply(cluster, [{"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}])
    return name


def helm_runs(cluster: lc.Cluster, *arguments: str, values: Manifest | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(helm()), *arguments, "--namespace", NAMESPACE, "--no-hooks"]
    return subprocess.run(
        [*command, *(["--values", "-"] if values is not None else [])],
        input=yaml.safe_dump(values or {}),
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "KUBECONFIG": str(cluster.kubeconfig)},
        capture_output=True,
        text=True,
        check=False,
    )


def create_artifact(
    cluster: lc.Cluster, where: str, name: str, target: dict[str, Any] | None = None, **metadata: Any
) -> None:
    body = {
        "apiVersion": "checkpoints.rlhf.dev/v1alpha1",
        "kind": "CheckpointArtifact",
        "metadata": {"name": name, "namespace": where, **metadata},
        "spec": {
            "source": {"persistentVolumeClaim": {"claimName": "output"}, "path": name},
            "target": {"uri": f"s3://bucket/{where}/{name}", **(target or {})},
        },
    }
    kubectl(cluster, "create", "-f", "-", stdin=json.dumps(body))


def may(cluster: lc.Cluster, user: str, where: str) -> Rights:
    """Every verb of a user by resource (and the names that it is limited to)."""
    listed = kubectl(cluster, "auth", "can-i", "--list", f"--as={user}", f"--namespace={where}").stdout
    found: Rights = {}
    for line in listed.splitlines()[1:]:
        row = re.fullmatch(r"(\S*) +\[(.*?)\] +\[(.*?)\] +\[(.*?)\]", line.strip() if line[0] != " " else line)
        assert row, line
        resource, urls, only, verbs = row.groups()
        if resource and not urls:
            found.setdefault(f"{resource} {only}" if only else resource, set()).update(verbs.split())
    return found


def beyond(rights: Rights, anybody: Rights) -> Rights:
    """What of these rights not everybody has."""
    more = {resource: verbs - anybody.get(resource, set()) for resource, verbs in rights.items()}
    return {resource: verbs for resource, verbs in more.items() if verbs}


def until(ready: Callable[[], bool], what: Callable[[], str], seconds: float = 40) -> None:
    """`what` is what a failure says was waited for."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited {seconds} s until {what()}"
        time.sleep(0.1)
