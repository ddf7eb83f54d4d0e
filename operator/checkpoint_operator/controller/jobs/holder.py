"""Where a mover runs and as whom, from the claim, who holds it, and what the namespace allows (DESIGN §5). Pure.

*Holders* are the pods that mount the claim. Whoever is alive decides the node; whoever is known, alive or ended, tells whose
the files are: a training that is done leaves its pod behind for a while, and that is when most checkpoints are stored.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation
from checkpoint_operator.controller.config_jobs import JobRules
from checkpoint_operator.controller.jobs.bounds import service_account_name

GROUPS_MAX = 32
TOLERATIONS_MAX = 64
"""So many of a pod's are looked at. Kubernetes takes what fits into 1.5 MB, and a pod that mounts a claim is anybody's."""
_TERMINAL = ("Succeeded", "Failed")
_MOVER_NAME = re.compile(r"ckpt-(?P<uid>[0-9a-f-]{36})-[0-9]{1,9}")
# Without these a pod stays "running" for ever on a node that is gone; the template sets its own.
_LOST_NODE = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")


@dataclass(frozen=True)
class Placement:
    """Where a mover runs, and as whom.

    ``node``: the only one that the volume can be mounted on now (then the pod asks for little, so that it fits beside the
    holder); None where the scheduler may choose. ``user_from`` says in words where the user comes from, for messages.
    """

    run_as_user: int
    run_as_group: int
    fs_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    selinux_level: str | None = None
    node: str | None = None
    tolerations: tuple[JsonObject, ...] = ()
    small_requests: bool = False
    user_from: str = ""


@dataclass(frozen=True)
class Hold:
    """Nothing is wrong with the artifact, and no mover can start now: Waiting, nothing is counted, look again."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class _Holder:
    """One pod that mounts a claim, and as whom. ``user`` is None where nobody says (the image's own, not started yet)."""

    pod: str
    alive: bool
    running: bool
    started: str
    node: str | None
    is_mover: bool
    writes: bool
    user: int | None
    group: int | None
    fs_group: int | None
    groups: tuple[int, ...]
    selinux_level: str | None
    tolerations: tuple[JsonObject, ...]

    @property
    def weight(self) -> tuple[bool, bool, str]:
        """Who is believed first: a running one, one that may write, the newest."""
        return self.running, self.writes, self.started


def claim_names(artifact: CheckpointArtifact, operation: Operation) -> tuple[str, ...]:
    """The claims that a mover for this operation mounts; a deletion needs the source no more."""
    target = artifact.spec.target.persistent_volume_claim
    source = artifact.spec.source.persistent_volume_claim.claim_name
    mounted = [source] if operation is Operation.UPLOAD else []
    return tuple(dict.fromkeys([*mounted, *([target.claim_name] if target else [])]))


def assess(
    artifact: CheckpointArtifact,
    operation: Operation,
    claims: Mapping[str, JsonObject | None],
    pods: Sequence[JsonObject],
    namespace: JsonObject,
    service_account: JsonObject | None,
    rules: JobRules,
) -> Placement | Hold | Failure:
    """Decide the place of one mover.

    ``claims``: each of :func:`claim_names`, as the API server has it; None where there is none of that name.
    ``pods``: those of the namespace that mount one of these claims, dead or alive (others are ignored).
    ``service_account``: the one that :func:`bounds.service_account_name` names, None where there is none (or no name).
    """
    if failure := _refuse_account(artifact, service_account, rules):
        return failure
    wanted = claim_names(artifact, operation)
    target = artifact.spec.target.persistent_volume_claim
    nodes: dict[str, _Holder] = {}
    known: dict[str, list[_Holder]] = {}
    for name in wanted:
        is_target = target is not None and name == target.claim_name
        is_source = operation is Operation.UPLOAD and name == artifact.spec.source.persistent_volume_claim.claim_name
        found = claims.get(name)
        if problem := _claim_problem(name, found, is_source=is_source, is_target=is_target):
            return problem
        assert found is not None
        holders = [holder for pod in pods if (holder := _holder(pod, name)) is not None]
        alive = sorted((one for one in holders if one.alive), key=lambda one: one.weight, reverse=True)
        if problem := _in_use(name, found, alive):
            return problem
        if not _is_shared(found) and (there := next((one for one in alive if one.node), None)):
            nodes[name] = there
        known[name] = sorted(holders, key=lambda one: (one.alive, *one.weight), reverse=True)
    return _place(artifact, operation, nodes, known, namespace, rules)


