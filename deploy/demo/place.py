"""What the demo puts into a cluster, so that one which was there before is left as it was found."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import local_cluster as lc
from local_cluster.operator_process import RIGHTS, ROOT, install, kubectl
from local_cluster.providers import EXISTING

NAMESPACE = "demo"
_FILES = (ROOT / "crds" / "checkpointartifacts.yaml", *RIGHTS)


class DemoError(Exception):
    """The demo did not show what it promised; the message has the evidence."""


@dataclass
class Place:
    """The CRD, the operator's rights and a namespace. ``files`` are those that the demo applied, and so may delete again."""

    cluster: lc.Cluster
    files: list[Path]
    has_namespace: bool = False

    @classmethod
    def of(cls, cluster: lc.Cluster) -> "Place":
        """Looks only, and refuses a cluster where the namespace is somebody else's."""
        if cluster.provider != EXISTING:
            return cls(cluster, list(_FILES))
        if kubectl(cluster, "get", "namespace", NAMESPACE, "--ignore-not-found", "-o", "name").stdout:
            raise DemoError(
                f"the cluster '{cluster.name}' has a namespace '{NAMESPACE}' already, which the demo wants to create and to "
                f"delete: remove it (kubectl delete namespace {NAMESPACE}) or unset CLUSTER_PROVIDER"
            )
        absent = [f for f in _FILES if not kubectl(cluster, "get", "-f", str(f), "--ignore-not-found", "-o", "name").stdout]
        return cls(cluster, absent)

    def make(self, claim: Path, say: Callable[[str], None]) -> None:
        if self.cluster.provider == EXISTING:
            say(f"in the cluster '{self.cluster.name}' at {self.cluster.server}; removed again at the end")
            for path in _FILES:
                if path not in self.files:
                    say(f"what {path.relative_to(ROOT)} describes is there already, and is used as it is")
                    continue
                kubectl(self.cluster, "apply", "-f", str(path))
            kubectl(self.cluster, "wait", "--for=condition=Established", "--timeout=60s", "-f", str(_FILES[0]))
        else:
            install(self.cluster)
        self.has_namespace = True
        kubectl(self.cluster, "create", "namespace", NAMESPACE)
        kubectl(self.cluster, "apply", "-f", str(claim))

    def remove(self) -> None:
        """Nothing to do where the whole cluster goes. The bucket goes anyhow, so no object is waited for in vain."""
        if self.cluster.provider != EXISTING:
            return
        if self.has_namespace:
            self._remove_artifacts()
            self._delete("namespace", NAMESPACE)
        for path in reversed(self.files):
            self._delete("-f", str(path))

    def _remove_artifacts(self) -> None:
        every = ("ckpt", "--all", "-n", NAMESPACE)
        if kubectl(self.cluster, "delete", *every, "--timeout=20s", check=False).returncode == 0:
            return
        # The operator is not there to let them go.
        patch = json.dumps({"metadata": {"finalizers": None}})
        for name in kubectl(self.cluster, "get", "ckpt", "-n", NAMESPACE, "-o", "name", check=False).stdout.split():
            kubectl(self.cluster, "patch", name, "-n", NAMESPACE, "--type=merge", "-p", patch, check=False)

    def _delete(self, *what: str) -> None:
        done = kubectl(self.cluster, "delete", *what, "--ignore-not-found", "--timeout=60s", check=False)
        if done.returncode != 0:
            print(f"could not remove {' '.join(what)} from the cluster '{self.cluster.name}': {done.stderr.strip()}")

    def record(self) -> dict[str, Any]:
        """For a demo that is kept: enough to remove it later, from another process."""
        return {
            "provider": self.cluster.provider,
            "name": self.cluster.name,
            "server": self.cluster.server,
            "kubeconfig": str(self.cluster.kubeconfig),
            "kubectl": str(self.cluster.kubectl),
            "files": [str(path) for path in self.files],
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Place":
        cluster = lc.Cluster(
            name=record["name"],
            kubeconfig=Path(record["kubeconfig"]),
            server=record["server"],
            kubectl=Path(record["kubectl"]),
            provider=record["provider"],
            has_controller_manager=True,
        )
        return cls(cluster, [Path(path) for path in record["files"]], has_namespace=True)
