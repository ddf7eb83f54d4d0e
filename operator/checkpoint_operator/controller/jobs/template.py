"""The mover's Job, made of the admin's rules and the little that an artifact may say. Pure.

Nothing that a user writes becomes part of a command, an image, a volume's name, a path or a variable's name: it goes into
the plan, which is JSON, or into fields that :mod:`.bounds` has looked at.
"""

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.protocol import Failure, Operation
from checkpoint_operator.api.quantities import parse_quantity
from checkpoint_operator.api.spec import MoverOptions
from checkpoint_operator.api.uris import Scheme
from checkpoint_operator.controller.config_jobs import EVERY, Amounts, InstanceMetadata, JobRules
from checkpoint_operator.controller.jobs.bounds import QUEUE_NAME, service_account_name
from checkpoint_operator.controller.jobs.holder import Placement, claim_names
from checkpoint_operator.controller.mover_plan import encode_plan, mover_plan, target_options

CONTAINER = "mover"
"""The one container's name: where the operator looks for exit code, termination message and log."""

SOURCE_ROOT = "/source"
TARGET_ROOT = "/target"
TERMINATION_MESSAGE = "/dev/termination-log"

# A pinned mover has to fit beside the pod that holds the volume, on a node that may be full: it asks for next to nothing,
# and uses what is idle up to its limits.
_SMALL = {"cpu": "10m", "memory": "64Mi"}

# Azure's webhook gives an identity only to pods with this label.
_AZURE_IDENTITY_LABEL = "azure.workload.identity/use"


def render(
    name: str,
    artifact: CheckpointArtifact,
    operation: Operation,
    placement: Placement,
    rules: JobRules,
    earlier_mover_gone: bool,
) -> JsonObject | Failure:
    """The Job for one start; a Failure where the plan is longer than the kernel lets an environment be."""
    spec, mover = artifact.spec, artifact.spec.mover or MoverOptions()
    is_file = spec.target.uri.startswith(f"{Scheme.FILE}://")
    secret = spec.target.credentials_secret_ref
    options = target_options(artifact).replace(
        ca_bundle_pem=rules.ca_bundle,
        file_root=TARGET_ROOT if is_file else None,
        credentials_directory=names.CREDENTIALS_DIRECTORY if secret else None,
        allow_ambient_credentials=not is_file and secret is None,
        only_this_endpoint=True,
    )
    uploads = operation is Operation.UPLOAD
    plan = encode_plan(
        mover_plan(artifact, operation, options, SOURCE_ROOT if uploads else None, earlier_mover_gone=earlier_mover_gone)
    )
    if isinstance(plan, Failure):
        return plan
    ours = {names.LABEL_ARTIFACT_UID: artifact.metadata.uid, names.LABEL_ARTIFACT_NAME: artifact.metadata.name}
    users = dict(mover.labels or {})
    queue = {QUEUE_NAME: users.pop(QUEUE_NAME)} if QUEUE_NAME in users else {}
    azure = {_AZURE_IDENTITY_LABEL: "true"} if _has_own_identity(artifact, rules, "azure") else {}
    pod_metadata: JsonObject = {"labels": {**users, **azure, **ours}}
    if mover.annotations:
        pod_metadata["annotations"] = dict(mover.annotations)
    volumes, mounts = _volumes(artifact, operation, rules)
    container = {
        "name": CONTAINER,
        "image": rules.image,
        "imagePullPolicy": rules.image_pull_policy,
        "command": ["mover"],
        "env": [{"name": key, "value": value} for key, value in _environment(artifact, rules, plan).items()],
        "resources": _resources(mover, placement, rules),
        "volumeMounts": mounts,
        "terminationMessagePath": TERMINATION_MESSAGE,
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": placement.run_as_user != 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": artifact.metadata.namespace,
            "labels": {**queue, **ours},
            "ownerReferences": [
                {
                    "apiVersion": names.API_VERSION,
                    "kind": names.KIND,
                    "name": artifact.metadata.name,
                    "uid": artifact.metadata.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "completionMode": "NonIndexed",
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "suspend": False,
            "podFailurePolicy": {"rules": _FAILURE_RULES},
            "template": {"metadata": pod_metadata, "spec": _pod(artifact, placement, rules, container, volumes)},
        },
    }


# With backoffLimit 0 every failure ends the Job; by these rules its condition says how the pod ended, when the pod is gone.
_FAILURE_RULES: list[JsonObject] = [
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": [0]}},
]


def _pod(
    artifact: CheckpointArtifact,
    placement: Placement,
    rules: JobRules,
    container: JsonObject,
    volumes: list[JsonObject],
) -> JsonObject:
    mover = artifact.spec.mover or MoverOptions()
    account = service_account_name(artifact, rules)
    pull = rules.image_pull_secrets.get(artifact.metadata.namespace, rules.image_pull_secrets.get(EVERY, ()))
    pod: JsonObject = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "dnsPolicy": "ClusterFirst",
        "schedulerName": "default-scheduler",
        "terminationGracePeriodSeconds": rules.termination_grace_seconds,
        "securityContext": _security(placement),
        "containers": [container],
        "volumes": volumes,
        "tolerations": _tolerations(mover, placement, rules),
    }
    if account:
        pod["serviceAccountName"] = account
    if pull:
        pod["imagePullSecrets"] = [{"name": name} for name in pull]
    if priority := mover.priority_class_name or rules.priority_class_name:
        pod["priorityClassName"] = priority
    if placement.node:
        # By the node's name and not by its hostname label, which is another thing on some clouds. Where the volume decides,
        # a node selector could only contradict it.
        here = {"key": "metadata.name", "operator": "In", "values": [placement.node]}
        terms = {"nodeSelectorTerms": [{"matchFields": [here]}]}
        pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    elif selector := mover.node_selector or rules.node_selector:
        pod["nodeSelector"] = dict(selector)
    return pod


