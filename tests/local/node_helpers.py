"""Pods and claims for the tests of a node, and what a node leaves on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_helpers import identities

import local_cluster as lc
from local_cluster.node_build import PAUSE_IMAGE
from local_cluster.node_world import first_process
from local_cluster.processes import Identity


def wait_for(ready: Callable[[], Any], what: str, seconds: float = 90) -> None:
    """Ask again and again; the assertion names what did not come."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}, in vain"
        time.sleep(0.1)


def restricted(*steps: str) -> dict[str, Any]:
    """A pod that takes these steps (see deploy/local/node/pause) and that the restricted profile admits."""
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "steps",
                "image": PAUSE_IMAGE,
                "args": list(steps),
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
    }


@dataclass(frozen=True)
class Namespace:
    cluster: lc.Cluster
    name: str

    def create(self) -> None:
        """Only pods of the restricted profile are admitted to it."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name, "labels": labels}})
        wait_for(lambda: self.try_kubectl("get", "serviceaccount", "default").returncode == 0, "the default account")

    def try_kubectl(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(self.cluster.kubectl), f"--kubeconfig={self.cluster.kubeconfig}", f"--namespace={self.name}"]
        return subprocess.run([*command, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=60)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        done = self.try_kubectl(*arguments, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def get(self, kind: str, name: str) -> dict[str, Any]:
        text = self.kubectl("get", kind, *([name] if name else []), "-o", "json")
        found: dict[str, Any] = json.loads(text)
        return found

    def apply(self, document: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps(document))

    def pod(self, name: str, spec: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> None:
        metadata = {"name": name, "namespace": self.name, "labels": dict(labels or {})}
        self.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})

    def wait_ready(self, name: str) -> None:
        self.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=55s")

    def job(self, name: str, spec: Mapping[str, Any], retries: int = 0) -> None:
        body = {"backoffLimit": retries, "template": {"spec": spec}}
        self.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": body})

    def completed(self, name: str) -> None:
        self.kubectl("wait", "--for=condition=Complete", f"job/{name}", "--timeout=55s")

    def finished(self, job: str) -> dict[str, Any]:
        """The one pod of that Job, once it has succeeded or failed."""

        def pods() -> list[dict[str, Any]]:
            text = self.kubectl("get", "pods", f"--selector=job-name={job}", "-o", "json")
            return [item for item in json.loads(text)["items"] if item["status"]["phase"] in ("Succeeded", "Failed")]

        wait_for(pods, f"the pod of {job} to end")
        return pods()[0]


def claim_on(namespace: Namespace, folder: Path, *, node: str, owner: int) -> str:
    """A bound claim on a folder of that node, which belongs to that user."""
    folder.mkdir()
    os.chown(folder, owner, owner)
    name = f"{namespace.name}-{folder.name}"
    affinity = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    common = {"accessModes": ["ReadWriteOnce"], "storageClassName": "manual"}
    volume = {
        **common,
        "capacity": {"storage": "1Gi"},
        "hostPath": {"path": str(folder)},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [affinity]}]}},
        "claimRef": {"namespace": namespace.name, "name": folder.name},
    }
    namespace.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume})
    claim = {**common, "resources": {"requests": {"storage": "1Gi"}}, "volumeName": name}
    metadata = {"name": folder.name}
    namespace.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": claim})
    return folder.name


@dataclass(frozen=True)
class Traces:
    """Where a node can be seen on this machine while it runs, and after it if something is left.

    Names of links, ranges and groups go to the next node as soon as they are free, which another process may start: what
    bears one of them is this node's while its inode is the one that was seen.
    """

    state_dir: Path
    link: str
    range: str
    processes: tuple[Identity, ...]
    inodes: dict[Path, int]

    def left(self) -> list[str]:
        """What of it is still there."""
        routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
        mounts = Path("/proc/self/mounts").read_text()
        link = link_path(self.link)
        is_anothers = _inode(link) not in (None, self.inodes.get(link))
        return [
            *(f"process {item.pid}" for item in self.processes if item.alive()),
            *([str(self.state_dir)] if self.state_dir.exists() else []),
            *(str(path) for path, inode in self.inodes.items() if _inode(path) == inode),
            *(line for line in routes.splitlines() if not is_anothers and (self.range in line or self.link in line)),
            *(line for line in mounts.splitlines() if str(self.state_dir) in line),
        ]


def link_path(name: str) -> Path:
    return Path("/sys/class/net") / name


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def traces_of(state_dir: Path | None) -> Traces:
    """Everything that the supervisor of this cluster has recorded, and each process in its PID namespace."""
    assert state_dir is not None
    record = json.loads((state_dir / "state.json").read_text())
    by_kind: dict[str, list[str]] = {}
    for kind, value in record["leftovers"]:
        by_kind.setdefault(kind, []).append(value)
    first = first_process(record["programs"]["namespaces"]["pid"])
    world = os.readlink(f"/proc/{first}/ns/pid")
    link, groups = by_kind["link"][0], tuple(map(Path, by_kind["cgroup"]))
    inodes = {path: inode for path in (link_path(link), *groups) if (inode := _inode(path)) is not None}
    return Traces(
        state_dir,
        link,
        by_kind["route"][0],
        (*identities(state_dir), *(Identity.of(pid) for pid in _pids() if _pid_namespace(pid) == world)),
        inodes,
    )


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _pid_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""  # gone meanwhile
