"""What is known of every artifact without asking: the newest version that was seen, and no more of it than is needed."""

from dataclasses import dataclass, field

from checkpoint_operator.api import names
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.status import Phase
from checkpoint_operator.controller.decisions import retry_asked
from checkpoint_operator.controller.scheduling import Key


@dataclass
class ArtifactCache:
    """The newest version of every artifact that was seen; fed by events, by our own writes and by resyncs."""

    _bodies: dict[Key, JsonObject] = field(default_factory=dict)

    def put(self, body: JsonObject, *, live: bool = False) -> Key:
        """Keep the object unless a newer version is known. Versions are comparable since Kubernetes 1.35 (KEP-5504).

        ``live``: it was read just now after a conflict, and is believed even if it looks older (a restored etcd).
        """
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        known = self._bodies.get(key)
        if live or known is None or _version(body) >= _version(known):
            kept = {**body, "metadata": _trimmed(metadata)}
            self._bodies[key] = _remnant(kept) if is_settled(kept) else kept
        return key

    def version(self, key: Key) -> str | None:
        """The resourceVersion of what is kept, or None."""
        body = self._bodies.get(key)
        return str(body["metadata"]["resourceVersion"]) if body else None

    def remove(self, key: Key) -> None:
        self._bodies.pop(key, None)

    def get(self, key: Key) -> JsonObject | None:
        return self._bodies.get(key)

    def keys(self) -> list[Key]:
        return list(self._bodies)

    def statuses(self) -> list[JsonObject]:
        """The status of everybody; may be asked from another thread."""
        return [body.get("status", {}) for body in list(self._bodies.values())]

    def ready_at(self, uri: str) -> list[JsonObject]:
        """Every artifact that is Ready, stays, and names this target URI (a trailing slash does not count)."""
        return [
            body
            for body in self._bodies.values()
            if body["spec"]["target"]["uri"].removesuffix("/") == uri.removesuffix("/")
            and body.get("status", {}).get("phase") == Phase.READY
            and "deletionTimestamp" not in body["metadata"]
        ]


_KEPT_ANNOTATIONS = (names.ANNOTATION_RETRY, names.ANNOTATION_ABANDON_DATA)


def _trimmed(metadata: JsonObject) -> JsonObject:
    """What a decision reads: whoever fills annotations and labels must not fill the operator's memory."""
    kept = {key: value for key, value in metadata.items() if key not in ("managedFields", "labels")}
    annotations = metadata.get("annotations", {})
    kept["annotations"] = {name: annotations[name] for name in _KEPT_ANNOTATIONS if name in annotations}
    return kept


def _remnant(body: JsonObject) -> JsonObject:
    """What is needed of an artifact that has ended: that it has, and where its data is. Most artifacts of a cluster have,
    and a change of one comes with a whole new object."""
    spec, status = body["spec"], body["status"]
    return {
        "metadata": body["metadata"],
        "spec": {
            "source": {"persistentVolumeClaim": spec["source"]["persistentVolumeClaim"], "path": "."},
            "target": spec["target"],
        },
        "status": {name: status[name] for name in ("phase", "observedGeneration", "retryHandled") if name in status},
    }


def _version(body: JsonObject) -> int:
    return int(body["metadata"]["resourceVersion"])


def is_settled(body: JsonObject) -> bool:
    """Whether a resync may pass this object by: it ended, for this generation, and nobody deletes it."""
    metadata, status = body.get("metadata", {}), body.get("status", {})
    return (
        status.get("phase") in (Phase.READY, Phase.FAILED)
        and status.get("observedGeneration") == metadata.get("generation")
        and "deletionTimestamp" not in metadata
        and retry_asked(metadata.get("annotations", {})) == status.get("retryHandled")
    )
