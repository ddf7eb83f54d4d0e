"""The plan of one mover, as far as it comes from the artifact; each executor adds where things are mounted. Pure."""

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import PLAN_MAX_BYTES
from checkpoint_operator.api.protocol import Failure, Operation, Plan, Source, TargetOptions
from checkpoint_operator.api.spec import DeletionPolicy


def target_options(artifact: CheckpointArtifact) -> TargetOptions:
    """What the artifact says of its target; the executor adds, or decides otherwise."""
    target, mover = artifact.spec.target, artifact.spec.mover
    return TargetOptions(
        endpoint=target.endpoint,
        region=target.region,
        force_path_style=bool(target.s3 and target.s3.force_path_style),
        storage_class=target.s3.storage_class if target.s3 else None,
        sse_kms_key_id=target.s3.sse_kms_key_id if target.s3 else None,
        azure_account=target.azure.account if target.azure else None,
        max_bytes_per_second=mover.max_bytes_per_second if mover else None,
    )


def mover_plan(
    artifact: CheckpointArtifact,
    operation: Operation,
    options: TargetOptions,
    source_root: str | None,
    *,
    earlier_mover_gone: bool,
    lock_file: str | None = None,
) -> Plan:
    """The plan. ``source_root``: where the source claim is mounted; None where it is not, for a deletion."""
    spec = artifact.spec
    source = None
    if source_root is not None:
        source = Source(root=source_root, path=spec.source.path, include=spec.source.include, exclude=spec.source.exclude)
    return Plan(
        operation=operation,
        artifact_uid=artifact.metadata.uid,
        target_uri=spec.target.uri,
        layout=spec.target.layout,
        options=options,
        source=source,
        metadata=artifact.describe(),
        earlier_mover_gone=earlier_mover_gone,
        keep_committed=spec.deletion_policy is DeletionPolicy.RETAIN,
        lock_file=lock_file,
    )


def encode_plan(plan: Plan) -> str | Failure:
    """The plan as the text of its variable; a Failure where it is longer than the kernel lets that be."""
    # Kubernetes expands $(NAME) in a variable's value and makes $$ to $. A dollar occurs inside of JSON's strings alone.
    text = plan.model_dump_json(by_alias=True, exclude_none=True).replace("$", "\\u0024")
    size = len(text.encode())
    if size <= PLAN_MAX_BYTES:
        return text
    return Failure(
        reason=Reason.INVALID_SPEC,
        message=f"the plan for the mover has {size} bytes, at most {PLAN_MAX_BYTES} are possible: shorten spec.tags, "
        "spec.source.include and spec.source.exclude",
    )
