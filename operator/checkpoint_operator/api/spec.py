"""What a user writes into a CheckpointArtifact: the source of the CRD's spec, its documentation and its rules.

A field's ``description`` is what ``kubectl explain`` shows; ``x-kubernetes-*`` extras go into the schema as they are.
Limits (maxLength, maxItems) are not decoration: CEL rules get a cost estimate from them, and etcd a bounded object.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from checkpoint_operator.api.base import ApiModel
from checkpoint_operator.api.protocol import Layout
from checkpoint_operator.api.quantities import QUANTITY, QUANTITY_MAX

# The last part of a decimal number's grammar that Kubernetes quantities share, so that --sort-by orders these columns.
DECIMAL = r"^-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$"
# Not \s: what is white space differs between the API server's regular expressions and ours.
ENDPOINT = r"^https?://[^/@?# \t\r\n]+(/[^?# \t\r\n]*)?$"
DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"

Name = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Glob = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Decimal = Annotated[str, StringConstraints(max_length=40, pattern=DECIMAL)]
ComputeResource = Literal["cpu", "memory", "ephemeral-storage"]
# In YAML a quantity may be a plain number.
Quantity = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) and not isinstance(value, bool) else value),
    StringConstraints(max_length=QUANTITY_MAX, pattern=QUANTITY),
]
LabelValue = Annotated[str, StringConstraints(max_length=256)]


def _rule(rule: str, message: str | None = None, *, expression: str | None = None, **more: str) -> dict[str, str]:
    """One CEL rule; ``expression`` is CEL that builds the message (it may name the value)."""
    said = {"messageExpression": expression} if expression else {}
    return {"rule": rule, **({"message": message} if message else {}), **said, **more}


def _rules(*rules: dict[str, str], **more: Any) -> Any:
    return {"x-kubernetes-validations": list(rules), **more}


def _uri_rule(rule: str, must: str) -> dict[str, str]:
    """A rule of target.uri. The message repeats the value, unless there may be a password or a signature in it."""
    return _rule(rule, must, expression=f"""'spec.target.uri ' + (self.matches('[@?]') ? '' : self + ' ') + "{must}\"""")


def _map(most: int) -> Any:
    """A map of free keys: a schema bounds their values, and of the keys nothing but their number. Without a rule one object
    holds 1.5 MB of them, and the operator, who keeps what is under way in memory, a few hundred such objects."""
    longest = 317  # a label's key: a domain of 253 characters, a slash, and 63
    rule = _rule(f"self.all(key, key.size() <= {longest})", f"keys have at most {longest} characters")
    return _rules(rule, maxProperties=most)


class ClaimReference(ApiModel):
    claim_name: Name = Field(description="Name of a PersistentVolumeClaim in the artifact's namespace.")


class Inventory(ApiModel):
    """What the training says it has saved."""

    file_count: Annotated[int, Field(ge=0, le=2**53)] | None = Field(default=None, description="Number of files.")
    size_bytes: Annotated[int, Field(ge=0, le=2**53)] | None = Field(default=None, description="Sum of their sizes.")
    digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)] | None = Field(
        default=None, description="SHA-256 over the lines [path, size], sorted by path."
    )


class Readiness(ApiModel):
    timeout_seconds: int = Field(
        default=1800,
        ge=0,
        le=604800,
        description="How long a source that is not ready is waited for before the artifact is Failed.",
    )
    stable_seconds: int = Field(
        default=10,
        ge=0,
        le=3600,
        description="The files' sizes and times must stay the same for this long before they are read.",
    )
    job_name: Name | None = Field(default=None, description="A Job in the same namespace that must have completed.")
    marker_file: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = Field(
        default=None, description="A file in the folder that must exist."
    )
    inventory: Inventory | None = Field(default=None, description="What the folder must hold, as the training counted it.")


