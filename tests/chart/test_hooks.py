"""What the chart's hooks do on a real API server: CRDs, finalizers, and the look of ``helm test``.

There is no node: what a hook's pod would run is run here as a process, with the token of the hook's own account.
"""

import json
from typing import Any

import pytest
from api_world import CRD, AsHook, Rights, beyond, create_artifact, helm_runs, may, namespace
from chart_world import INSTALLATIONS
from manifests import CHART, NAMESPACE

import local_cluster as lc
from checkpoint_operator import __version__
from local_cluster.operator_process import kubectl

VERSION = "checkpoints.rlhf.dev/crd-version"


def live_crd(cluster: lc.Cluster) -> Any:
    return json.loads(kubectl(cluster, "get", "crd", CRD, "-o", "json").stdout)


def test_the_hook_applies_the_crd_and_waits_until_it_is_served(installed: lc.Cluster) -> None:
    assert live_crd(installed)["metadata"]["annotations"][VERSION] == __version__
    assert kubectl(installed, "get", "ckpt", "-A").returncode == 0


def test_a_second_time_changes_nothing(installed: lc.Cluster, as_hook: AsHook) -> None:
    before = live_crd(installed)["metadata"]["resourceVersion"]
    done = as_hook("crds", "crds", "apply")
    assert (done.returncode, done.stderr) == (0, "")
    assert live_crd(installed)["metadata"]["resourceVersion"] == before


@pytest.mark.parametrize("theirs", ["9.0.0", "0.1.1-rc.1", "the newest"])
def test_one_that_is_newer_or_unknown_stays(installed: lc.Cluster, as_hook: AsHook, theirs: str) -> None:
    ours = live_crd(installed)["metadata"]["annotations"][VERSION]
    kubectl(installed, "annotate", "crd", CRD, f"{VERSION}={theirs}", "--overwrite")
    try:
        before = live_crd(installed)["metadata"]["resourceVersion"]
        done = as_hook("crds", "crds", "apply")
        assert done.returncode == 3
        assert theirs in done.stderr
        assert ours in done.stderr
        assert "Traceback" not in done.stderr
        assert live_crd(installed)["metadata"]["resourceVersion"] == before
    finally:
        kubectl(installed, "annotate", "crd", CRD, f"{VERSION}={ours}", "--overwrite")


def test_an_older_one_is_replaced_whoever_applied_it(installed: lc.Cluster, as_hook: AsHook) -> None:
    patch = {"metadata": {"annotations": {VERSION: "0.0.9"}}, "spec": {"names": {"categories": ["old"]}}}
    kubectl(installed, "patch", "crd", CRD, "--type=merge", "-p", json.dumps(patch))
    done = as_hook("crds", "crds", "apply")
    assert done.returncode == 0, done.stderr
    assert live_crd(installed)["spec"]["names"]["categories"] == ["checkpoints"]


def test_the_hook_may_touch_no_other_crd(installed: lc.Cluster, anybody: Rights) -> None:
    user = f"system:serviceaccount:{NAMESPACE}:checkpoint-operator-crds"
    rights = beyond(may(installed, user, NAMESPACE), anybody)
    assert rights == {f"customresourcedefinitions.apiextensions.k8s.io {CRD}": {"get", "create", "patch"}}


def test_uninstall_leaves_the_crd_and_the_artifacts(installed: lc.Cluster) -> None:
    namespace(installed, "keeps")
    create_artifact(installed, "keeps", "kept")
    done = helm_runs(installed, "install", "short-lived", str(CHART), values=INSTALLATIONS["nothing but the operator"])
    assert done.returncode == 0, done.stderr
    done = helm_runs(installed, "uninstall", "short-lived")
    assert done.returncode == 0, done.stderr
    assert kubectl(installed, "get", "ckpt", "-n", "keeps", "kept").returncode == 0


def test_a_rollback_leaves_the_crd(installed: lc.Cluster) -> None:
    before = live_crd(installed)["metadata"]["resourceVersion"]
    done = helm_runs(installed, "upgrade", "checkpoint-operator", str(CHART), values={"limits": {"maxMovers": 2}})
    assert done.returncode == 0, done.stderr
    done = helm_runs(installed, "rollback", "checkpoint-operator", "1")
    assert done.returncode == 0, done.stderr
    assert live_crd(installed)["metadata"]["resourceVersion"] == before


def test_after_an_uninstall_no_artifact_hangs(installed: lc.Cluster, as_hook: AsHook) -> None:
    for where in ("held-a", "held-b"):
        namespace(installed, where)
        for number in range(3):
            finalizers = ["checkpoints.rlhf.dev/data", "example.com/somebody-elses"]
            create_artifact(installed, where, f"held-{number}", finalizers=finalizers)
    create_artifact(installed, "held-a", "going", finalizers=["checkpoints.rlhf.dev/data"])
    kubectl(installed, "delete", "ckpt", "-n", "held-a", "going", "--wait=false")

    done = as_hook("finalizers", "finalizers", "remove", "--all")

    assert done.returncode == 0, done.stderr
    assert "off 7 artifacts" in done.stdout
    items = json.loads(kubectl(installed, "get", "ckpt", "-A", "-o", "json").stdout)["items"]
    held = [item["metadata"] for item in items if item["metadata"]["namespace"].startswith("held-")]
    assert {metadata["name"] for metadata in held} == {"held-0", "held-1", "held-2"}
    assert all(metadata["finalizers"] == ["example.com/somebody-elses"] for metadata in held)
    for where in ("held-a", "held-b"):
        patch = json.dumps({"metadata": {"finalizers": None}})
        for number in range(3):
            kubectl(installed, "patch", "ckpt", "-n", where, f"held-{number}", "--type=merge", "-p", patch)


def test_nothing_is_held_is_no_error(installed: lc.Cluster, as_hook: AsHook) -> None:
    done = as_hook("finalizers", "finalizers", "remove", "keeps", "default")
    assert done.returncode == 0, done.stderr
    assert "off 0 artifacts" in done.stdout


def test_the_hook_may_do_nothing_else(installed: lc.Cluster, anybody: Rights) -> None:
    user = f"system:serviceaccount:{NAMESPACE}:checkpoint-operator-finalizers"
    assert beyond(may(installed, user, "default"), anybody) == {CRD: {"list", "patch"}}


def test_what_does_not_answer_is_told(installed: lc.Cluster, as_hook: AsHook) -> None:
    """The account of `helm test` has no rights at all."""
    done = as_hook("test", "check", "--host=127.0.0.1", "--port=1", "--seconds=0")
    assert done.returncode == 1
    assert "answers /healthz with ConnectionRefusedError" in done.stderr
