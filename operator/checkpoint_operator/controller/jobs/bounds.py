"""What the configuration refuses before anything is looked at in the cluster. Pure; first problem in a row decides.

A refusal names the field, its value and the way out. Nothing here resolves a name or opens a connection.
"""

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.protocol import Failure
from checkpoint_operator.controller.config_jobs import JobRules


def service_account_name(artifact: CheckpointArtifact, rules: JobRules) -> str | None:
    """The ServiceAccount that the mover's pod names; None for the namespace's default one, which gives no identity."""
    mover = artifact.spec.mover
    return (mover.service_account_name if mover else None) or rules.service_account_name


def refuse(artifact: CheckpointArtifact, rules: JobRules) -> Failure | None:
    """Why the admin's rules do not allow this artifact, or None. Asked before every start, uploads and deletions."""
    raise NotImplementedError
