"""What the admin's rules refuse, each as a sentence; and attacks on every field that a user may write."""

from typing import Any

import pytest
from job_world import SECRET, artifact, rules, to_file

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.controller.jobs import addresses
from checkpoint_operator.controller.jobs.bounds import refuse, service_account_name

HOSTILE = {
    "shell": "$(id); rm -rf / #`id`",
    "JSON": '","command":["sh"],"x":"',
    "newline": "a\nkind: Pod",
    "YAML": "{{ .Values }}: !!python/object",
    "a label's end": "a=b,c",
    "unicode": "\u202eabc\u0661",
    "NUL": "a\x00b",
    "long": "x" * 256,
}


def at(endpoint: str) -> dict[str, Any]:
    return {"uri": "s3://bucket/c", "endpoint": endpoint, **SECRET}


def test_a_plain_artifact_with_a_secret_is_served() -> None:
    assert refuse(artifact(), rules()) is None


def test_a_target_in_a_claim_needs_no_credentials() -> None:
    assert refuse(artifact(target=to_file()), rules()) is None


def test_a_scheme_that_the_admin_left_out_is_refused_with_those_that_are_allowed() -> None:
    failure = refuse(artifact(target=to_file()), rules(allowedSchemes=["s3", "gs"]))
    assert failure is not None
    assert failure.reason is Reason.TARGET_NOT_ALLOWED
    assert "s3://, gs://" in failure.message


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({"uri": "s3://bucket", **SECRET}, Reason.UNSUPPORTED_URI),
        ({"uri": "s3://bucket/../other", **SECRET}, Reason.UNSUPPORTED_URI),
        ({"uri": "file:///c"}, Reason.INVALID_SPEC),
        ({"uri": "s3://bucket/c", "persistentVolumeClaim": {"claimName": "other"}, **SECRET}, Reason.INVALID_SPEC),
    ],
)
def test_what_an_older_crd_may_have_let_in_is_refused_here(target: dict[str, Any], reason: Reason) -> None:
    failure = refuse(artifact(target=target), rules())
    assert failure is not None
    assert failure.reason is reason


# ---- endpoints


@pytest.mark.parametrize(
    ("endpoint", "allowed"),
    [
        ("https://minio.example:9000", ["https://minio.example:9000"]),
        ("https://minio.example:9000/", ["https://minio.example:9000"]),
        ("https://MINIO.example:9000", ["https://minio.example:9000"]),
        ("https://minio.example.:9000", ["https://minio.example:9000"]),
        ("https://minio.example", ["https://minio.example:443"]),
        ("http://minio.example:80", ["http://minio.example"]),
        ("https://a.b.example", ["https://x.example", "https://*.example"]),
        ("https://gateway.example/s3/team-a", ["https://gateway.example/s3"]),
        ("http://10.1.2.3:9000", ["*"]),
        ("http://169.254.20.10:9000", ["http://169.254.20.10:9000"]),  # named by an admin, who knows what it is
    ],
)
def test_an_endpoint_in_the_admins_list_is_served(endpoint: str, allowed: list[str]) -> None:
    assert refuse(artifact(target=at(endpoint)), rules(allowedEndpoints=allowed)) is None


@pytest.mark.parametrize(
    ("endpoint", "allowed"),
    [
        ("https://evil.example", []),
        ("https://evil.example", ["https://minio.example"]),
        ("http://minio.example", ["https://minio.example"]),  # keys in the clear
        ("https://minio.example:9001", ["https://minio.example:9000"]),
        ("https://minio.example.evil.example", ["https://minio.example"]),
        ("https://evilminio.example", ["https://*.minio.example"]),
        ("https://minio.example", ["https://*.minio.example"]),
        ("https://gateway.example/s3x", ["https://gateway.example/s3"]),
        ("https://gateway.example/s3/../admin", ["https://gateway.example/s3"]),
        ("https://gateway.example/s3/%2e%2e/admin", ["https://gateway.example/s3"]),
        ("https://gateway.example/s3\\..\\admin", ["https://gateway.example/s3"]),
        ("https://evil%2eexample", ["*"]),
        ("https://\uff4dinio.example", ["*"]),  # a full-width m, which IDNA makes an m
        ("https://minio.example:99999", ["*"]),
        ("https://minio.example:0", ["*"]),
        ("https://minio.example:", ["*"]),
    ],
)
def test_an_endpoint_that_is_not_in_it_is_refused(endpoint: str, allowed: list[str]) -> None:
    failure = refuse(artifact(target=at(endpoint)), rules(allowedEndpoints=allowed))
    assert failure is not None
    assert failure.reason is Reason.ENDPOINT_NOT_ALLOWED
    assert "spec.target.endpoint" in failure.message


