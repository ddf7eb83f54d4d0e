"""What is known about a checkpoint beside its bytes: the part of a manifest that people search by."""

from datetime import datetime
from numbers import Real
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _decimal(value: object) -> object:
    """A number as its shortest text: NumPy's scalars are numbers too, and training code has them in hand."""
    return str(value) if isinstance(value, Real) and not isinstance(value, bool) else value


DecimalText = Annotated[str, BeforeValidator(_decimal)]


class ArtifactMetadata(BaseModel):
    """Searchable facts about one stored artifact (DESIGN §7).

    Keys that a newer version wrote survive a round trip through :meth:`from_dict` and :meth:`to_dict`, so that an older
    tool that copies a checkpoint does not lose them. ``final_loss`` and the values of ``metrics`` are decimal strings, as
    in the custom resource: a float would not survive every reader. Numbers are taken and written down.
    """

    model_config = ConfigDict(frozen=True, extra="allow", coerce_numbers_to_str=True)

    artifact_id: str | None = None
    artifact_type: str = "checkpoint"
    job_name: str | None = None
    algorithm: str | None = None
    created_at: datetime | None = None
    size_bytes: int | None = None
    storage_path: str | None = None
    base_model: str | None = None
    peft_method: str | None = None
    final_loss: DecimalText | None = None
    total_steps: int | None = None
    step: int | None = None
    stage: str | None = None
    metrics: dict[str, DecimalText] = Field(default_factory=dict)
    version: str | None = None
    parent_artifact_id: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: snake_case keys, timestamps in RFC 3339, none of our keys that was never set."""
        return {
            key: value
            for key, value in self.model_dump(mode="json").items()
            if value is not None or key not in type(self).model_fields
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            pydantic.ValidationError: when a known key has a value of another type.
        """
        return cls.model_validate(data)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed. Raises pydantic.ValidationError as :meth:`from_dict` does."""
        return self.model_validate({**dict(self), **changes})
