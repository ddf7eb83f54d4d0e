"""Where a mover runs and as whom, from the claim, who holds it, and what the namespace allows (DESIGN §5). Pure.

*Holders* are the pods that mount the claim: whoever is alive decides the node, whoever is known decides the user.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation
from checkpoint_operator.controller.config_jobs import JobRules


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


def claim_names(artifact: CheckpointArtifact, operation: Operation) -> tuple[str, ...]:
    """The claims that a mover for this operation mounts; a deletion needs the source no more."""
    target = artifact.spec.target.persistent_volume_claim
    source = artifact.spec.source.persistent_volume_claim.claim_name
    names = [source] if operation is Operation.UPLOAD else []
    return tuple(dict.fromkeys([*names, *([target.claim_name] if target else [])]))


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
    raise NotImplementedError