METADATA_HOSTS = [
    "169.254.169.254",
    "169.254.170.2",
    "0xa9fea9fe",
    "0xa9.0xfe.0xa9.0xfe",
    "2852039166",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.16689662",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::a9fe:a9fe]",
    "[::ffff:0:169.254.169.254]",
    "[fe80::1]",
    "[fd00:ec2::254]",
    "[fd00:ec2::23]",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "metadata.google.internal",
    "METADATA.google.internal.",
    "metadata",
    "instance-data.ec2.internal",
    "localhost",
    "ip6-localhost",
    "a.localhost",
    "127.0.0.1",
    "127.1",
    "0177.1",
    "2130706433",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "0.0.0.0",  # noqa: S104
    "0",
    "[::]",
    "255.255.255.255",
    "224.0.0.1",
]


@pytest.mark.parametrize("host", METADATA_HOSTS)
def test_no_spelling_of_a_metadata_address_comes_through_a_wildcard(host: str) -> None:
    failure = refuse(artifact(target=at(f"http://{host}")), rules(allowedEndpoints=["*", "http://*.1", "http://*.internal"]))
    assert failure is not None
    assert failure.reason is Reason.ENDPOINT_NOT_ALLOWED


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "192.168.1.1", "minio", "2130706433.example", "[2001:db8::1]", "1.2.3.4.5", "08.1"]
)
def test_an_address_inside_of_a_cluster_is_the_admins_to_list(host: str) -> None:
    assert addresses.why_internal(host.strip("[]")) is None


@pytest.mark.parametrize(
    ("allowed", "served"),
    [([], False), (["https://archive.blob.core.windows.net"], True), (["https://*.blob.core.windows.net"], True)],
)
def test_a_storage_account_is_an_address_too_since_a_token_is_sent_there(allowed: list[str], served: bool) -> None:
    target = {"uri": "azure://container/c", "azure": {"account": "archive"}, **SECRET}
    failure = refuse(artifact(target=target), rules(allowedEndpoints=allowed))
    assert (failure is None) is served
    if failure is not None:
        assert failure.reason is Reason.ENDPOINT_NOT_ALLOWED
        assert "AZURE_STORAGE_ACCOUNT" in failure.message


# ---- credentials

CLOUD = {"uri": "gs://bucket/c"}


def test_without_any_credentials_it_is_refused_with_the_two_ways_out() -> None:
    failure = refuse(artifact(target=CLOUD), rules())
    assert failure is not None
    assert failure.reason is Reason.CREDENTIALS_MISSING
    assert "credentialsSecretRef" in failure.message
    assert "serviceAccountName" in failure.message


def test_workload_identity_or_the_admins_word_is_enough() -> None:
    assert refuse(artifact(target=CLOUD, mover={"serviceAccountName": "mover"}), rules()) is None
    assert refuse(artifact(target=CLOUD), rules(serviceAccountName="mover")) is None
    assert refuse(artifact(target=CLOUD), rules(instanceMetadata="Always")) is None
    assert refuse(artifact(target=CLOUD), rules(instanceMetadata="WorkloadIdentity")) is not None


def test_the_artifacts_service_account_is_before_the_admins() -> None:
    assert service_account_name(artifact(mover={"serviceAccountName": "mine"}), rules(serviceAccountName="all")) == "mine"
    assert service_account_name(artifact(mover={}), rules(serviceAccountName="all")) == "all"
    assert service_account_name(artifact(), rules()) is None


# ---- spec.mover


def refused(mover: dict[str, Any], **changes: Any) -> str | None:
    failure = refuse(artifact(mover=mover), rules(**changes))
    if failure is None:
        return None
    assert failure.reason is Reason.MOVER_OPTION_NOT_ALLOWED
    assert failure.message.startswith("spec.mover.")
    return failure.message


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"limits": {"memory": "5Gi"}}, ["resources.limits.memory", "5Gi", "4Gi"]),
        ({"requests": {"cpu": "4001m"}}, ["resources.requests.cpu", "4001m", "maximum of 4"]),
        ({"requests": {"ephemeral-storage": "1T"}}, ["resources.requests.ephemeral-storage", "1T"]),
        ({"limits": {"memory": "0"}}, ["resources.limits.memory", "no limit at all"]),
        ({"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}, ["resources.requests.memory", "above", "1Gi"]),
    ],
)
def test_resources_above_a_bound_are_refused_with_field_value_and_bound(resources: Any, says: list[str]) -> None:
    message = refused({"resources": resources})
    assert message is not None
    for word in says:
        assert word in message


def test_resources_within_the_bounds_are_served() -> None:
    resources = {"requests": {"cpu": 4, "memory": "1Gi"}, "limits": {"cpu": "4000m", "memory": "4096Mi"}}
    assert refused({"resources": resources}) is None


def test_where_the_admin_set_no_maximum_there_is_none() -> None:
    assert refused({"resources": {"limits": {"memory": "900Gi"}}}, maxResources={}) is None


