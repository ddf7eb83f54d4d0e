"""What the API server's admission says to the chart's objects, and what the chart's own admission policy says to users."""

import json
from collections.abc import Iterator

import pytest
import yaml
from api_world import OPERATOR, apply, namespace, until
from chart_world import INSTALLATIONS, pods
from manifests import Manifest, render

import local_cluster as lc
from local_cluster.operator_process import kubectl

OURS = {"checkpoints.rlhf.dev/artifact-uid": "1234", "checkpoints.rlhf.dev/artifact-name": "x"}
WHERE = "labels"
JOB_CONTROLLER = "system:serviceaccount:kube-system:job-controller"


def test_a_restricted_namespace_takes_every_pod_of_the_chart(installed: lc.Cluster) -> None:
    where = namespace(installed, "restricted", **{"pod-security.kubernetes.io/enforce": "restricted"})
    bodies = []
    for number, values in enumerate(INSTALLATIONS.values()):
        for name, pod in pods(render(values=values)):
            # The account and the class are of another place; what is asked is what Pod Security says.
            spec = {key: value for key, value in pod.items() if key not in ("serviceAccountName", "priorityClassName")}
            metadata = {"name": f"{name}-{number}", "namespace": where}
            bodies.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    kubectl(installed, "create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump_all(bodies))
    privileged = {**bodies[0], "spec": {**bodies[0]["spec"], "hostNetwork": True}}
    with pytest.raises(lc.LocalClusterError, match="violates PodSecurity"):
        kubectl(installed, "create", "--dry-run=server", "-f", "-", stdin=json.dumps(privileged))


def test_the_api_server_takes_every_object_of_every_installation(installed: lc.Cluster) -> None:
    for name in ("team-a", "team-b"):
        namespace(installed, name)
    for values in INSTALLATIONS.values():
        manifests = [m for m in render(values=values) if m["kind"] not in ("ServiceMonitor", "PrometheusRule")]
        flags = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
        done = kubectl(installed, "apply", *flags, "-f", "-", stdin=yaml.safe_dump_all(manifests))
        assert "Warning" not in done.stderr


def pod(where: str, name: str, **labels: str) -> Manifest:
    container = {"name": "c", "image": "example/none"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": where, "labels": labels},
        "spec": {"containers": [container], "automountServiceAccountToken": False},
    }


def job(where: str, name: str, *, labels: dict[str, str], pod_labels: dict[str, str]) -> Manifest:
    inner = {"containers": [{"name": "c", "image": "example/none"}], "restartPolicy": "Never"}
    template = {"metadata": {"labels": pod_labels}, "spec": inner}
    metadata = {"name": name, "namespace": where, "labels": labels}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}}


@pytest.fixture(scope="module")
def user(installed: lc.Cluster) -> Iterator[str]:
    """An admin of one namespace. Without the policy, whoever may create Jobs there can lie about its artifacts."""
    namespace(installed, WHERE)
    kubectl(installed, "-n", WHERE, "create", "serviceaccount", "default", check=False)
    for name in ("eve", "controller"):
        user = "eve" if name == "eve" else JOB_CONTROLLER
        kubectl(installed, "-n", WHERE, "create", "rolebinding", name, "--clusterrole=admin", f"--user={user}")
    apply(installed, [m for m in render(values={"reserveLabels": {"enabled": True}}) if "Validating" in m["kind"]])
    until(lambda: create(installed, "eve", pod(WHERE, "probe", **OURS)) != "", lambda: "the policy is in force")
    yield "eve"
    kinds = "validatingadmissionpolicybinding,validatingadmissionpolicy"
    kubectl(installed, "delete", kinds, "checkpoint-operator-labels")


def create(cluster: lc.Cluster, user: str, body: Manifest, *flags: str) -> str:
    """What the API server says against it; nothing where it takes it."""
    arguments = flags or ("--dry-run=server",)
    done = kubectl(cluster, "create", f"--as={user}", *arguments, "-f", "-", stdin=json.dumps(body), check=False)
    return "" if done.returncode == 0 else done.stderr


def test_a_user_makes_no_pod_and_no_job_with_our_labels(installed: lc.Cluster, user: str) -> None:
    for body in (
        pod(WHERE, "liar", **OURS),
        pod(WHERE, "liar", **{"checkpoints.rlhf.dev/anything": "x"}),
        job(WHERE, "liar", labels=OURS, pod_labels={}),
        job(WHERE, "liar", labels={}, pod_labels=OURS),
    ):
        assert "belong to the checkpoint operator" in create(installed, user, body)


def test_everything_else_is_as_it_was(installed: lc.Cluster, user: str) -> None:
    for body in (
        pod(WHERE, "honest", app="x"),
        pod(WHERE, "honest"),
        job(WHERE, "honest", labels={"app": "x"}, pod_labels={"checkpoints.rlhf.dev.example/x": "y"}),
        job(WHERE, "honest", labels={}, pod_labels={}),
    ):
        assert create(installed, user, body) == ""


def test_the_operator_makes_its_jobs_and_the_job_controller_their_pods(installed: lc.Cluster, user: str) -> None:
    assert create(installed, OPERATOR, job(WHERE, "mover", labels=OURS, pod_labels=OURS)) == ""
    assert create(installed, JOB_CONTROLLER, pod(WHERE, "mover", **OURS)) == ""


def test_labels_are_neither_put_on_nor_taken_off_later(installed: lc.Cluster, user: str) -> None:
    assert create(installed, user, pod(WHERE, "later"), "--save-config=false") == ""
    assert create(installed, JOB_CONTROLLER, pod(WHERE, "ours", **OURS), "--save-config=false") == ""

    def label(name: str, *labels: str) -> str:
        done = kubectl(installed, "-n", WHERE, "label", "pod", name, *labels, "--overwrite", f"--as={user}", check=False)
        return done.stderr

    for name, change in (
        ("later", "checkpoints.rlhf.dev/artifact-uid=1234"),
        ("ours", "checkpoints.rlhf.dev/artifact-uid=another"),
        ("ours", "checkpoints.rlhf.dev/artifact-uid-"),
    ):
        assert "belong to the checkpoint operator" in label(name, change)
    assert label("later", "app=x") == ""
    assert label("ours", "app=x") == ""


def test_a_suspended_job_does_not_get_our_labels_for_its_pods_later(installed: lc.Cluster, user: str) -> None:
    """The template of a suspended Job may be changed, and its pods are the Job controller's, whom nobody asks."""
    for who, name, labels in ((user, "sleeper", {}), (OPERATOR, "sleeping-mover", OURS)):
        body = job(WHERE, name, labels=labels, pod_labels=labels)
        body["spec"]["suspend"] = True
        assert create(installed, who, body, "--save-config=false") == ""

    def change(name: str, labels: dict[str, str | None]) -> str:
        patch = json.dumps({"spec": {"template": {"metadata": {"labels": labels}}}})
        flags = ("--type=merge", "-p", patch, f"--as={user}")
        return kubectl(installed, "-n", WHERE, "patch", "job", name, *flags, check=False).stderr

    for name, labels in (
        ("sleeper", OURS),
        ("sleeping-mover", {"checkpoints.rlhf.dev/artifact-uid": "another"}),
        ("sleeping-mover", dict.fromkeys(OURS)),
    ):
        assert "belong to the checkpoint operator" in change(name, labels)
    assert change("sleeper", {"app": "x"}) == ""
    assert change("sleeping-mover", {"app": "x"}) == ""