def _security(placement: Placement) -> JsonObject:
    security: JsonObject = {
        "runAsNonRoot": placement.run_as_user != 0,
        "runAsUser": placement.run_as_user,
        "runAsGroup": placement.run_as_group,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if placement.fs_group is not None:
        security |= {"fsGroup": placement.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    if placement.supplemental_groups:
        security["supplementalGroups"] = list(placement.supplemental_groups)
    if placement.selinux_level:
        # The holder's own level: with another one the runtime would relabel the volume under it.
        security["seLinuxOptions"] = {"level": placement.selinux_level}
    return security


def _tolerations(mover: MoverOptions, placement: Placement, rules: JobRules) -> list[JsonObject]:
    """Ours first: the first one that matches a taint counts, and nobody shall stay on a node that is gone."""
    lost = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": rules.node_lost_seconds}
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    ]
    others = [
        *(one.to_wire() for one in rules.tolerations),
        *(one.to_wire() for one in mover.tolerations or []),
        *placement.tolerations,
    ]
    result: list[JsonObject] = []
    for one in [*lost, *others]:
        if one not in result:
            result.append(dict(one))
    return result


def _resources(mover: MoverOptions, placement: Placement, rules: JobRules) -> JsonObject:
    """The user's over the defaults; where the two contradict each other, a request is never above its limit."""
    asked = _plain(mover.resources.requests if mover.resources else {})
    limited = _plain(mover.resources.limits if mover.resources else {})
    requests = {**_plain(rules.resources.requests), **asked}
    limits = {**_plain(rules.resources.limits), **limited}
    for name in requests.keys() & limits.keys():
        if parse_quantity(requests[name]) > parse_quantity(limits[name]):
            if name in asked and name not in limited:
                limits[name] = requests[name]
            else:
                requests[name] = limits[name]
    if placement.small_requests:
        # What is limited and not requested would be requested in full, so the small ones are always said.
        requests = {
            name: min(_SMALL[name], requests.get(name, _SMALL[name]), limits.get(name, _SMALL[name]), key=parse_quantity)
            for name in _SMALL
        }
    return {part: amounts for part, amounts in (("requests", requests), ("limits", limits)) if amounts}


def _plain(amounts: Amounts) -> dict[str, str]:
    return {str(name): amount for name, amount in amounts.items()}


def _environment(artifact: CheckpointArtifact, rules: JobRules, plan: str) -> dict[str, str]:
    """Every variable of the mover; names and values are ours and the admin's, but for the plan's JSON."""
    always = rules.instance_metadata is InstanceMetadata.ALWAYS and artifact.spec.target.credentials_secret_ref is None
    google = always or (
        rules.instance_metadata is InstanceMetadata.WORKLOAD_IDENTITY and _has_own_identity(artifact, rules, Scheme.GS)
    )
    return {
        names.ENV_PLAN: plan,
        names.ENV_TERMINATION_MESSAGE: TERMINATION_MESSAGE,
        "HOME": "/nonexistent",
        "TMPDIR": "/tmp",  # noqa: S108  (an emptyDir of this pod alone)
        "PYTHONUNBUFFERED": "1",
        "AWS_EC2_METADATA_DISABLED": "false" if always else "true",
        "NO_GCE_CHECK": "false" if google else "true",
        **({"AZURE_TOKEN_CREDENTIALS": "prod"} if always else {}),
        **rules.proxy.variables(),
    }


def _has_own_identity(artifact: CheckpointArtifact, rules: JobRules, scheme: str) -> bool:
    """Whether the mover is to use its ServiceAccount's identity at the cloud of this scheme."""
    target = artifact.spec.target
    return (
        target.uri.startswith(f"{scheme}://")
        and target.credentials_secret_ref is None
        and service_account_name(artifact, rules) is not None
    )


def _volumes(
    artifact: CheckpointArtifact, operation: Operation, rules: JobRules
) -> tuple[list[JsonObject], list[JsonObject]]:
    """(volumes, mounts): the claims that this operation needs, one Secret, and a small /tmp. Never a subPath: the mover
    itself opens the source's path below its root, and follows no link out of it."""
    target, source = artifact.spec.target, artifact.spec.source.persistent_volume_claim.claim_name
    volumes: list[JsonObject] = []
    mounts: list[JsonObject] = []
    volume_of: dict[str, str] = {}
    for claim in claim_names(artifact, operation):
        volume_of[claim] = "source" if operation is Operation.UPLOAD and claim == source else "target"
        volumes.append({"name": volume_of[claim], "persistentVolumeClaim": {"claimName": claim}})
    if operation is Operation.UPLOAD:
        mounts.append({"name": volume_of[source], "mountPath": SOURCE_ROOT, "readOnly": True})
    if target.persistent_volume_claim:
        mounts.append({"name": volume_of[target.persistent_volume_claim.claim_name], "mountPath": TARGET_ROOT})
    if target.credentials_secret_ref:
        secret = {"secretName": target.credentials_secret_ref.name, "defaultMode": 0o444, "optional": False}
        volumes.append({"name": "credentials", "secret": secret})
        mounts.append({"name": "credentials", "mountPath": names.CREDENTIALS_DIRECTORY, "readOnly": True})
    volumes.append({"name": "tmp", "emptyDir": {"sizeLimit": rules.tmp_size}})
    mounts.append({"name": "tmp", "mountPath": "/tmp"})  # noqa: S108
    return volumes, mounts
