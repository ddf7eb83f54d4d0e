"""The mover's Job, made of the admin's rules and the little that an artifact may say; and whether a live one is it. Pure.

Nothing that a user writes becomes part of a command, an image, a volume's name, a path or a variable's name: it goes into
the plan, which is JSON, or into fields that :mod:`.bounds` has looked at.
"""

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.protocol import Failure, Operation
from checkpoint_operator.controller.config_jobs import JobRules
from checkpoint_operator.controller.jobs.holder import Placement

CONTAINER = "mover"
"""The one container's name: where the operator looks for exit code, termination message and log."""


def render(
    name: str,
    artifact: CheckpointArtifact,
    operation: Operation,
    placement: Placement,
    rules: JobRules,
    earlier_mover_gone: bool,
) -> JsonObject | Failure:
    """The Job for one start; a Failure where the plan is longer than the kernel lets an environment be."""
    raise NotImplementedError


def equals(live: JsonObject, rendered: JsonObject) -> bool:
    """Whether a Job in the cluster is the one that we would have made: what may be adopted under a name that exists.

    What the API server fills in is allowed for, and what Kueue adds (suspend, node selectors, tolerations); nothing else.
    """
    raise NotImplementedError
