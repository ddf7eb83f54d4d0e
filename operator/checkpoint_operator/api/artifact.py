"""The CheckpointArtifact as a whole, as the API server gives it, and what is derived from it."""

from datetime import datetime

from pydantic import Field

from checkpoint_operator.api.base import ApiModel, JsonObject
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.spec import ArtifactSpec, Training
from checkpoint_operator.api.status import ArtifactStatus, Summary


class ObjectMeta(ApiModel):
    """The part of metav1.ObjectMeta that the operator reads."""

    name: str
    namespace: str
    uid: str
    resource_version: str = ""
    generation: int = 1
    creation_timestamp: datetime
    deletion_timestamp: datetime | None = None
    finalizers: list[str] = Field(default_factory=list)
    annotations: dict[str, str] = Field(default_factory=dict)


class CheckpointArtifact(ApiModel):
    """A checkpoint of a training: what it is, where it comes from, and where it is stored."""

    metadata: ObjectMeta
    spec: ArtifactSpec
    status: ArtifactStatus = ArtifactStatus()

    @property
    def key(self) -> tuple[str, str]:
        """(namespace, name)."""
        return self.metadata.namespace, self.metadata.name

    def describe(self) -> ArtifactMetadata:
        """What goes into the manifest beside the file table."""
        spec, training = self.spec, self.spec.training or Training()
        return ArtifactMetadata(
            artifact_id=self.metadata.uid,
            artifact_type=spec.artifact_type,
            job_name=training.job_name,
            algorithm=training.algorithm,
            base_model=training.base_model,
            peft_method=training.peft_method,
            final_loss=training.final_loss,
            total_steps=training.total_steps,
            step=training.step,
            stage=training.stage,
            metrics={metric.name: metric.value for metric in spec.metrics},
            version=spec.version,
            parent_artifact_id=spec.parent_ref.name if spec.parent_ref else None,
            tags=spec.tags,
            labels={"namespace": self.metadata.namespace, "name": self.metadata.name},
        )

    def summarize(self) -> Summary:
        training = self.spec.training or Training()
        return Summary(
            job_name=training.job_name,
            algorithm=training.algorithm,
            base_model=training.base_model,
            peft_method=training.peft_method,
            step=training.step,
            loss=training.final_loss,
        )


def parse_artifact(body: JsonObject) -> CheckpointArtifact:
    """Read an object as the API server gives it.

    Raises:
        pydantic.ValidationError: for an object that an older, looser CRD let in.
    """
    return CheckpointArtifact.model_validate(body)