class ArtifactSource(ApiModel):
    persistent_volume_claim: ClaimReference = Field(description="The volume that the training wrote to.")
    path: str = Field(
        min_length=1,
        max_length=1024,
        description=(
            "The checkpoint's folder (or single file), relative to the root of the claim. The folder must be complete "
            "when this object is created: creating it is how a training says 'saved'."
        ),
        json_schema_extra=_rules(
            _rule(
                r"!self.startsWith('/') && !self.matches('(^|/)[.][.](/|$)') && !self.matches('//|[\\\\\\x00-\\x1f\\x7f]')",
                "must be relative to the root of the claim, without '..', '//', backslashes or control characters",
                expression=(
                    "\"spec.source.path '\" + self + \"' must be relative to the root of the claim, without '..', '//', "
                    "backslashes or control characters: write it like 'checkpoint-1000'\""
                ),
            )
        ),
    )
    include: list[Glob] = Field(
        default_factory=list,
        max_length=64,
        description=(
            "Globs of what to store, matched against the path below the folder ('*.safetensors', 'global_step*/**'). "
            "A pattern without '/' matches names at any depth. Empty: everything."
        ),
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    exclude: list[Glob] = Field(
        default_factory=list,
        max_length=64,
        description="Globs of what to leave out, after include ('optimizer.pt', 'rng_state*.pth').",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    readiness: Readiness | None = Field(
        default=None, description="When the source may be read, on top of the creation of this object."
    )


class SecretReference(ApiModel):
    name: Name = Field(description="Name of a Secret in the artifact's namespace.")


class S3Options(ApiModel):
    force_path_style: bool | None = Field(
        default=None, description="Address buckets as endpoint/bucket; most stores that are not AWS need it."
    )
    storage_class: Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Z][A-Z0-9_]*$")] | None = Field(
        default=None, description="Storage class of the objects, for example STANDARD_IA."
    )
    sse_kms_key_id: Annotated[str, StringConstraints(min_length=1, max_length=2048)] | None = Field(
        default=None, alias="sseKMSKeyID", description="KMS key for server-side encryption of the objects."
    )


class AzureOptions(ApiModel):
    account: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]{3,24}$", max_length=24)] | None = Field(
        default=None, description="Name of the storage account."
    )


class ArtifactTarget(ApiModel):
    uri: str = Field(
        min_length=1,
        max_length=1024,
        description=(
            "Where the checkpoint is stored: s3://bucket/prefix, gs://bucket/prefix, azure://container/prefix or "
            "file:///path inside target.persistentVolumeClaim. One place holds one checkpoint. No credentials, no query."
        ),
        json_schema_extra=_rules(
            _uri_rule("self.matches('^(file|s3|gs|azure)://')", "must begin with file://, s3://, gs:// or azure://"),
            _uri_rule(
                "!self.matches('^[^/]*//[^/]*@')",
                "has user information before '@': credentials never go into a URI, the admin configures them for the target",
            ),
            _uri_rule("!self.matches('[?#]')", "must have no query ('?') and no fragment ('#')"),
            _uri_rule(
                "!self.matches('^(file|s3|gs|azure)://') || self.matches('^[^/]*//[^/]*@') || "
                "self.matches('^(file://|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]|"
                "gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(/|$)') || "
                # RE2 has no look-ahead: no two hyphens in a row, and the length, are two patterns.
                "self.matches('^azure://[a-z0-9](-?[a-z0-9])+(/|$)') && self.matches('^azure://[^/]{3,63}(/|$)')",
                "must name a valid bucket or container (3-63 of a-z 0-9 - .), and a file URI has three slashes: file:///path",
            ),
            _uri_rule(
                "self.matches('^[^/]*//[^/]*(/[^/]+)+/?$') && "
                r"!self.matches('/[.]{1,2}(/|$)') && !self.matches('[\\\\\\x00-\\x1f\\x7f]')",
                "must have a path (a folder for each checkpoint) without '..', '.', '//', backslashes or control characters",
            ),
            _uri_rule(
                "!self.matches('/[.](metadata[.]json|metadata[.]deleting[.]json|partial-[^/]*|probe-[^/]*)(/|$)')",
                "must not use the operator's own names: .metadata.json, .metadata.deleting.json, .partial-*, .probe-*",
            ),
        ),
    )
    layout: Layout = Field(
        default=Layout.PLAIN,
        description=(
            "Plain: the files lie under the URI itself, byte for byte. Unique: under <uri>/<uid>-<fingerprint>/, so that "
            "no two artifacts share a key; for stores without conditional writes."
        ),
    )
    persistent_volume_claim: ClaimReference | None = Field(
        default=None, description="For file:// only, and required there: the claim that the URI's path lies in."
    )
    credentials_secret_ref: SecretReference | None = Field(
        default=None,
        description=(
            "Secret with the store's keys under their SDK's variable names (AWS_ACCESS_KEY_ID, …). Without it the "
            "mover's own identity is used."
        ),
    )
    endpoint: Annotated[str, StringConstraints(max_length=512, pattern=ENDPOINT)] | None = Field(
        default=None, description="Address of the store where it is not the cloud's own (http or https)."
    )
    region: Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9-]+$")] | None = Field(
        default=None, description="Region of the bucket."
    )
    s3: S3Options | None = Field(default=None, description="What only S3 knows; for s3:// only.")
    azure: AzureOptions | None = Field(default=None, description="What only Azure knows; for azure:// only.")


