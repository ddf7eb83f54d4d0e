"""The operator as a release of Helm: what a platform engineer types."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from providers import Place

from local_cluster.operator_process import kubectl

CHART = Path(__file__).resolve().parents[2] / "charts" / "checkpoint-operator"
NAME = "checkpoint-operator"
NAMESPACE = "checkpoint-system"
_PATIENCE = "150s"


@dataclass(frozen=True)
class Release:
    """``folder`` is for Helm's own files and for packages; ``values`` go with every install and upgrade."""

    place: Place
    helm: Path
    folder: Path
    values: Mapping[str, Any]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Helm's own words become the error."""
        kept = {f"HELM_{name}_HOME": str(self.folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "KUBECONFIG": str(self.place.cluster.kubeconfig),
            **kept,
        }
        command = [str(self.helm), *arguments, f"--namespace={NAMESPACE}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=280)
        assert not check or done.returncode == 0, f"helm {' '.join(arguments)}:\n{done.stdout}{done.stderr}\n{self.log()}"
        return done

    def install(self, chart: Path = CHART, **more: Any) -> None:
        """Install, or upgrade what is there, and wait until the operator is ready."""
        values = self.folder / "values.json"
        values.write_text(json.dumps({**self.values, **more}))
        self.run(
            "upgrade", "--install", NAME, str(chart), "--create-namespace", f"--values={values}", "--wait",
            f"--timeout={_PATIENCE}",
        )  # fmt: skip

    def package(self, version: str) -> Path:
        """This chart as if it were of another version."""
        self.run("package", str(CHART), f"--version={version}", f"--app-version={version}", f"--destination={self.folder}")
        return self.folder / f"{NAME}-{version}.tgz"

    def image(self, reference: str) -> dict[str, Any]:
        """The value `image` for a reference like host:5000/name:tag."""
        repository, _, tag = reference.rpartition(":")
        return {"image": {"repository": repository, "tag": tag, "pullPolicy": self.place.pull_policy}}

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        return kubectl(self.place.cluster, "--namespace", NAMESPACE, *arguments, stdin=stdin, check=check)

    def restart(self) -> None:
        """Kill the operator's pod, and wait until another one is ready."""
        self.kubectl("delete", "pod", "--selector=app.kubernetes.io/component=operator", "--grace-period=0", "--force")
        self.wait()

    def wait(self) -> None:
        self.kubectl("rollout", "status", f"deployment/{NAME}", "--timeout=120s")

    def log(self) -> str:
        """The operator's last words, and those of hooks that failed."""
        shown = self.kubectl("logs", f"--selector=app.kubernetes.io/name={NAME}", "--tail=25", check=False)
        pods = self.kubectl("get", "pods", "-o", "wide", check=False)
        return f"{pods.stdout}{pods.stderr}\n{shown.stdout}{shown.stderr}"
