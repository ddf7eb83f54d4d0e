"""metav1.Condition, and the rule that its transition time moves only when its status does."""

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import Field

from checkpoint_operator.api.base import ApiModel

MESSAGE_MAX = 1024
"""Our own limit, far below the API's 32 KiB: a message is for a person, and goes into an event as well."""

ConditionStatus = Literal["True", "False", "Unknown"]


class ConditionType(StrEnum):
    SOURCE_READY = "SourceReady"
    UPLOADED = "Uploaded"
    VERIFIED = "Verified"
    READY = "Ready"
    STALLED = "Stalled"


class Condition(ApiModel):
    """One observation about an artifact, in the form that all Kubernetes tools read."""

    type: str = Field(
        description="What is said: SourceReady, Uploaded, Verified, Ready or Stalled.",
        max_length=316,
        pattern=r"^[A-Za-z][A-Za-z0-9./-]*$",
    )
    status: ConditionStatus = Field(description="True, False or Unknown.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="The generation of the spec that this was said about."
    )
    last_transition_time: datetime = Field(description="When the status last changed.")
    reason: str = Field(
        description="Why, as one word for programs.",
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
    )
    message: str = Field(default="", description="Why, as a sentence for people.", max_length=MESSAGE_MAX)


def truncate(message: str, limit: int = MESSAGE_MAX) -> str:
    """Cut a message to what a condition may hold, visibly."""
    return message if len(message) <= limit else message[: limit - 1] + "…"


def set_condition(
    conditions: Sequence[Condition],
    type: ConditionType,
    status: bool | None,
    reason: str,
    message: str,
    *,
    generation: int,
    now: datetime,
) -> list[Condition]:
    """A new list with this condition in it, sorted by nothing: the place of a known type stays.

    ``status`` None is Unknown. ``now`` becomes the transition time only if the status differs from before.
    """
    word: ConditionStatus = "Unknown" if status is None else "True" if status else "False"
    old = next((condition for condition in conditions if condition.type == type), None)
    new = Condition(
        type=type,
        status=word,
        observed_generation=generation,
        last_transition_time=old.last_transition_time if old and old.status == word else now,
        reason=reason,
        message=truncate(message),
    )
    if old is None:
        return [*conditions, new]
    return [new if condition.type == type else condition for condition in conditions]


def find_condition(conditions: Sequence[Condition], type: ConditionType) -> Condition | None:
    """The condition of that type, if it was ever said."""
    return next((condition for condition in conditions if condition.type == type), None)