class Training(ApiModel):
    job_name: Word | None = Field(default=None, description="The training Job that wrote the checkpoint.")
    algorithm: Word | None = Field(default=None, description="What trained it: dpo, ppo, grpo, orpo, kto, sft, …")
    base_model: Word | None = Field(default=None, description="The model that was trained, as its hub names it.")
    peft_method: Word | None = Field(default=None, description="lora, qlora, …; leave out for full fine-tuning.")
    step: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        default=None, description="Optimizer steps that were done when it was saved."
    )
    total_steps: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        default=None, description="Optimizer steps that the training plans."
    )
    final_loss: Decimal | None = Field(default=None, description="The last training loss, as a decimal string: '0.31'.")
    stage: Literal["Intermediate", "Final"] | None = Field(
        default=None, description="Intermediate: saved on the way. Final: the training's outcome."
    )


class Metric(ApiModel):
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)] = Field(description="For example eval_loss.")
    value: Decimal = Field(description="A decimal string: '0.42'.")


class ParentReference(ApiModel):
    name: Name = Field(description="Name of a CheckpointArtifact in the same namespace.")


class Resources(ApiModel):
    requests: dict[ComputeResource, Quantity] = Field(
        default_factory=dict, description="cpu, memory and ephemeral-storage, as in a container."
    )
    limits: dict[ComputeResource, Quantity] = Field(
        default_factory=dict, description="cpu, memory and ephemeral-storage, as in a container."
    )


