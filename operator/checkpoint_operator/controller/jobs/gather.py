"""What is looked up before a mover starts: claims, who mounts them, ServiceAccount, namespace. Remembered for a moment.

None of it is watched: most of it never matters to us. A hundred artifacts that start together, or that wait for one claim
that is not there, share the answers of that moment. But nobody gets an answer that is older than itself: who creates an
artifact may rely on its pod, its claim and its annotations being seen.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Generic, TypeVar

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.controller.jobs.holder import GROUPS_MAX, TOLERATIONS_MAX
from checkpoint_operator.controller.kube import Kube, NotFound

MOMENT = 2.0
"""Seconds for which an answer is good. What changes within them would have changed between look and start as well."""
_WHOLE_SECONDS = 1.0
"""How much later than it says an object may have been created."""

Key = TypeVar("Key")
Answer = TypeVar("Answer")


class _Moment(Generic[Key, Answer]):
    """Asks once for everybody who wants to know the same within a moment. An error is nobody's answer."""

    def __init__(self, ask: Callable[[Key], Awaitable[Answer]]) -> None:
        self._ask = ask
        self._answers: dict[Key, tuple[float, asyncio.Future[Answer]]] = {}

    async def get(self, key: Key, created: datetime) -> Answer:
        """``created``: since when there is somebody who wants to know."""
        now = time.time()  # not monotonic: it is compared with what the API server says
        self._answers = {key: kept for key, kept in self._answers.items() if abs(now - kept[0]) < MOMENT}
        kept = self._answers.get(key)
        if kept and kept[0] >= created.timestamp() + _WHOLE_SECONDS:
            return await asyncio.shield(kept[1])
        future = asyncio.ensure_future(self._ask(key))
        self._answers[key] = now, future
        try:
            return await asyncio.shield(future)
        except Exception:
            self._answers.pop(key, None)
            raise


class Gatherer:
    """The reads of :meth:`JobExecutor.prepare`."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._claims: _Moment[tuple[str, str], JsonObject | None] = _Moment(self._read_claim)
        self._accounts: _Moment[tuple[str, str], JsonObject | None] = _Moment(self._read_account)
        self._holders: _Moment[str, list[JsonObject]] = _Moment(self._list_holders)
        self._namespaces: _Moment[str, JsonObject] = _Moment(kube.get_namespace)

    async def claim(self, artifact: CheckpointArtifact, name: str) -> JsonObject | None:
        """A PersistentVolumeClaim of the artifact's namespace, or None where there is none."""
        return await self._claims.get((artifact.metadata.namespace, name), artifact.metadata.creation_timestamp)

    async def holders(self, artifact: CheckpointArtifact) -> list[JsonObject]:
        """Every pod of its namespace that mounts any claim, dead or alive, without what nobody here reads."""
        return await self._holders.get(artifact.metadata.namespace, artifact.metadata.creation_timestamp)

    async def service_account(self, artifact: CheckpointArtifact, name: str) -> JsonObject | None:
        """A ServiceAccount of its namespace, or None where there is none."""
        return await self._accounts.get((artifact.metadata.namespace, name), artifact.metadata.creation_timestamp)

    async def namespace(self, artifact: CheckpointArtifact) -> JsonObject:
        return await self._namespaces.get(artifact.metadata.namespace, artifact.metadata.creation_timestamp)

    async def _read_claim(self, key: tuple[str, str]) -> JsonObject | None:
        try:
            return await self._kube.get_claim(*key)
        except NotFound:
            return None

    async def _read_account(self, key: tuple[str, str]) -> JsonObject | None:
        try:
            return await self._kube.get_service_account(*key)
        except NotFound:
            return None

    async def _list_holders(self, namespace: str) -> list[JsonObject]:
        return [slim(pod) async for pod in self._kube.list_pods(namespace) if _mounts_a_claim(pod)]


def _mounts_a_claim(pod: JsonObject) -> bool:
    return any("persistentVolumeClaim" in volume for volume in pod["spec"].get("volumes") or [])


_KEPT_OF_CONTAINER = ("name", "securityContext", "volumeMounts")
_KEPT_OF_METADATA = ("name", "namespace", "uid", "labels", "ownerReferences", "creationTimestamp", "deletionTimestamp")
_KEPT_OF_SPEC = ("nodeName",)
_KEPT_OF_SECURITY = ("runAsUser", "runAsGroup", "fsGroup", "seLinuxOptions")


def slim(pod: JsonObject) -> JsonObject:
    """A pod without commands, environments and images, and without the end of lists that have none: a thousand of a
    namespace are in memory for a moment."""
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status") or {}
    security = spec.get("securityContext") or {}
    groups = (security.get("supplementalGroups") or [])[:GROUPS_MAX]
    return {
        "metadata": _only(metadata, _KEPT_OF_METADATA),
        "spec": {
            **_only(spec, _KEPT_OF_SPEC),
            "securityContext": {**_only(security, _KEPT_OF_SECURITY), **({"supplementalGroups": groups} if groups else {})},
            # Two more: those for nodes that are gone, which every pod has, are not counted.
            "tolerations": (spec.get("tolerations") or [])[: TOLERATIONS_MAX + 2],
            "volumes": [volume for volume in spec.get("volumes") or [] if "persistentVolumeClaim" in volume],
            **{
                kind: [_only(container, _KEPT_OF_CONTAINER) for container in spec[kind]]
                for kind in ("containers", "initContainers")
                if spec.get(kind)
            },
        },
        "status": {
            **_only(status, ("phase", "startTime")),
            **{
                kind: [_only(container, ("name", "user")) for container in status[kind]]
                for kind in ("containerStatuses", "initContainerStatuses")
                if status.get(kind)
            },
        },
    }


def _only(body: JsonObject, keys: tuple[str, ...]) -> JsonObject:
    return {key: body[key] for key in keys if key in body}