def _place(
    artifact: CheckpointArtifact,
    operation: Operation,
    nodes: Mapping[str, _Holder],
    holders: Mapping[str, Sequence[_Holder]],
    namespace: JsonObject,
    rules: JobRules,
) -> Placement | Hold | Failure:
    if len({one.node for one in nodes.values()}) > 1:
        said = ", ".join(f"'{name}' by pod '{one.pod}' on node '{one.node}'" for name, one in nodes.items())
        return Hold(Reason.CLAIM_IN_USE, f"both claims are held, on two nodes, and can be mounted on one only: {said}")
    pin = next(iter(nodes.values()), None)
    # Movers tell nothing about the files: they run as whom we chose.
    known = [one for held in holders.values() for one in held if not one.is_mover]
    user, user_from, group = _choose_user(artifact, operation, known, rules, mounts=bool(holders))
    if user == 0 and not _says_true(namespace, names.ANNOTATION_ALLOW_ROOT):
        return Failure(
            reason=Reason.SOURCE_UNREADABLE,
            message=f"the files belong to root (so says {user_from}), and movers do not run as root: run the training as "
            "another user, or make the files readable and set spec.mover.runAsUser, or ask the admin to annotate the "
            f"namespace with {names.ANNOTATION_ALLOW_ROOT}=true",
        )
    fs_group, supplemental = _groups(known, next(iter(holders.values()), ()))
    return Placement(
        run_as_user=user,
        run_as_group=group,
        fs_group=fs_group,
        supplemental_groups=tuple(one for one in supplemental if one != group),
        selinux_level=next((one.selinux_level for one in known if one.alive and one.selinux_level), None),
        node=pin.node if pin else None,
        tolerations=pin.tolerations if pin else (),
        small_requests=pin is not None,
        user_from=user_from,
    )


def _choose_user(
    artifact: CheckpointArtifact, operation: Operation, known: Sequence[_Holder], rules: JobRules, *, mounts: bool
) -> tuple[int, str, int]:
    """(user, where that comes from, group). Group 0 is nobody's to have: the default group reads no less of one's own."""
    witness = next((one for one in known if one.user is not None), None)
    last = artifact.status.mover.run_as_user if artifact.status.mover else None
    chosen = artifact.spec.mover.run_as_user if artifact.spec.mover else None
    if chosen is not None:
        same = next((one.group for one in known if one.user == chosen), None)
        return chosen, "spec.mover.runAsUser", same or rules.default_user
    if not mounts:
        return rules.default_user, "the default, since no claim is mounted", rules.default_user
    if last is not None and (operation is Operation.DELETE or witness is None):
        # What a mover wrote to a file:// target is its user's, whoever holds the claim by now.
        return last, "the mover before", rules.default_user
    if witness is not None and witness.user is not None:
        return witness.user, f"pod '{witness.pod}', which mounts the claim", witness.group or rules.default_user
    return rules.default_user, "the default, since no pod that mounts the claim says its user", rules.default_user


def _groups(known: Sequence[_Holder], of_first_claim: Sequence[_Holder]) -> tuple[int | None, tuple[int, ...]]:
    """(fsGroup, supplementalGroups). An fsGroup makes the kubelet chgrp a volume unless its root has that group already:
    certain while all who hold the source run with the same one. As a supplemental group it gives the same access."""
    running = {one.fs_group for one in known if one.alive and one.running}
    is_held = any(one.running and not one.is_mover for one in of_first_claim)
    fs_group = (next(iter(running)) or None) if is_held and len(running) == 1 else None
    groups = {group for one in known for group in (one.fs_group, one.group, *one.groups) if group}
    return fs_group, tuple(sorted(groups - {fs_group}))[:GROUPS_MAX]


def _refuse_account(artifact: CheckpointArtifact, account: JsonObject | None, rules: JobRules) -> Failure | None:
    name = service_account_name(artifact, rules)
    if name is None or (account is not None and _says_true(account, names.ANNOTATION_ALLOW_MOVER)):
        return None
    what = "does not exist in this namespace" if account is None else "does not allow movers"
    return Failure(
        reason=Reason.SERVICE_ACCOUNT_NOT_ALLOWED,
        message=f"ServiceAccount '{name}' {what}: whoever owns it has to annotate it with "
        f"{names.ANNOTATION_ALLOW_MOVER}=true (spec.mover.serviceAccountName, or the admin's serviceAccountName)",
    )


def _claim_problem(name: str, claim: JsonObject | None, *, is_source: bool, is_target: bool) -> Hold | Failure | None:
    if claim is None:
        return Hold(Reason.CLAIM_NOT_FOUND, f"PersistentVolumeClaim '{name}' does not exist in this namespace")
    spec, phase = _dict(claim, "spec"), _dict(claim, "status").get("phase")
    modes = _modes(claim)
    if spec.get("volumeMode") == "Block":
        return Failure(
            reason=Reason.CLAIM_UNSUITABLE,
            message=f"claim '{name}' is a raw block device (volumeMode: Block): it has no files",
        )
    if is_target and modes and set(modes) == {"ReadOnlyMany"}:
        return Failure(
            reason=Reason.CLAIM_UNSUITABLE, message=f"claim '{name}' is ReadOnlyMany: nothing can be stored in it"
        )
    if _dict(claim, "metadata").get("deletionTimestamp"):
        return Hold(Reason.CLAIM_DELETING, f"claim '{name}' is being deleted: no new pod may mount it")
    if phase == "Lost":
        return Hold(Reason.CLAIM_LOST, f"the volume '{spec.get('volumeName', '')}' of claim '{name}' is gone (phase Lost)")
    if is_source and phase != "Bound":
        # A mover would be the first consumer, and find an empty volume.
        return Hold(
            Reason.CLAIM_PENDING,
            f"claim '{name}' is {phase or 'Pending'}: no volume is bound to it, so nothing is in it yet",
        )
    return None


