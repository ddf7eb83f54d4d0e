"""The Job of a mover: what it holds to whatever an artifact says, and which live Job is it."""

import copy
import json
import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from job_world import NAME, SECRET, UID, artifact, claim, pod, rules, to_file
from pod_security import violations

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import PLAN_MAX_BYTES
from checkpoint_operator.api.protocol import Failure, Operation, Plan
from checkpoint_operator.controller.config_jobs import JobRules
from checkpoint_operator.controller.jobs.adoption import equals
from checkpoint_operator.controller.jobs.bounds import refuse
from checkpoint_operator.controller.jobs.holder import Placement, assess
from checkpoint_operator.controller.jobs.template import render

RULES = rules()
PLACE = Placement(run_as_user=1000, run_as_group=100)
LOST = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"]


def job(
    of: CheckpointArtifact | None = None,
    place: Placement = PLACE,
    by: JobRules = RULES,
    operation: Operation = Operation.UPLOAD,
) -> dict[str, Any]:
    rendered = render(NAME, of or artifact(), operation, place, by, earlier_mover_gone=True)
    assert isinstance(rendered, dict), rendered
    return rendered


def pod_of(rendered: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = rendered["spec"]["template"]["spec"]
    return spec


def container_of(rendered: dict[str, Any]) -> dict[str, Any]:
    [container] = pod_of(rendered)["containers"]
    found: dict[str, Any] = container
    return found


def variables_of(rendered: dict[str, Any]) -> dict[str, str]:
    variables = {item["name"]: expand(item["value"]) for item in container_of(rendered)["env"]}
    assert len(variables) == len(container_of(rendered)["env"])
    return variables


def expand(text: str) -> str:
    """What the kubelet makes of a variable's value: ``$$`` is a dollar, ``$(NAME)`` another variable."""
    assert "$(" not in text.replace("$$", "")
    return text.replace("$$", "$")


def plan_of(rendered: dict[str, Any]) -> Plan:
    return Plan.model_validate_json(variables_of(rendered)["CHECKPOINT_PLAN"])


def mounts_of(rendered: dict[str, Any]) -> dict[str, tuple[Any, bool]]:
    """Mount path → (the volume's source, read only)."""
    volumes = {volume["name"]: volume for volume in pod_of(rendered)["volumes"]}
    assert len(volumes) == len(pod_of(rendered)["volumes"])
    return {
        mount["mountPath"]: (volumes[mount["name"]], mount.get("readOnly", False))
        for mount in container_of(rendered)["volumeMounts"]
    }


def claim_volume(name: str, of: str) -> dict[str, Any]:
    return {"name": name, "persistentVolumeClaim": {"claimName": of}}


# ---- what every Job is


def test_the_job_never_tries_again_by_itself_has_no_end_of_its_own_and_stays_until_it_was_read() -> None:
    spec = job()["spec"]
    assert (spec["backoffLimit"], spec["completions"], spec["parallelism"]) == (0, 1, 1)
    assert pod_of(job())["restartPolicy"] == "Never"
    assert "activeDeadlineSeconds" not in spec
    assert "ttlSecondsAfterFinished" not in spec
    assert "activeDeadlineSeconds" not in pod_of(job())


def test_the_cause_of_a_failure_outlives_the_pod() -> None:
    disrupted, exited = job()["spec"]["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert exited["action"] == "FailJob"
    assert exited["onExitCodes"] == {"containerName": "mover", "operator": "NotIn", "values": [0]}


def test_the_job_belongs_to_its_artifact_and_both_job_and_pod_say_so() -> None:
    rendered = job()
    [owner] = rendered["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["name"], owner["controller"], owner["blockOwnerDeletion"]) == (UID, "step-1000", True, True)
    ours = {"checkpoints.rlhf.dev/artifact-uid": UID, "checkpoints.rlhf.dev/artifact-name": "step-1000"}
    assert rendered["metadata"]["labels"] == rendered["spec"]["template"]["metadata"]["labels"] == ours
    assert (rendered["metadata"]["name"], rendered["metadata"]["namespace"]) == (NAME, "team-a")


def test_the_pod_is_restricted_and_has_no_token_and_no_list_of_services() -> None:
    assert [*violations(pod_of(job()))] == []
    assert pod_of(job())["automountServiceAccountToken"] is False
    assert pod_of(job())["enableServiceLinks"] is False
    assert "serviceAccountName" not in pod_of(job())


def test_what_runs_is_the_admins_alone() -> None:
    container = container_of(job(by=rules(imagePullPolicy="Always")))
    assert container["command"] == ["mover"]
    assert "args" not in container
    assert (container["image"], container["imagePullPolicy"]) == ("registry.example/checkpoint-operator:0.1.0", "Always")
    assert container["terminationMessagePath"] == variables_of(job())["CHECKPOINT_TERMINATION_MESSAGE"]


def test_pull_secrets_are_those_of_the_namespace_else_those_for_all() -> None:
    both = rules(imagePullSecrets={"*": ["everywhere"], "team-a": ["a", "b"]})
    assert pod_of(job(by=both))["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
    assert pod_of(job(by=rules(imagePullSecrets={"*": ["all"]})))["imagePullSecrets"] == [{"name": "all"}]
    assert "imagePullSecrets" not in pod_of(job(by=rules(imagePullSecrets={"team-b": ["b"]})))


# ---- volumes


def test_an_upload_to_a_store_mounts_the_source_read_only_and_the_secret_it_names() -> None:
    mounts = mounts_of(job())
    assert mounts["/source"] == (claim_volume("source", "dpo-output"), True)
    volume, read_only = mounts["/var/run/checkpoint/credentials"]
    assert read_only
    assert volume["secret"] == {"secretName": "bucket-keys", "defaultMode": 0o444, "optional": False}
    assert mounts["/tmp"] == ({"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}, False)
    assert len(mounts) == 3


def test_an_upload_into_a_claim_mounts_that_one_read_write_and_no_secret() -> None:
    mounts = mounts_of(job(artifact(target=to_file())))
    assert mounts["/source"] == (claim_volume("source", "dpo-output"), True)
    assert mounts["/target"] == (claim_volume("target", "archive"), False)
    assert set(mounts) == {"/source", "/target", "/tmp"}


def test_an_upload_into_the_same_claim_mounts_one_volume_twice() -> None:
    mounts = mounts_of(job(artifact(target=to_file("dpo-output"))))
    assert mounts["/source"] == (claim_volume("source", "dpo-output"), True)
    assert mounts["/target"] == (claim_volume("source", "dpo-output"), False)


def test_a_deletion_mounts_no_source() -> None:
    rendered = job(operation=Operation.DELETE)
    assert set(mounts_of(rendered)) == {"/var/run/checkpoint/credentials", "/tmp"}
    assert plan_of(rendered).source is None
    assert mounts_of(job(artifact(target=to_file()), operation=Operation.DELETE))["/target"] == (
        claim_volume("target", "archive"),
        False,
    )


def test_no_mount_has_a_sub_path() -> None:
    assert "subPath" not in json.dumps(job(artifact(target=to_file())))


# ---- the plan


def test_the_plan_says_where_things_are_mounted_and_whose_keys_are_used() -> None:
    target = {"uri": "s3://bucket/c", "region": "eu-1", "endpoint": "https://minio.example", **SECRET}
    target["s3"] = {"forcePathStyle": True, "storageClass": "COLD", "sseKMSKeyID": "k"}
    plan = plan_of(job(artifact(target=target, mover={"maxBytesPerSecond": 70_000}), by=rules(caBundle=CERTIFICATE)))
    options = plan.options
    assert (options.endpoint, options.region, options.force_path_style) == ("https://minio.example", "eu-1", True)
    assert (options.storage_class, options.sse_kms_key_id, options.max_bytes_per_second) == ("COLD", "k", 70_000)
    assert (options.credentials_directory, options.allow_ambient_credentials) == ("/var/run/checkpoint/credentials", False)
    assert (options.ca_bundle_pem, options.ca_bundle, options.file_root) == (CERTIFICATE, None, None)
    assert options.only_this_endpoint
    assert plan.source is not None
    assert (plan.source.root, plan.source.path) == ("/source", "checkpoint-1000")
    assert (plan.operation, plan.artifact_uid, plan.target_uri) == (Operation.UPLOAD, UID, "s3://bucket/c")
    assert (plan.earlier_mover_gone, plan.keep_committed, plan.lock_file) == (True, True, None)


CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def test_the_fence_and_the_policy_are_passed_on() -> None:
    rendered = render(NAME, artifact(deletionPolicy="Delete"), Operation.DELETE, PLACE, RULES, earlier_mover_gone=False)
    assert isinstance(rendered, dict)
    plan = plan_of(rendered)
    assert (plan.operation, plan.earlier_mover_gone, plan.keep_committed) == (Operation.DELETE, False, False)


def test_without_a_secret_the_pods_own_identity_is_used_and_into_a_claim_none() -> None:
    cloud = artifact(
        target={"uri": "azure://container/c", "azure": {"account": "archive"}}, mover={"serviceAccountName": "m"}
    )
    rendered = job(cloud)
    assert plan_of(rendered).options.allow_ambient_credentials
    assert plan_of(rendered).options.azure_account == "archive"
    assert plan_of(rendered).options.credentials_directory is None
    assert pod_of(rendered)["serviceAccountName"] == "m"
    assert pod_of(rendered)["automountServiceAccountToken"] is False
    assert rendered["spec"]["template"]["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    into_claim = plan_of(job(artifact(target=to_file())))
    assert not into_claim.options.allow_ambient_credentials
    assert into_claim.options.file_root == "/target"


@pytest.mark.parametrize(
    ("target", "mover", "setting", "aws", "google"),
    [
        ({"uri": "s3://b/c", **SECRET}, {}, "Never", "true", "true"),
        ({"uri": "s3://b/c", **SECRET}, {}, "Always", "true", "true"),
        ({"uri": "s3://b/c"}, {}, "Always", "false", "false"),
        ({"uri": "gs://b/c"}, {"serviceAccountName": "m"}, "Never", "true", "true"),
        ({"uri": "gs://b/c"}, {"serviceAccountName": "m"}, "WorkloadIdentity", "true", "false"),
        ({"uri": "s3://b/c"}, {"serviceAccountName": "m"}, "WorkloadIdentity", "true", "true"),
        ({"uri": "gs://b/c", **SECRET}, {"serviceAccountName": "m"}, "WorkloadIdentity", "true", "true"),
    ],
)
def test_the_metadata_address_is_off_but_for_what_the_admin_allowed(
    target: Any, mover: Any, setting: str, aws: str, google: str
) -> None:
    variables = variables_of(job(artifact(target=target, mover=mover), by=rules(instanceMetadata=setting)))
    assert (variables["AWS_EC2_METADATA_DISABLED"], variables["NO_GCE_CHECK"]) == (aws, google)
    assert ("AZURE_TOKEN_CREDENTIALS" in variables) is (aws == "false")


def test_the_admins_proxy_is_the_movers() -> None:
    proxy = {"httpsProxy": "http://u:p$(HOME)$@proxy.example:3128", "noProxy": ".svc,10.0.0.0/8"}
    variables = variables_of(job(by=rules(proxy=proxy)))
    assert (variables["HTTPS_PROXY"], variables["NO_PROXY"]) == (proxy["httpsProxy"], proxy["noProxy"])
    assert "HTTP_PROXY" not in variables


def test_a_plan_that_the_kernel_would_not_take_is_a_failure_with_what_to_shorten() -> None:
    include = [f"{n:03}" + "\u00e4" * 509 for n in range(64)]
    rendered = render(NAME, artifact(), Operation.UPLOAD, PLACE, RULES, True)
    assert isinstance(rendered, dict)
    source = {"persistentVolumeClaim": {"claimName": "v"}, "path": "c", "include": include, "exclude": include}
    failure = render(NAME, artifact(source=source), Operation.UPLOAD, PLACE, RULES, True)
    assert isinstance(failure, Failure)
    assert failure.reason is Reason.INVALID_SPEC
    assert str(PLAN_MAX_BYTES) in failure.message
    assert "spec.source.include" in failure.message


# ---- where and as whom


def test_the_pod_runs_as_the_placement_says() -> None:
    place = Placement(1000, 100, fs_group=2000, supplemental_groups=(5, 6), selinux_level="s0:c1,c2")
    security = pod_of(job(place=place))["securityContext"]
    assert security == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 100,
        "fsGroup": 2000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "supplementalGroups": [5, 6],
        "seLinuxOptions": {"level": "s0:c1,c2"},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not {"fsGroup", "supplementalGroups", "seLinuxOptions"} & set(pod_of(job())["securityContext"])


def test_root_where_it_was_allowed_keeps_every_other_restriction() -> None:
    rendered = job(place=Placement(0, 65532))
    assert {*violations(pod_of(rendered))} == {"runAsNonRoot", "runAsUser"}
    assert pod_of(rendered)["securityContext"]["runAsUser"] == 0


def test_a_pinned_mover_goes_by_the_nodes_name_asks_for_little_and_forgets_the_node_selector() -> None:
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    place = Placement(1000, 100, node="node-a", tolerations=(gpu,), small_requests=True)
    of = artifact(mover={"resources": {"requests": {"cpu": 2, "memory": "1Gi"}}, "nodeSelector": {"disk": "ssd"}})
    rendered = job(of, place)
    [term] = pod_of(rendered)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term == {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-a"]}]}
    assert "nodeName" not in pod_of(rendered)
    assert "nodeSelector" not in pod_of(rendered)
    assert gpu in pod_of(rendered)["tolerations"]
    assert container_of(rendered)["resources"] == {
        "requests": {"cpu": "10m", "memory": "64Mi"},
        "limits": {"memory": "1Gi"},
    }


def test_a_mover_that_may_go_anywhere_goes_where_the_artifact_says_else_where_the_admin_says() -> None:
    by = rules(nodeSelector={"pool": "cpu"}, priorityClassName="low")
    assert pod_of(job(by=by))["nodeSelector"] == {"pool": "cpu"}
    assert pod_of(job(by=by))["priorityClassName"] == "low"
    of = artifact(mover={"nodeSelector": {"disk": "ssd"}, "priorityClassName": "high"})
    assert pod_of(job(of, by=by))["nodeSelector"] == {"disk": "ssd"}
    assert pod_of(job(of, by=by))["priorityClassName"] == "high"


def test_on_a_lost_node_no_mover_stays_whatever_else_is_tolerated() -> None:
    everything = {"operator": "Exists"}
    for_ever = {"key": LOST[1], "operator": "Exists", "effect": "NoExecute"}
    place = Placement(1000, 100, node="node-a", tolerations=(everything, for_ever, everything))
    of = artifact(mover={"tolerations": [{"key": "gpu", "operator": "Exists"}]})
    tolerations = pod_of(job(of, place, rules(nodeLostSeconds=7, tolerations=[{"key": "all"}])))["tolerations"]
    # The first toleration that matches a taint decides.
    assert [(one["key"], one["tolerationSeconds"]) for one in tolerations[:2]] == [(key, 7) for key in LOST]
    assert tolerations[2:] == [{"key": "all"}, {"key": "gpu", "operator": "Exists"}, everything, for_ever]


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, {"requests": {"cpu": "100m", "memory": "192Mi"}, "limits": {"memory": "512Mi"}}),
        (
            {"limits": {"memory": "128Mi"}},
            {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "128Mi"}},
        ),
        ({"requests": {"memory": "1Gi"}}, {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}),
        (
            {"requests": {"cpu": 2}, "limits": {"cpu": "2000m", "ephemeral-storage": "1G"}},
            {
                "requests": {"cpu": "2", "memory": "192Mi"},
                "limits": {"memory": "512Mi", "cpu": "2000m", "ephemeral-storage": "1G"},
            },
        ),
    ],
)
def test_what_is_asked_for_is_filled_up_and_no_request_is_above_its_limit(asked: Any, given: Any) -> None:
    of = artifact(mover={"resources": asked} if asked else None)
    assert container_of(job(of))["resources"] == given


def test_labels_and_annotations_are_the_pods_and_the_queue_is_the_jobs() -> None:
    labels = {"team": "a", "kueue.x-k8s.io/queue-name": "uploads"}
    rendered = job(artifact(mover={"labels": labels, "annotations": {"note": "x"}}))
    assert rendered["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "uploads"
    assert "team" not in rendered["metadata"]["labels"]
    pod_metadata = rendered["spec"]["template"]["metadata"]
    assert pod_metadata["labels"]["team"] == "a"
    assert "kueue.x-k8s.io/queue-name" not in pod_metadata["labels"]
    assert pod_metadata["annotations"] == {"note": "x"}


def test_no_label_of_a_users_takes_the_place_of_ours() -> None:
    forged = {"checkpoints.rlhf.dev/artifact-uid": "x", "checkpoints.rlhf.dev/artifact-name": "y"}
    labels = job(artifact(mover={"labels": forged}))["spec"]["template"]["metadata"]["labels"]
    assert labels == {"checkpoints.rlhf.dev/artifact-uid": UID, "checkpoints.rlhf.dev/artifact-name": "step-1000"}


# ---- hostile artifacts

HOSTILE_TEXT = st.one_of(
    st.sampled_from(
        [
            "$(id)",
            "$(HOME)",
            "$$(HOME)",
            "$(KUBERNETES_SERVICE_HOST)",
            "`id`; rm -rf /",
            '","command":["sh","-c","id"],"x":"',
            "\n  image: evil\n",
            "---\nkind: Pod",
            "{{ .Values.x }}",
            "!!python/object:os.system",
            "\u202e\u2028\u0661",
            "\x1b[2J",
            "../../etc/passwd",
            "'\"\\",
        ]
    ),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60),
)
WORD = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=20)
AMOUNT = st.sampled_from(["1m", "100m", "1", "0.5", "64Mi", "1Gi", "1.5Gi", "2G"])
AMOUNTS = st.dictionaries(st.sampled_from(["cpu", "memory", "ephemeral-storage"]), AMOUNT)
TARGETS = st.one_of(
    st.builds(lambda b, p, s: {"uri": f"s3://bucket{b}/{p}", "credentialsSecretRef": {"name": s}}, WORD, WORD, WORD),
    st.builds(lambda p, c: to_file(c) | {"uri": f"file:///{p}"}, WORD, st.sampled_from(["dpo-output", "archive", "third"])),
    st.builds(lambda b, r: {"uri": f"gs://bucket{b}/c", "region": r}, WORD, WORD),
)
MOVERS = st.fixed_dictionaries(
    {},
    optional={
        "resources": st.fixed_dictionaries({}, optional={"requests": AMOUNTS, "limits": AMOUNTS}),
        "nodeSelector": st.dictionaries(WORD, WORD, max_size=3),
        "tolerations": st.lists(
            st.fixed_dictionaries(
                {"key": WORD},
                optional={"value": WORD, "effect": st.sampled_from(["NoSchedule", "NoExecute"])},
            ),
            max_size=3,
        ),
        "priorityClassName": WORD,
        "serviceAccountName": WORD,
        "runAsUser": st.integers(1, 2**31 - 1),
        "maxBytesPerSecond": st.integers(64 << 10, 2**53),
        "labels": st.dictionaries(WORD, WORD, max_size=3),
        "annotations": st.dictionaries(WORD, HOSTILE_TEXT, max_size=3),
    },
)
PODS = st.lists(
    st.builds(
        lambda claim, phase, node, user, group, level: pod(
            claim=claim,
            phase=phase,
            node=node,
            pod_security={"runAsUser": user, "fsGroup": group, "seLinuxOptions": {"level": level, "type": "spc_t"}},
            tolerations=[{"operator": "Exists"}],
        ),
        st.sampled_from(["dpo-output", "archive", "other"]),
        st.sampled_from(["Running", "Pending", "Succeeded"]),
        st.sampled_from(["node-a", None]),
        st.integers(0, 70000),
        st.one_of(st.none(), st.integers(0, 70000)),
        WORD,
    ),
    max_size=4,
)
GENEROUS = rules(
    allowedTolerationKeys=["*"],
    allowedPriorityClasses=["*"],
    maxResources={},
    instanceMetadata="Always",
    imagePullSecrets={"*": ["pull"]},
)


@given(
    target=TARGETS,
    mover=MOVERS,
    pods=PODS,
    texts=st.lists(HOSTILE_TEXT, min_size=4, max_size=4),
    tags=st.dictionaries(HOSTILE_TEXT, HOSTILE_TEXT, max_size=4),
    operation=st.sampled_from(Operation),
    modes=st.sampled_from(["ReadWriteOnce", "ReadWriteMany"]),
)
def test_whatever_a_valid_artifact_says_its_job_keeps_to_the_invariants(
    target: Any, mover: Any, pods: Any, texts: list[str], tags: Any, operation: Operation, modes: str
) -> None:
    path, glob, name, model = texts
    of = artifact(
        target=target,
        mover=mover,
        source={"persistentVolumeClaim": {"claimName": "dpo-output"}, "path": path, "include": [glob], "exclude": [name]},
        training={"jobName": name, "baseModel": model},
        tags=tags,
    )
    if refuse(of, GENEROUS) is not None:
        return
    account = {"metadata": {"annotations": {"checkpoints.rlhf.dev/allow-mover": "true"}}}
    claims = {name: claim(modes) for name in ("dpo-output", "archive", "third")}
    place = assess(of, operation, claims, pods, {}, account, GENEROUS)
    if not isinstance(place, Placement):
        return
    rendered = job(of, place, GENEROUS, operation)
    spec = pod_of(rendered)
    assert [*violations(spec)] == []
    assert spec["automountServiceAccountToken"] is False
    assert {"initContainers", "ephemeralContainers", "hostUsers", "runtimeClassName", "nodeName"}.isdisjoint(spec)
    container = container_of(rendered)
    assert (container["image"], container["command"]) == (GENEROUS.image, ["mover"])
    assert {"args", "envFrom", "lifecycle", "ports", "workingDir", "stdin"}.isdisjoint(container)
    # Claims and Secret: only those that the artifact names, each at its fixed place.
    file = target.get("persistentVolumeClaim", {}).get("claimName")
    wanted = {*(["dpo-output"] if operation is Operation.UPLOAD else []), *([file] if file else [])}
    volumes = spec["volumes"]
    assert {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v} == wanted
    secret = target.get("credentialsSecretRef", {}).get("name")
    assert [v["secret"]["secretName"] for v in volumes if "secret" in v] == ([secret] if secret else [])
    assert {v["name"] for v in volumes} <= {"source", "target", "credentials", "tmp"}
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/tmp", *(["/target"] if file else [])}
    # Every word of the user's arrives in the plan as it is, and only there.
    known = {"CHECKPOINT_PLAN", "CHECKPOINT_TERMINATION_MESSAGE", "HOME", "TMPDIR", "PYTHONUNBUFFERED"}
    known |= {"AWS_EC2_METADATA_DISABLED", "NO_GCE_CHECK", "AZURE_TOKEN_CREDENTIALS"}
    assert set(variables_of(rendered)) <= known
    plan = plan_of(rendered)
    assert plan.metadata.tags == tags
    assert (plan.metadata.job_name, plan.metadata.base_model) == (name, model)
    if operation is Operation.UPLOAD:
        assert plan.source is not None
        assert (plan.source.path, plan.source.include, plan.source.exclude) == (path, [glob], [name])
    # One and the same artifact gives one and the same Job, and it is its own.
    assert job(of, place, GENEROUS, operation) == rendered
    assert json.loads(json.dumps(rendered)) == rendered
    assert equals(as_served(rendered), rendered)


# ---- adoption


def as_served(rendered: dict[str, Any]) -> dict[str, Any]:
    """What an API server of 1.37 makes of it (``tests/cluster/test_job_admission.py`` asks one)."""
    live = copy.deepcopy(rendered)
    live["metadata"] |= {"uid": "job-uid", "resourceVersion": "1", "generation": 1, "managedFields": [{}]}
    live["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": "job-uid"}}
    generated = {
        "batch.kubernetes.io/controller-uid": "job-uid",
        "batch.kubernetes.io/job-name": NAME,
        "controller-uid": "job-uid",
        "job-name": NAME,
    }
    template = live["spec"]["template"]
    template["metadata"]["labels"] |= generated
    template["metadata"]["creationTimestamp"] = None
    if "serviceAccountName" in template["spec"]:
        template["spec"]["serviceAccount"] = template["spec"]["serviceAccountName"]
    live["status"] = {"active": 1}
    return live


def full() -> dict[str, Any]:
    mover = {
        "serviceAccountName": "m",
        "labels": {"team": "a"},
        "annotations": {"note": "x"},
        "nodeSelector": {"disk": "ssd"},
        "resources": {"requests": {"cpu": "1000m", "memory": "0.5Gi"}, "limits": {"cpu": "1.5"}},
    }
    return job(artifact(target={"uri": "s3://b/c", **SECRET}, mover=mover), Placement(1, 2, 3, (4,), "s0"))


def test_what_the_api_server_makes_of_our_job_is_our_job() -> None:
    for rendered in (job(), full(), job(artifact(target=to_file())), job(operation=Operation.DELETE)):
        assert equals(as_served(rendered), rendered)


def test_a_quantity_in_another_spelling_is_the_same() -> None:
    rendered = full()
    live = as_served(rendered)
    live["spec"]["template"]["spec"]["containers"][0]["resources"] = {
        "requests": {"cpu": "1", "memory": "512Mi"},
        "limits": {"cpu": "1500m", "memory": "512Mi"},
    }
    assert equals(live, rendered)


def test_what_kueue_adds_is_allowed_for() -> None:
    rendered = full()
    live = as_served(rendered)
    live["spec"]["suspend"] = True
    live["metadata"]["finalizers"] = ["kueue.x-k8s.io/resource-in-use"]
    live["metadata"]["annotations"] = {"kueue.x-k8s.io/workload": "w"}
    template = live["spec"]["template"]
    template["metadata"]["labels"]["kueue.x-k8s.io/podset"] = "main"
    template["metadata"]["annotations"]["kueue.x-k8s.io/workload"] = "w"
    template["spec"]["nodeSelector"]["cloud.google.com/gke-nodepool"] = "spot"
    template["spec"]["tolerations"].append({"key": "spot", "operator": "Exists"})
    assert equals(live, rendered)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(live: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        node: Any = live
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node.insert(int(last), value)
        else:
            node[last] = value

    return apply


POD = "spec.template.spec"
MAIN = f"{POD}.containers.0"
FORGED = {
    "another image": change(f"{MAIN}.image", "evil"),
    "another command": change(f"{MAIN}.command", ["sh"]),
    "arguments": change(f"{MAIN}.args", ["-c", "id"]),
    "another plan": change(f"{MAIN}.env.0", {"name": "CHECKPOINT_PLAN", "value": "{}"}),
    "a variable more": change(f"{MAIN}.env.1", {"name": "LD_PRELOAD", "value": "/source/x.so"}),
    "variables from a Secret": change(f"{MAIN}.envFrom", [{"secretRef": {"name": "x"}}]),
    "a container more": change(f"{POD}.containers.0", {"name": "x", "image": "evil"}),
    "an init container": change(f"{POD}.initContainers", [{"name": "x", "image": "evil"}]),
    "a volume more": change(f"{POD}.volumes.0", {"name": "x", "hostPath": {"path": "/"}}),
    "another claim": change(f"{POD}.volumes.0.persistentVolumeClaim.claimName", "other"),
    "another Secret": change(f"{POD}.volumes.1.secret.secretName", "other"),
    "a Secret that may be missing": change(f"{POD}.volumes.1.secret.optional", True),
    "a source that may be written to": change(f"{MAIN}.volumeMounts.0.readOnly", False),
    "a sub path": change(f"{MAIN}.volumeMounts.0.subPath", "../x"),
    "another user": change(f"{POD}.securityContext.runAsUser", 0),
    "no user": change(f"{POD}.securityContext.runAsUser", None),
    "another group": change(f"{POD}.securityContext.fsGroup", 9),
    "another change policy": change(f"{POD}.securityContext.fsGroupChangePolicy", "Always"),
    "a sysctl": change(f"{POD}.securityContext.sysctls", [{"name": "x", "value": "1"}]),
    "a user of the container's": change(f"{MAIN}.securityContext.runAsUser", 1),
    "a writable root": change(f"{MAIN}.securityContext.readOnlyRootFilesystem", False),
    "a capability": change(f"{MAIN}.securityContext.capabilities.add", ["NET_ADMIN"]),
    "the host's network": change(f"{POD}.hostNetwork", True),
    "a node by name": change(f"{POD}.nodeName", "node-b"),
    "an affinity": change(f"{POD}.affinity", {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [1]}}),
    "another node selector": change(f"{POD}.nodeSelector.disk", "hdd"),
    "no end on a lost node": change(f"{POD}.tolerations.0", {"operator": "Exists"}),
    "another account": change(f"{POD}.serviceAccountName", "admin"),
    "another account by its old name": change(f"{POD}.serviceAccount", "admin"),
    "a token": change(f"{POD}.automountServiceAccountToken", True),
    "another scheduler": change(f"{POD}.schedulerName", "mine"),
    "a deadline": change("spec.activeDeadlineSeconds", 1),
    "a time to live": change("spec.ttlSecondsAfterFinished", 0),
    "another backoff": change("spec.backoffLimit", 6),
    "two pods": change("spec.parallelism", 2),
    "no failure policy": change("spec.podFailurePolicy", None),
    "a policy that ignores failures": change("spec.podFailurePolicy.rules.1.action", "Ignore"),
    "a selector of its own": change("spec.manualSelector", True),
    "another controller": change("spec.managedBy", "example.com/mine"),
    "a success policy": change("spec.successPolicy", {"rules": [1]}),
    "another owner": change("metadata.ownerReferences.0.uid", "other"),
    "an owner more": change("metadata.ownerReferences.0", {"kind": "ConfigMap"}),
    "no owner": change("metadata.ownerReferences", None),
    "another artifact's label": change("metadata.labels", {"checkpoints.rlhf.dev/artifact-uid": "other"}),
    "a label of ours more": change("metadata.labels", {"checkpoints.rlhf.dev/operation": "x"}),
    "a pod's label more": change("spec.template.metadata.labels.istio", "x"),
    "a pod's annotation more": change("spec.template.metadata.annotations", {"note": "x", "sidecar": "x"}),
    "a finalizer of the pod's": change("spec.template.metadata.finalizers", ["x"]),
    "memory without an end": change(f"{MAIN}.resources.limits", {}),
    "an amount that is none": change(f"{MAIN}.resources.limits", {"cpu": "x", "memory": "512Mi"}),
    "a device more": change(f"{MAIN}.resources.limits", {"cpu": "1.5", "memory": "512Mi", "nvidia.com/gpu": "1"}),
    "a bigger tmp": change(f"{POD}.volumes.2.emptyDir.sizeLimit", "1Ti"),
    "a tmp in memory": change(f"{POD}.volumes.2.emptyDir.medium", "Memory"),
    "a lifecycle hook": change(f"{MAIN}.lifecycle", {"preStop": {"exec": {"command": ["id"]}}}),
    "nothing": lambda live: live.clear(),
    "no template": change("spec.template", {}),
    "a string for a spec": change(f"{POD}.securityContext", "x"),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_job_that_somebody_else_made_under_our_name_is_not_ours(forge: Callable[[dict[str, Any]], None]) -> None:
    rendered = full()
    live = as_served(rendered)
    assert equals(live, rendered)
    forge(live)
    assert not equals(live, rendered)
