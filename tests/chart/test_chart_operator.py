"""The operator as the chart starts it, here as a process: the chart's variables, its files, its account's rights alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from api_world import AsHook, apply, create_artifact, helm_runs, namespace, until
from chart_world import one
from manifests import CHART, Manifest, render

import local_cluster as lc
from local_cluster.operator_process import kubectl, write_operator_kubeconfig
from local_cluster.processes import free_ports


@dataclass
class Running:
    port: int
    log: Path


@contextmanager
def operator(cluster: lc.Cluster, folder: Path, account: str, values: Manifest) -> Iterator[Running]:
    """What the Deployment says, but for what a process cannot have: a folder in /etc, and a port for itself."""
    manifests = render(values=values)
    for name, text in one(manifests, "ConfigMap")["data"].items():
        (folder / name).write_text(text)
    [container] = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    [port] = free_ports(1)
    environment = {
        entry["name"]: entry["value"]
        .replace("/etc/checkpoint-operator", str(folder))
        .replace("0.0.0.0:8080", f"127.0.0.1:{port}")
        for entry in container["env"]
    }
    environment["KUBECONFIG"] = str(write_operator_kubeconfig(cluster, folder / "kubeconfig", account))
    running = Running(port, folder / "operator.log")
    with running.log.open("wb") as log:
        command = [sys.executable, "-m", "checkpoint_operator.controller"]
        process = subprocess.Popen(command, env={**environment, "PATH": os.environ["PATH"]}, stdout=log, stderr=log)
    try:
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)


def bound_claim(cluster: lc.Cluster, where: str, name: str) -> None:
    volume, size = f"{where}-{name}", {"storage": "1Gi"}
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": "none"}
    claim_ref = {"namespace": where, "name": name}
    spec = {**common, "capacity": size, "hostPath": {"path": "/nonexistent"}, "claimRef": claim_ref}
    claim = {**common, "resources": {"requests": size}, "volumeName": volume}
    bodies = [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume}, "spec": spec},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": claim_ref, "spec": claim},
    ]
    apply(cluster, bodies)
    if not cluster.has_controller_manager:
        patch = json.dumps({"status": {"phase": "Bound", "accessModes": common["accessModes"]}})
        kubectl(cluster, "patch", "pvc", name, "-n", where, "--subresource=status", "--type=merge", "-p", patch)
    kubectl(cluster, "wait", "--for=jsonpath={.status.phase}=Bound", f"pvc/{name}", "-n", where, "--timeout=40s")


def jobs(cluster: lc.Cluster, where: str) -> list[Any]:
    found: list[Any] = json.loads(kubectl(cluster, "get", "jobs", "-n", where, "-o", "json").stdout)["items"]
    return found


def state(cluster: lc.Cluster, where: str, running: Running) -> str:
    """What a failed test shows."""
    return kubectl(cluster, "get", "ckpt", "-n", where, "-o", "yaml").stdout + running.log.read_text()


@pytest.mark.parametrize("limited", [False, True], ids=["in all namespaces", "in one namespace"])
def test_with_the_charts_rights_alone_it_gets_well_and_starts_movers(
    installed: lc.Cluster, as_hook: AsHook, tmp_path: Path, limited: bool
) -> None:
    where = namespace(installed, f"served-{'limited' if limited else 'wide'}")
    values: Manifest = {"log": {"format": "plain"}}
    account = "checkpoint-operator"
    if limited:
        values |= {"watchNamespaces": [where], "rbac": {"userRoles": False}}
        account = "limited-checkpoint-operator"
        done = helm_runs(installed, "install", "limited", str(CHART), values=values)
        assert done.returncode == 0, done.stderr
    kubectl(installed, "create", "serviceaccount", "default", "-n", where, check=False)
    kubectl(installed, "create", "secret", "generic", "keys", "-n", where, "--from-literal=AWS_ACCESS_KEY_ID=x")
    bound_claim(installed, where, "output")
    with operator(installed, tmp_path, account, values) as running:
        done = as_hook("test", "check", "--host=127.0.0.1", f"--port={running.port}")
        assert done.returncode == 0, f"{done.stderr}\n{running.log.read_text()}"
        create_artifact(installed, where, "first", target={"credentialsSecretRef": {"name": "keys"}})
        until(lambda: bool(jobs(installed, where)), lambda: f"there is a mover: {state(installed, where, running)}")
        log = running.log.read_text()
    [job] = jobs(installed, where)
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "checkpoint-operator:0.1.0"
    assert "cannot" not in log, log
    kubectl(installed, "patch", "ckpt", "first", "-n", where, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    kubectl(installed, "delete", "ckpt", "first", "-n", where)
    if limited:
        assert helm_runs(installed, "uninstall", "limited").returncode == 0
