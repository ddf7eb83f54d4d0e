"""What the configuration refuses before anything is looked at in the cluster. Pure; first problem in a row decides.

A refusal names the field, its value and the way out. Nothing here resolves a name or opens a connection.
"""

import re
from collections.abc import Callable, Sequence

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure
from checkpoint_operator.api.quantities import parse_quantity
from checkpoint_operator.api.spec import MoverOptions
from checkpoint_operator.api.uris import InvalidURI, Scheme, TargetURI
from checkpoint_operator.controller.config_jobs import EVERY, InstanceMetadata, JobRules
from checkpoint_operator.controller.jobs import addresses

QUEUE_NAME = "kueue.x-k8s.io/queue-name"
"""Kueue reads it on the Job; it can do nothing but make the mover wait for its turn."""

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_JOB_CONTROLLER_LABELS = ("job-name", "controller-uid")

_Check = Callable[[CheckpointArtifact, JobRules], Failure | None]


def service_account_name(artifact: CheckpointArtifact, rules: JobRules) -> str | None:
    """The ServiceAccount that the mover's pod names; None for the namespace's default one, which gives no identity."""
    mover = artifact.spec.mover
    return (mover.service_account_name if mover else None) or rules.service_account_name


def refuse(artifact: CheckpointArtifact, rules: JobRules) -> Failure | None:
    """Why the admin's rules do not allow this artifact, or None. Asked before every start, uploads and deletions."""
    return next((failure for check in _CHECKS if (failure := check(artifact, rules)) is not None), None)


def _check_target(artifact: CheckpointArtifact, rules: JobRules) -> Failure | None:
    target = artifact.spec.target
    try:
        uri = TargetURI.parse(target.uri)
    except InvalidURI as error:
        return Failure(reason=Reason.UNSUPPORTED_URI, message=f"spec.target.uri: {error}")
    if uri.scheme not in rules.allowed_schemes:
        allowed = ", ".join(f"{scheme}://" for scheme in rules.allowed_schemes) or "nothing"
        return Failure(
            reason=Reason.TARGET_NOT_ALLOWED, message=f"spec.target.uri '{uri}': the admin allows targets in {allowed}"
        )
    if (uri.scheme == Scheme.FILE) != (target.persistent_volume_claim is not None):
        return Failure(
            reason=Reason.INVALID_SPEC,
            message="spec.target.persistentVolumeClaim: file:// needs it (the claim of the path), nothing else may",
        )
    return None


def _check_endpoint(artifact: CheckpointArtifact, rules: JobRules) -> Failure | None:
    """Before any key could be sent there: a SAS token or a bearer token is worth the same to whoever receives it."""
    target = artifact.spec.target
    endpoint = target.endpoint
    if endpoint is None:
        return _check_account(target.azure.account if target.azure else None, rules)
    address = addresses.parse(endpoint)
    if address is None:
        return _not_an_endpoint("it is no plain address: write it like https://minio.example:9000")
    if addresses.is_listed(address, rules.allowed_endpoints):
        return None
    if problem := addresses.why_internal(address.host):
        return _not_an_endpoint(f"'{endpoint}' is {problem}: the admin has to list it by its full name, or not at all")
    allowed = ", ".join(rules.allowed_endpoints) or "none but the clouds' own (leave the field out)"
    return _not_an_endpoint(f"'{endpoint}' is not in the admin's list (allowedEndpoints): {allowed}")


def _check_account(account: str | None, rules: JobRules) -> Failure | None:
    """A bucket's name goes into a path of the cloud's own address; a storage account *is* an address, of anybody's."""
    if account is None:
        return None
    endpoint = f"https://{account}.blob.core.windows.net"
    address = addresses.parse(endpoint)
    if address is not None and addresses.is_listed(address, rules.allowed_endpoints):
        return None
    return Failure(
        reason=Reason.ENDPOINT_NOT_ALLOWED,
        message=f"spec.target.azure.account: '{account}' is not in the admin's list: name the account in the Secret "
        f"instead (AZURE_STORAGE_ACCOUNT), or ask the admin to list {endpoint} (allowedEndpoints)",
    )


def _not_an_endpoint(what: str) -> Failure:
    return Failure(reason=Reason.ENDPOINT_NOT_ALLOWED, message=f"spec.target.endpoint: {what}")


def _check_credentials(artifact: CheckpointArtifact, rules: JobRules) -> Failure | None:
    target = artifact.spec.target
    if target.uri.startswith(f"{Scheme.FILE}://") or target.credentials_secret_ref:
        return None
    if service_account_name(artifact, rules) or rules.instance_metadata is InstanceMetadata.ALWAYS:
        return None
    return Failure(
        reason=Reason.CREDENTIALS_MISSING,
        message="spec.target.credentialsSecretRef: no credentials for the target. Name a Secret of this namespace with the "
        "store's keys, or in spec.mover.serviceAccountName a ServiceAccount with workload identity (annotated "
        f"{names.ANNOTATION_ALLOW_MOVER}=true)",
    )