class Toleration(ApiModel):
    key: Annotated[str, StringConstraints(max_length=317)] | None = Field(default=None, description="As in a pod.")
    operator: Literal["Exists", "Equal"] | None = Field(default=None, description="As in a pod.")
    value: Annotated[str, StringConstraints(max_length=63)] | None = Field(default=None, description="As in a pod.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(default=None, description="As in a pod.")
    toleration_seconds: int | None = Field(default=None, description="As in a pod.")


class MoverOptions(ApiModel):
    """A closed list: nothing here can widen what the mover may do."""

    resources: Resources | None = Field(default=None, description="Requests and limits of the mover's container.")
    node_selector: dict[str, LabelValue] | None = Field(
        default=None, description="Nodes that the mover may run on.", json_schema_extra=_map(32)
    )
    tolerations: list[Toleration] | None = Field(
        default=None,
        max_length=32,
        description="Taints that the mover tolerates.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    priority_class_name: Name | None = Field(default=None, description="Priority class of the mover's pod.")
    service_account_name: Name | None = Field(
        default=None, description="ServiceAccount of the mover's pod, for workload identity; it must allow movers."
    )
    run_as_user: Annotated[int, Field(ge=1, le=2147483647)] | None = Field(
        default=None, description="User that can read the files; by default the one of the pod that holds the claim."
    )
    max_bytes_per_second: Annotated[int, Field(ge=64 << 10, le=2**53)] | None = Field(
        default=None,
        description="Limit for the mover's reading and sending, at least 64 KiB: who never ends holds a place for ever.",
    )
    labels: dict[str, LabelValue] | None = Field(
        default=None, description="More labels for the mover's pod.", json_schema_extra=_map(32)
    )
    annotations: dict[str, LabelValue] | None = Field(
        default=None, description="More annotations for the mover's pod.", json_schema_extra=_map(32)
    )


class DeletionPolicy(StrEnum):
    RETAIN = "Retain"
    DELETE = "Delete"


def _immutable(path: str, *, optional: bool) -> dict[str, str]:
    """A rule on the spec as a whole: a transition rule on the field itself is skipped when there was no old value."""
    field, old = f"self.{path}", f"oldSelf.{path}"
    rule = f"{field} == {old}"
    if optional:
        rule = f"has({field}) == has({old}) && (!has({field}) || {rule})"
    name = f"spec.{path}"
    return _rule(rule, f"{name} is immutable: what was stored stays what it is; create a new CheckpointArtifact")


class ArtifactSpec(ApiModel):
    artifact_type: Literal["checkpoint", "model", "dataset", "config"] = Field(
        default="checkpoint", description="What the files are."
    )
    source: ArtifactSource = Field(description="What to store.")
    target: ArtifactTarget = Field(
        description="Where to store it.",
        json_schema_extra=_rules(
            _rule(
                "self.uri.startsWith('file://') == has(self.persistentVolumeClaim)",
                "spec.target.persistentVolumeClaim is required for file:// (the claim that the path lies in) and must be "
                "left out for every other scheme",
            ),
            _rule("!has(self.s3) || self.uri.startsWith('s3://')", "spec.target.s3 is for s3:// URIs only: remove it"),
            _rule(
                "!has(self.azure) || self.uri.startsWith('azure://')",
                "spec.target.azure is for azure:// URIs only: remove it",
            ),
            _rule(
                "!self.uri.startsWith('file://') || !has(self.endpoint) && !has(self.region) "
                "&& !has(self.credentialsSecretRef)",
                "spec.target.endpoint, region and credentialsSecretRef have no meaning for file://: remove them",
            ),
        ),
    )
    training: Training | None = Field(
        default=None,
        description="What is known about the training. Everything is optional.",
        json_schema_extra=_rules(
            _rule(
                "!has(self.step) || !has(self.totalSteps) || self.step <= self.totalSteps",
                "spec.training.step must not be above spec.training.totalSteps",
            )
        ),
    )
    metrics: list[Metric] = Field(
        default_factory=list,
        max_length=64,
        description="Measurements of this checkpoint, by name. Mutable: evaluation comes later.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    version: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = Field(
        default=None, description="Your own version of this artifact."
    )
    parent_ref: ParentReference | None = Field(default=None, description="The artifact that this one continues.")
    tags: dict[str, LabelValue] = Field(
        default_factory=dict,
        description="Free key-value pairs, stored with the checkpoint. Mutable.",
        json_schema_extra=_map(64),
    )
    deletion_policy: DeletionPolicy = Field(
        default=DeletionPolicy.RETAIN,
        description=(
            "What becomes of the committed data when this object is deleted. Data that was never committed is cleaned up "
            "under either policy."
        ),
    )
    mover: MoverOptions | None = Field(default=None, description="How the mover runs. Mutable.")
    suspend: bool = Field(
        default=False, description="true: start nothing, and stop a running mover; what it has stored is kept."
    )


SPEC_RULES = [
    _immutable("artifactType", optional=False),
    _immutable("source.persistentVolumeClaim", optional=False),
    _immutable("source.path", optional=False),
    _immutable("source.include", optional=True),
    _immutable("source.exclude", optional=True),
    _immutable("target.uri", optional=False),
    _immutable("target.layout", optional=False),
    _immutable("target.persistentVolumeClaim", optional=True),
    _immutable("target.endpoint", optional=True),
    _immutable("target.region", optional=True),
    _immutable("target.s3", optional=True),
    _immutable("target.azure", optional=True),
    _immutable("training", optional=True),
    _immutable("version", optional=True),
    _immutable("parentRef", optional=True),
]

ROOT_RULES = [
    _rule(
        "self.metadata.name.size() <= 63",
        "metadata.name must be at most 63 characters: it becomes a label value on what the operator creates",
    ),
    _rule(
        "!has(self.spec.parentRef) || self.spec.parentRef.name != self.metadata.name",
        "spec.parentRef.name must be another artifact: an artifact cannot continue itself",
    ),
]
