"""The mover's Job before a real API server: taken without a warning, the same when it is read again, and ``restricted``."""

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import local_cluster as lc
from checkpoint_operator.api.artifact import CheckpointArtifact, parse_artifact
from checkpoint_operator.api.protocol import Operation
from checkpoint_operator.controller.config_jobs import JobRules
from checkpoint_operator.controller.jobs.adoption import equals
from checkpoint_operator.controller.jobs.bounds import refuse
from checkpoint_operator.controller.jobs.holder import Placement
from checkpoint_operator.controller.jobs.template import render
from local_cluster.operator_process import kubectl

NAMESPACE = "restricted"
LEVEL = "pod-security.kubernetes.io"
RULES = JobRules(
    image="checkpoint-operator:dev",
    allowed_endpoints=("*",),
    allowed_toleration_keys=("*",),
    allowed_labels=("team", "empty"),
    image_pull_secrets={"*": ("pull",)},
    proxy={"https_proxy": "http://u:p$(HOME)@proxy.example:3128"},
)
Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def api(cluster: lc.Cluster) -> Iterator[Kubectl]:
    def run(*arguments: str, body: Any = None) -> subprocess.CompletedProcess[str]:
        stdin = json.dumps(body) if body is not None else None
        return kubectl(cluster, "-n", NAMESPACE, *arguments, stdin=stdin, check=False)

    labels = {f"{LEVEL}/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
    done = run("create", "-f", "-", body=namespace)
    assert done.returncode == 0, done.stderr
    run("create", "serviceaccount", "default")  # a controller makes it as well, somewhat later
    yield run
    run("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture
def artifact(api: Kubectl, request: pytest.FixtureRequest) -> Iterator[Callable[..., CheckpointArtifact]]:
    """Creates an artifact as users do: what the CRD refuses never comes to the template."""
    created = []

    def create(**spec: Any) -> CheckpointArtifact:
        body = {
            "apiVersion": "checkpoints.rlhf.dev/v1alpha1",
            "kind": "CheckpointArtifact",
            "metadata": {"generateName": "template-"},
            "spec": {
                "source": {"persistentVolumeClaim": {"claimName": "dpo-output"}, "path": "checkpoint-1000"},
                "target": {"uri": "s3://bucket/dpo/c", "credentialsSecretRef": {"name": "keys"}},
                **spec,
            },
        }
        done = api("create", "-o", "json", "-f", "-", body=body)
        assert done.returncode == 0, done.stderr
        made = parse_artifact(json.loads(done.stdout))
        created.append(made.metadata.name)
        return made

    yield create
    for name in created:
        api("delete", "ckpt", name, "--wait=false")


SPECS: dict[str, dict[str, Any]] = {
    "the plainest": {},
    "into a claim": {
        "target": {"uri": "file:///dpo/c", "persistentVolumeClaim": {"claimName": "archive"}},
    },
    "into the same claim": {
        "target": {"uri": "file:///dpo/c", "persistentVolumeClaim": {"claimName": "dpo-output"}},
    },
    "with everything": {
        "target": {
            "uri": "s3://bucket/dpo/c",
            "endpoint": "https://minio.example:9000",
            "region": "eu-1",
            "credentialsSecretRef": {"name": "keys"},
            "s3": {"forcePathStyle": True, "storageClass": "COLD", "sseKMSKeyID": "$(HOME)"},
        },
        "mover": {
            "resources": {
                "requests": {"cpu": "1000m", "memory": "0.25Gi"},
                "limits": {"cpu": 2, "memory": "1.5Gi", "ephemeral-storage": "1G"},
            },
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [
                {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
                {"key": "slow", "value": "yes", "effect": "NoExecute", "tolerationSeconds": 5},
                {"key": "any"},
            ],
            "runAsUser": 1000,
            "maxBytesPerSecond": 1000000,
            "labels": {"team": "a", "empty": "", "kueue.x-k8s.io/queue-name": "uploads"},
            "annotations": {"note": "a\nb: {c} $(HOME) \u202e"},
        },
    },
    "with hostile words": {
        "source": {
            "persistentVolumeClaim": {"claimName": "dpo-output"},
            "path": "$(HOME)/$$/`id`'\"; rm -rf",
            "include": ['","command":["sh"],"x":"', "\n---\nkind: Pod"],
        },
        "tags": {"$(KUBERNETES_SERVICE_HOST)": "$$(x)", "\x1b[2J": "\u2028"},
    },
}
PLACES = {
    "anywhere": Placement(65532, 65532),
    "pinned": Placement(
        1000,
        100,
        fs_group=2000,
        supplemental_groups=(5, 6),
        selinux_level="s0:c1,c2",
        node="node-a",
        tolerations=({"operator": "Exists"},),
        small_requests=True,
    ),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_job_is_taken_without_a_warning_and_is_ours_when_it_is_read_again(
    api: Kubectl, artifact: Callable[..., CheckpointArtifact], spec: dict[str, Any], place: Placement
) -> None:
    of = artifact(**spec)
    assert refuse(of, RULES) is None
    for operation in Operation:
        name = f"ckpt-{of.metadata.uid}-{[*Operation].index(operation) + 1}"
        rendered = render(name, of, operation, place, RULES, earlier_mover_gone=True)
        assert isinstance(rendered, dict)
        done = api("create", "--validate=strict", "-o", "json", "-f", "-", body={**rendered, **suspended(rendered)})
        assert (done.returncode, done.stderr) == (0, "")
        live = json.loads(api("get", "job", name, "-o", "json").stdout)
        assert equals(live, rendered)
        api("delete", "job", name, "--wait=false")


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_pod_is_admitted_as_restricted(
    api: Kubectl, artifact: Callable[..., CheckpointArtifact], spec: dict[str, Any], place: Placement
) -> None:
    rendered = render("x", artifact(**spec), Operation.UPLOAD, place, RULES, earlier_mover_gone=True)
    assert isinstance(rendered, dict)
    done = api("create", "--dry-run=server", "-f", "-", body=pod_of(rendered))
    assert (done.returncode, done.stderr) == (0, "")


def test_root_is_refused_by_a_restricted_namespace_whatever_ours_says(
    api: Kubectl, artifact: Callable[..., CheckpointArtifact]
) -> None:
    rendered = render("x", artifact(), Operation.UPLOAD, Placement(0, 65532), RULES, earlier_mover_gone=True)
    assert isinstance(rendered, dict)
    done = api("create", "--dry-run=server", "-f", "-", body=pod_of(rendered))
    assert done.returncode != 0
    assert "runAsNonRoot" in done.stderr


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"requests": {"nvidia.com/gpu": 1}}, "only cpu, memory and ephemeral-storage"),
        ({"limits": {"memory": "lots"}}, "spec.mover.resources.limits.memory"),
        ({"limits": {"memory": "-1"}}, "spec.mover.resources.limits.memory"),
        ({"limits": {"cpu": "1e9"}}, "spec.mover.resources.limits.cpu"),
    ],
)
def test_the_crd_takes_quantities_of_three_resources_alone(api: Kubectl, resources: dict[str, Any], says: str) -> None:
    body = {
        "apiVersion": "checkpoints.rlhf.dev/v1alpha1",
        "kind": "CheckpointArtifact",
        "metadata": {"name": "refused"},
        "spec": {
            "source": {"persistentVolumeClaim": {"claimName": "v"}, "path": "c"},
            "target": {"uri": "s3://bucket/c"},
            "mover": {"resources": resources},
        },
    }
    done = api("create", "--dry-run=server", "-f", "-", body=body)
    assert done.returncode != 0
    assert says in done.stderr


def suspended(rendered: dict[str, Any]) -> dict[str, Any]:
    """No pod is to come of it: the folder's cluster has no node, and its Job controller would make one all the same."""
    return {"spec": {**rendered["spec"], "suspend": True}}


def pod_of(rendered: dict[str, Any]) -> dict[str, Any]:
    template = rendered["spec"]["template"]
    metadata = {**template["metadata"], "generateName": "mover-"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
