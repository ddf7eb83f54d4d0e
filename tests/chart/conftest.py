"""A real API server for the tests of the chart, with the release in it; what is only rendered needs none."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from api_world import AsHook, Rights, apply, helm_runs, may, namespace
from manifests import CHART, NAMESPACE, is_hook, render

import local_cluster as lc
from local_cluster.operator_process import write_operator_kubeconfig


@pytest.fixture(scope="session")
def cluster() -> Iterator[lc.Cluster]:
    with lc.start("tests-chart", say=lambda _: None) as started:
        yield started


@pytest.fixture(scope="session")
def anybody(cluster: lc.Cluster) -> Rights:
    """What a service account without any binding may do: ask who it is, and what it may do."""
    return may(cluster, "system:serviceaccount:default:nobody", "default")


@pytest.fixture(scope="session")
def as_hook(cluster: lc.Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsHook:
    """Run ``operator …`` with the token of a hook's account, which has what the chart gives it and no more."""
    namespace(cluster, NAMESPACE)
    folder = tmp_path_factory.mktemp("hooks")
    rights = [m for m in render() if is_hook(m) and m["kind"] != "Job"]
    apply(cluster, rights)

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        config = write_operator_kubeconfig(cluster, folder / name, f"checkpoint-operator-{name}")
        command = [sys.executable, "-m", "checkpoint_operator.controller", *arguments]
        environment = {"KUBECONFIG": str(config), "PATH": os.environ["PATH"]}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def installed(cluster: lc.Cluster, as_hook: AsHook) -> lc.Cluster:
    """The CRD by its hook, then the release by Helm."""
    done = as_hook("crds", "crds", "apply")
    assert done.returncode == 0, done.stderr
    done = helm_runs(cluster, "install", "checkpoint-operator", str(CHART))
    assert done.returncode == 0, done.stderr
    return cluster
