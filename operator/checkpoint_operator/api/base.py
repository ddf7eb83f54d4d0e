"""One place that decides how our models look on the wire: camelCase, frozen, tolerant of fields of a newer version."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

JsonObject = dict[str, Any]

WIRE = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")
"""The same for a pydantic dataclass. (mypy reads a model's own configuration from its literal alone.)"""


class ApiModel(BaseModel):
    """A value of the API.

    Frozen, because reconcile logic passes values around and a change must be a new value. Unknown fields are ignored:
    after a rollback the older operator reads objects that the newer one wrote.
    """

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True, extra="ignore")

    def to_wire(self) -> JsonObject:
        """The JSON form with camelCase keys; what was never set is left out, as Kubernetes does."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed (field names, not aliases)."""
        return self.model_copy(update=changes)