@pytest.mark.parametrize(
    ("mover", "changes", "served"),
    [
        ({"priorityClassName": "high"}, {}, False),
        ({"priorityClassName": "high"}, {"allowedPriorityClasses": ["low"]}, False),
        ({"priorityClassName": "low"}, {"allowedPriorityClasses": ["low"]}, True),
        ({"priorityClassName": "system-node-critical"}, {"allowedPriorityClasses": ["*"]}, True),
        ({"nodeSelector": {"disk": "ssd"}}, {}, True),
        ({"nodeSelector": {"disk": "ssd"}}, {"allowedNodeSelectorKeys": []}, False),
        ({"nodeSelector": {"disk": "a b"}}, {}, False),
        ({"nodeSelector": {"di sk": "ssd"}}, {}, False),
        ({"tolerations": [{"key": "gpu", "operator": "Exists"}]}, {}, False),
        ({"tolerations": [{"key": "gpu", "operator": "Exists"}]}, {"allowedTolerationKeys": ["gpu"]}, True),
        ({"tolerations": [{"key": "gpu", "value": "x"}]}, {"allowedTolerationKeys": ["*"]}, True),
        ({"tolerations": [{"operator": "Exists"}]}, {"allowedTolerationKeys": ["*"]}, False),
        ({"tolerations": [{"key": "", "operator": "Exists"}]}, {"allowedTolerationKeys": ["*"]}, False),
        ({"tolerations": [{"key": "gpu", "operator": "Exists", "value": "x"}]}, {"allowedTolerationKeys": ["*"]}, False),
        ({"tolerations": [{"key": "gpu", "tolerationSeconds": 5}]}, {"allowedTolerationKeys": ["*"]}, False),
        ({"labels": {"team": "a"}}, {}, False),
        ({"labels": {"app": "web"}}, {"allowedLabels": ["team"]}, False),
        ({"labels": {"team": "a", "cost-center": ""}}, {"allowedLabels": ["team", "cost-center"]}, True),
        ({"labels": {"kueue.x-k8s.io/queue-name": "uploads"}}, {}, True),
        ({"labels": {"kueue.x-k8s.io/pod-group-name": "x"}}, {}, False),
        ({"labels": {"team": "a b"}}, {"allowedLabels": ["team"]}, False),
        ({"labels": {"example.com/team": "a"}}, {}, False),
        ({"labels": {"example.com/team": "a"}}, {"allowedLabels": ["example.com/team"]}, True),
        ({"labels": {"example.com/team": "a"}}, {"allowedLabels": ["example.com/*"]}, True),
        ({"labels": {"sub.example.com/team": "a"}}, {"allowedLabels": ["example.com/*"]}, False),
        ({"labels": {"checkpoints.rlhf.dev/artifact-uid": "x"}}, {}, False),
        ({"labels": {"sub.checkpoints.rlhf.dev/x": "x"}}, {}, False),
        ({"labels": {"job-name": "x"}}, {}, False),
        ({"labels": {"controller-uid": "x"}}, {}, False),
        ({"labels": {"app.kubernetes.io/name": "x"}}, {}, False),
        ({"labels": {"app.kubernetes.io/name": "x"}}, {"allowedLabels": ["app.kubernetes.io/name"]}, True),
        ({"labels": {"azure.workload.identity/use": "true"}}, {}, False),
        ({"labels": {"sidecar.istio.io/inject": "true"}}, {}, False),
        ({"annotations": {"note": "anything: {goes} here\nreally"}}, {}, True),
        ({"annotations": {"kueue.x-k8s.io/queue-name": "x"}}, {}, False),
        ({"annotations": {"sidecar.istio.io/userVolume": "[]"}}, {}, False),
        ({"annotations": {"vault.hashicorp.com/agent-inject": "true"}}, {}, False),
        ({"annotations": {"iam.amazonaws.com/role": "admin"}}, {}, False),
        ({"annotations": {"container.apparmor.security.beta.kubernetes.io/mover": "unconfined"}}, {}, False),
        ({"annotations": {"seccomp.security.alpha.kubernetes.io/pod": "unconfined"}}, {}, False),
        ({"annotations": {"k8s.v1.cni.cncf.io/networks": "host"}}, {}, False),
        ({"annotations": {"io.katacontainers.config.hypervisor.path": "/x"}}, {}, False),
        ({"annotations": {"io.kubernetes.cri-o.userns-mode": "auto"}}, {}, False),
    ],
)
def test_each_option_of_the_mover_has_its_bound(mover: Any, changes: Any, served: bool) -> None:
    assert (refused(mover, **changes) is None) is served


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_in_keys_and_values_is_refused_in_one_line(hostile: str) -> None:
    open_for_all = {"allowedTolerationKeys": ["*"], "allowedPriorityClasses": ["*"]}
    for mover in (
        {"labels": {hostile: "a"}},
        {"labels": {"a": hostile}},
        {"labels": {f"kueue.x-k8s.io/queue-name{hostile}": "a"}},
        {"labels": {"kueue.x-k8s.io/queue-name": hostile}},
        {"annotations": {hostile: "a"}},
        {"nodeSelector": {hostile: "a"}},
        {"nodeSelector": {"a": hostile}},
        {"tolerations": [{"key": hostile[:200]}]},
        {"tolerations": [{"key": "a", "value": hostile[:63]}]},
    ):
        message = refused(mover, **open_for_all)
        if message is None:
            assert hostile == HOSTILE["long"]  # 63 of them are a fine value
            assert mover in ({"tolerations": [{"key": "a", "value": "x" * 63}]},)
            continue
        assert message.isprintable(), "it goes into logs, events and conditions"
