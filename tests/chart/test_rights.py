"""Who may do what once the chart is installed, asked of a real API server and compared verb by verb with tables."""

import json

import pytest
from api_world import CRD, OPERATOR, Rights, beyond, helm_runs, may, namespace, until
from chart_world import INSTALLATIONS
from manifests import CHART, NAMESPACE, ROOT

import local_cluster as lc
from local_cluster.operator_process import kubectl

# Every verb that the operator has. docs/permissions.md says why; a right that is not here is a finding.
OPERATOR_RIGHTS = {
    "checkpointartifacts.checkpoints.rlhf.dev": {"get", "list", "watch", "patch"},
    "checkpointartifacts.checkpoints.rlhf.dev/status": {"patch"},
    "checkpointartifacts.checkpoints.rlhf.dev/finalizers": {"update"},
    "events.events.k8s.io": {"create"},
    "jobs.batch": {"get", "list", "watch", "create", "delete"},
    "pods": {"get", "list", "watch"},
    "pods/log": {"get"},
    "persistentvolumeclaims": {"get"},
    "serviceaccounts": {"get"},
    "namespaces": {"get"},
    "nodes": {"get"},
}


def test_the_page_about_permissions_has_the_same_table() -> None:
    section = (ROOT / "docs" / "permissions.md").read_text().partition("## The operator")[2].partition("\n## ")[0]
    found: Rights = {}
    resource = ""
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| right"):
            first, verbs = (cell.strip() for cell in line.split("|")[1:3])
            resource = first.strip("`") or resource
            found.setdefault(resource, set()).update(verbs.split(", "))
    short = {name.replace(".checkpoints.rlhf.dev", ""): verbs for name, verbs in OPERATOR_RIGHTS.items()}
    assert found == short


def test_the_operator_may_do_what_the_table_says_and_nothing_else(installed: lc.Cluster, anybody: Rights) -> None:
    for where in ("default", "kube-system", NAMESPACE):
        assert beyond(may(installed, OPERATOR, where), anybody) == OPERATOR_RIGHTS, where


@pytest.mark.parametrize("verb", ["get", "list", "watch", "create", "patch", "delete"])
def test_the_operator_has_no_right_on_secrets(installed: lc.Cluster, verb: str) -> None:
    for where in ("--namespace=default", f"--namespace={NAMESPACE}", "--all-namespaces"):
        done = kubectl(installed, "auth", "can-i", verb, "secrets", f"--as={OPERATOR}", where, check=False)
        assert done.stdout.strip() == "no", where


def test_limited_to_namespaces_it_may_do_nothing_elsewhere(installed: lc.Cluster, anybody: Rights) -> None:
    for name in ("team-a", "team-b", "team-c"):
        namespace(installed, name)
    values = {**INSTALLATIONS["two namespaces"], "rbac": {"userRoles": False}}
    done = helm_runs(installed, "install", "limited", str(CHART), values=values)
    assert done.returncode == 0, done.stderr
    user = f"system:serviceaccount:{NAMESPACE}:limited-checkpoint-operator"
    inside = {resource: verbs for resource, verbs in OPERATOR_RIGHTS.items() if resource != "nodes"}
    for name in ("team-a", "team-b"):
        assert beyond(may(installed, user, name), anybody) == inside
    for name in ("team-c", NAMESPACE, "kube-system"):
        assert beyond(may(installed, user, name), anybody) == {}
    # A Role can give `get` on the very namespace that it is in.
    assert kubectl(installed, "get", "namespace", "team-a", f"--as={user}").returncode == 0
    assert kubectl(installed, "get", "namespace", "team-c", f"--as={user}", check=False).returncode != 0
    helm_runs(installed, "uninstall", "limited")


def test_a_training_job_may_create_artifacts_and_nothing_else(installed: lc.Cluster, anybody: Rights) -> None:
    namespace(installed, "training")
    role = "checkpoint-operator-trainer"
    kubectl(
        *(installed, "-n", "training", "create", "rolebinding", "trainer"),
        *(f"--clusterrole={role}", "--serviceaccount=training:trainer"),
    )
    user = "system:serviceaccount:training:trainer"
    assert beyond(may(installed, user, "training"), anybody) == {CRD: {"create"}}
    assert beyond(may(installed, user, "default"), anybody) == {}


@pytest.mark.parametrize(
    ("role", "verbs"),
    [
        ("view", {"get", "list", "watch"}),
        ("edit", {"create", "update", "patch", "delete", "deletecollection"}),
    ],
)
def test_the_roles_of_people_are_part_of_the_built_in_ones(installed: lc.Cluster, role: str, verbs: set[str]) -> None:
    body = json.loads(kubectl(installed, "get", "clusterrole", f"checkpoint-operator-{role}", "-o", "json").stdout)
    assert set(body["rules"][0]["verbs"]) == verbs
    assert body["metadata"]["labels"][f"rbac.authorization.k8s.io/aggregate-to-{role}"] == "true"
    if not installed.has_controller_manager:
        return
    namespace(installed, "people")
    kubectl(installed, "-n", "people", "create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}")
    until(lambda: verbs <= may(installed, role, "people").get(CRD, set()), lambda: f"{role} has {verbs}")
    assert "patch" not in may(installed, role, "people").get(f"{CRD}/status", set())