def _check_resources(artifact: CheckpointArtifact, rules: JobRules) -> Failure | None:
    resources = _mover(artifact).resources
    if resources is None:
        return None
    for part, amounts in (("requests", resources.requests), ("limits", resources.limits)):
        for name, amount in amounts.items():
            field, value = f"resources.{part}.{name}", parse_quantity(amount)
            most = rules.max_resources.get(name)
            if most is not None and value > parse_quantity(most):
                return _not_allowed(field, f"{amount} is above the admin's maximum of {most}")
            if part == "limits" and value == 0:
                return _not_allowed(field, f"{amount} would mean no limit at all: leave it out for the default")
    for name, amount in resources.requests.items():
        limit = resources.limits.get(name)
        if limit is not None and parse_quantity(amount) > parse_quantity(limit):
            return _not_allowed(f"resources.requests.{name}", f"{amount} is above resources.limits.{name} {limit}")
    return None


def _check_scheduling(artifact: CheckpointArtifact, rules: JobRules) -> Failure | None:
    mover = _mover(artifact)
    wanted = mover.priority_class_name
    if wanted and not _is_in(wanted, rules.allowed_priority_classes):
        return _not_allowed("priorityClassName", f"'{wanted}': {_allowed(rules.allowed_priority_classes)}")
    for key, value in (mover.node_selector or {}).items():
        if problem := _key_problem(key) or _value_problem(value):
            return _not_allowed("nodeSelector", f"{key!r}: {problem}")
        if not _is_in(key, rules.allowed_node_selector_keys):
            return _not_allowed("nodeSelector", f"'{key}': {_allowed(rules.allowed_node_selector_keys)}")
    for index, toleration in enumerate(mover.tolerations or []):
        field = f"tolerations[{index}]"
        if not toleration.key:
            # It would also tolerate that its node is gone, for ever.
            return _not_allowed(field, "it has no key, which would tolerate every taint: name one")
        if problem := _key_problem(toleration.key) or _value_problem(toleration.value or ""):
            return _not_allowed(field, f"{toleration.key!r}: {problem}")
        if not _is_in(toleration.key, rules.allowed_toleration_keys):
            return _not_allowed(field, f"'{toleration.key}': {_allowed(rules.allowed_toleration_keys)}")
        if toleration.operator == "Exists" and toleration.value:
            return _not_allowed(field, "operator Exists has no value: remove it")
        if toleration.toleration_seconds is not None and toleration.effect != "NoExecute":
            return _not_allowed(field, "tolerationSeconds is for effect NoExecute only: remove it")
    return None


def _check_metadata(artifact: CheckpointArtifact, rules: JobRules) -> Failure | None:
    mover = _mover(artifact)
    for key, value in (mover.labels or {}).items():
        allowed = (*rules.allowed_labels, QUEUE_NAME)
        problem = _key_problem(key) or _value_problem(value) or _metadata_problem(key, allowed, words=False)
        if problem:
            return _not_allowed("labels", f"{key!r}: {problem}")
    for key in mover.annotations or {}:
        if problem := _key_problem(key) or _metadata_problem(key, rules.allowed_annotations, words=True):
            return _not_allowed("annotations", f"{key!r}: {problem}")
    return None


def _metadata_problem(key: str, allowed: Sequence[str], *, words: bool) -> str | None:
    """Labels and annotations are instructions to whoever watches pods: sidecar injectors take images and volumes from them,
    runtimes and identity agents rights. Which of them listen only the admin knows, so that every domain has to be listed.
    ``words``: a plain word (``team``) is nobody's. Of labels it is what Services and NetworkPolicies select pods by."""
    domain, slash, _ = key.rpartition("/")
    if domain == names.GROUP or domain.endswith(f".{names.GROUP}") or key in _JOB_CONTROLLER_LABELS:
        return "is a name of the operator's or of the Job controller's own"
    if key in allowed or (slash and f"{domain}/{EVERY}" in allowed):
        return None
    if words and not slash and "." not in key:
        return None
    return f"{'keys with a domain' if words else 'it'} may be: {', '.join(allowed) or 'none'} (the admin's list)"


def _key_problem(key: str) -> str | None:
    domain, slash, name = key.rpartition("/")
    if not _NAME.fullmatch(name) or (slash and (len(domain) > 253 or not _DOMAIN.fullmatch(domain))):
        return "no valid key: write it like team or example.com/team"
    return None


def _value_problem(value: str) -> str | None:
    return None if value == "" or _NAME.fullmatch(value) else f"{value!r} is no valid value (63 of A-Z a-z 0-9 - _ .)"


def _mover(artifact: CheckpointArtifact) -> MoverOptions:
    return artifact.spec.mover or MoverOptions()


def _is_in(value: str, allowed: Sequence[str]) -> bool:
    return value in allowed or EVERY in allowed


def _allowed(allowed: Sequence[str]) -> str:
    return f"the admin allows {', '.join(allowed)}" if allowed else "the admin allows none"


def _not_allowed(field: str, what: str) -> Failure:
    return Failure(reason=Reason.MOVER_OPTION_NOT_ALLOWED, message=f"spec.mover.{field}: {what}")


_CHECKS: tuple[_Check, ...] = (
    _check_target,
    _check_endpoint,
    _check_credentials,
    _check_resources,
    _check_scheduling,
    _check_metadata,
)
