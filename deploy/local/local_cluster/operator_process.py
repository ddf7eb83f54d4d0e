"""Runs the operator of this checkout against a cluster, with the rights that the chart gives and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import LocalClusterError
from .providers import Cluster

ROOT = Path(__file__).resolve().parents[3]
# What of deploy/manifests/ is no operator: that one runs here, as a process.
RIGHTS = tuple(ROOT / "deploy" / "manifests" / name for name in ("00-namespace.yaml", "10-rbac.yaml"))
NAMESPACE = "checkpoint-system"
ACCOUNT = "checkpoint-operator"


def kubectl(
    cluster: Cluster, *arguments: str, stdin: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run kubectl as the cluster's admin; its own words become the error."""
    done = subprocess.run(
        [str(cluster.kubectl), *arguments],
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": os.environ.get("HOME", "/"),
            "KUBECONFIG": str(cluster.kubeconfig),
        },
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        raise LocalClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done


def install(cluster: Cluster) -> None:
    """Apply the CRD and the operator's rights, and wait until the API is served."""
    kubectl(cluster, "apply", *(f"--filename={path}" for path in (ROOT / "crds", *RIGHTS)))
    kubectl(
        cluster,
        "wait",
        "--for=condition=Established",
        "--timeout=60s",
        "-f",
        str(ROOT / "crds" / "checkpointartifacts.yaml"),
    )


def write_operator_kubeconfig(cluster: Cluster, path: Path, account: str = ACCOUNT) -> Path:
    """A kubeconfig of the operator's service account: with it an RBAC gap shows here, not in production."""
    token = kubectl(cluster, "create", "token", account, "-n", NAMESPACE, "--duration=24h").stdout.strip()
    config = json.loads(kubectl(cluster, "config", "view", "--raw", "--flatten", "--minify", "-o", "json").stdout)
    config["users"] = [{"name": account, "user": {"token": token}}]
    for context in config["contexts"]:
        context["context"]["user"] = account
    path.touch(mode=0o600)
    path.write_text(json.dumps(config))
    return path


@dataclass(frozen=True)
class OperatorCommand:
    """How the operator is started; a demo and a test start it in different ways."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def operator_command(
    cluster: Cluster, folder: Path, claims: Sequence[Mapping[str, Any]], *flags: str, python: str = sys.executable
) -> OperatorCommand:
    """The command for an operator that serves these claims inline; its files lie in `folder`."""
    config = folder / "inline.yaml"
    config.write_text(json.dumps({"claims": list(claims)}))  # JSON is YAML
    kubeconfig = write_operator_kubeconfig(cluster, folder / "operator.kubeconfig")
    return OperatorCommand(
        [
            python,
            "-m",
            "checkpoint_operator.controller",
            f"--inline-config={config}",
            f"--state-directory={folder / 'state'}",
            *flags,
        ],
        {"KUBECONFIG": str(kubeconfig)},
    )