def _in_use(name: str, claim: JsonObject, alive: Sequence[_Holder]) -> Hold | None:
    if "ReadWriteOncePod" not in _modes(claim) or not alive:
        return None
    return Hold(
        Reason.CLAIM_IN_USE,
        f"claim '{name}' is ReadWriteOncePod and pod '{alive[0].pod}' holds it: waiting until it has ended",
    )


def _modes(claim: JsonObject) -> list[str]:
    """What the volume can do, else what was asked for."""
    modes = _dict(claim, "status").get("accessModes") or _dict(claim, "spec").get("accessModes")
    return [str(mode) for mode in modes] if isinstance(modes, list) else []


def _is_shared(claim: JsonObject) -> bool:
    """Whether it can be mounted on several nodes at once, among them by its writer."""
    modes = _modes(claim)
    return "ReadWriteMany" in modes or modes == ["ReadOnlyMany"]


def _holder(pod: JsonObject, claim: str) -> _Holder | None:
    """What one pod has to do with a claim; None: nothing. Kubernetes is believed, and nothing else: a pod's own labels and
    names may be anybody's."""
    spec, status, metadata = _dict(pod, "spec"), _dict(pod, "status"), _dict(pod, "metadata")
    volumes = [
        volume.get("name")
        for volume in _dicts(spec, "volumes")
        if _dict(volume, "persistentVolumeClaim").get("claimName") == claim
    ]
    if not volumes:
        return None
    writing, container = _container(spec, volumes)
    user = _user(spec, container, status)
    own = _dict(spec, "securityContext")
    groups = own.get("supplementalGroups")
    tolerations = (one for one in _dicts(spec, "tolerations") if one.get("key") not in _LOST_NODE)
    level = _dict(_dict(container, "securityContext"), "seLinuxOptions").get("level")
    level = level or _dict(own, "seLinuxOptions").get("level")
    return _Holder(
        pod=str(metadata.get("name", "")),
        alive=status.get("phase") not in _TERMINAL,
        running=status.get("phase") == "Running",
        started=str(status.get("startTime") or metadata.get("creationTimestamp") or ""),
        node=spec.get("nodeName") or None,
        is_mover=_is_mover(metadata),
        writes=writing,
        user=user[0],
        group=user[1],
        fs_group=_id(own.get("fsGroup")),
        groups=tuple(group for item in (groups or [])[:GROUPS_MAX] if (group := _id(item)) is not None),
        selinux_level=level if isinstance(level, str) else None,
        tolerations=tuple(islice(tolerations, TOLERATIONS_MAX)),
    )


def _container(spec: JsonObject, volumes: Sequence[Any]) -> tuple[bool, JsonObject]:
    """(may it write, the container): the one that mounts the volume, rather one that may write than one that reads."""
    read_only = {
        volume.get("name") for volume in _dicts(spec, "volumes") if _dict(volume, "persistentVolumeClaim").get("readOnly")
    }
    reader: JsonObject = {}
    for container in (*_dicts(spec, "containers"), *_dicts(spec, "initContainers")):
        for mount in _dicts(container, "volumeMounts"):
            if mount.get("name") in volumes:
                if not mount.get("readOnly") and mount.get("name") not in read_only:
                    return True, container
                reader = reader or container
    return False, reader


def _user(spec: JsonObject, container: JsonObject, status: JsonObject) -> tuple[int | None, int | None]:
    """(user, group) of a container: what its spec says, a container before its pod, else what the kubelet saw (1.35+)."""
    inner, outer = _dict(container, "securityContext"), _dict(spec, "securityContext")
    user = _first_id(inner.get("runAsUser"), outer.get("runAsUser"))
    group = _first_id(inner.get("runAsGroup"), outer.get("runAsGroup"))
    seen: JsonObject = {}
    for each in (*_dicts(status, "containerStatuses"), *_dicts(status, "initContainerStatuses")):
        if container and each.get("name") == container.get("name"):
            seen = _dict(_dict(each, "user"), "linux")
    return _first_id(user, seen.get("uid")), _first_id(group, seen.get("gid"))


def _is_mover(metadata: JsonObject) -> bool:
    """One of ours: by its label *and* by the Job that owns it, whose name comes from the same artifact's uid."""
    uid = _dict(metadata, "labels").get(names.LABEL_ARTIFACT_UID)
    return any(
        owner.get("kind") == "Job"
        and owner.get("controller") is True
        and (match := _MOVER_NAME.fullmatch(str(owner.get("name")))) is not None
        and match["uid"] == uid
        for owner in _dicts(metadata, "ownerReferences")
    )


def _says_true(body: JsonObject, annotation: str) -> bool:
    return _dict(_dict(body, "metadata"), "annotations").get(annotation) == "true"


def _first_id(*values: object) -> int | None:
    return next((found for value in values if (found := _id(value)) is not None), None)


def _id(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None


def _dict(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = body.get(key)
    return value if isinstance(value, dict) else {}


def _dicts(body: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
    value = body.get(key)
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())
