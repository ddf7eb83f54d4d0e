"""Every request to the Kubernetes API is made here, and no ApiException leaves this file."""

import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.base import JsonObject

TIMEOUT = 30.0
"""Seconds for one request."""
PAGE = 100
"""Objects in one page of a list: bounds the memory of a resync of ten thousand artifacts."""
NOTE_MAX = 1024
"""The API's own limit of an event's note, in bytes."""
FIELD_MANAGER = "checkpoint-operator"
_MERGE_PATCH = "application/merge-patch+json"

_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

Answer = TypeVar("Answer")


class KubeError(Exception):
    """A request failed in a way that a later one may not: the API server is away, or refuses us."""


class Conflict(KubeError):
    """The object is not what we thought: read it again."""


class Forbidden(KubeError):
    """Our service account may not do this."""


class NotFound(KubeError):
    """There is no such object (any more)."""


class Kube:
    """The requests that the operator makes, and so the rights that it needs (``deploy/rbac.yaml``)."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api
        self._objects = client.CustomObjectsApi(api)
        self._events = client.EventsV1Api(api)

    async def list_artifacts(self, namespaces: tuple[str, ...]) -> AsyncIterator[JsonObject]:
        """Every CheckpointArtifact (of these namespaces, or of all), page by page."""
        for namespace in namespaces or (None,):
            token: str | None = None
            while True:
                page = await self._ask(self._list(namespace, token))
                for item in page["items"]:
                    yield item
                token = page["metadata"].get("continue")
                if not token:
                    break

    def _list(self, namespace: str | None, token: str | None) -> Awaitable[JsonObject]:
        more: dict[str, Any] = {"limit": PAGE, "_request_timeout": TIMEOUT} | ({"_continue": token} if token else {})
        if namespace is None:
            answer: Awaitable[JsonObject] = self._objects.list_cluster_custom_object(
                names.GROUP, names.VERSION, names.PLURAL, **more
            )
        else:
            answer = self._objects.list_namespaced_custom_object(names.GROUP, names.VERSION, namespace, names.PLURAL, **more)
        return answer

    async def list_versions(self, namespaces: tuple[str, ...]) -> AsyncIterator[tuple[tuple[str, str], str]]:
        """((namespace, name), resourceVersion) of every artifact: the server sends metadata alone, a tenth of the bytes."""
        base = f"/apis/{names.GROUP}/{names.VERSION}"
        for path in [f"{base}/namespaces/{name}/{names.PLURAL}" for name in namespaces] or [f"{base}/{names.PLURAL}"]:
            token: str | None = None
            while True:
                query = [("limit", PAGE), *([("continue", token)] if token else [])]
                page = await self._ask(
                    self._api.call_api(
                        path,
                        "GET",
                        query_params=query,
                        header_params={"Accept": _METADATA_ONLY},
                        response_types_map={200: "object"},
                        auth_settings=["BearerToken"],
                        _return_http_data_only=True,
                        _request_timeout=TIMEOUT,
                    )
                )
                for item in page["items"]:
                    metadata = item["metadata"]
                    yield (metadata["namespace"], metadata["name"]), metadata["resourceVersion"]
                token = page["metadata"].get("continue")
                if not token:
                    break

    async def get(self, namespace: str, name: str) -> JsonObject:
        """One artifact as it is now. Raises :class:`NotFound`."""
        return await self._ask(
            self._objects.get_namespaced_custom_object(
                names.GROUP, names.VERSION, namespace, names.PLURAL, name, _request_timeout=TIMEOUT
            )
        )

    async def patch(self, artifact: CheckpointArtifact, patch: JsonObject, *, status: bool = False) -> JsonObject:
        """Merge-patch exactly the version of the object that was decided upon.

        Raises:
            Conflict: somebody changed it; NotFound: it is gone.
        """
        guarded = {**patch, "metadata": {**patch.get("metadata", {}), "resourceVersion": artifact.metadata.resource_version}}
        send = (
            self._objects.patch_namespaced_custom_object_status if status else self._objects.patch_namespaced_custom_object
        )
        return await self._ask(
            send(
                names.GROUP,
                names.VERSION,
                artifact.metadata.namespace,
                names.PLURAL,
                artifact.metadata.name,
                guarded,
                field_manager=FIELD_MANAGER,
                _content_type=_MERGE_PATCH,
                _request_timeout=TIMEOUT,
            )
        )

    async def post_event(
        self, artifact: CheckpointArtifact, reason: str, note: str, now: datetime, *, warning: bool
    ) -> None:
        """Say something about an artifact, for ``kubectl describe`` and ``kubectl events``."""
        metadata = artifact.metadata
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{metadata.name[:48].rstrip('.')}-", "namespace": metadata.namespace},
            "regarding": {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "namespace": metadata.namespace,
                "name": metadata.name,
                "uid": metadata.uid,
                "resourceVersion": metadata.resource_version,
            },
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "action": "Reconcile",
            "note": _cut(note),
            "eventTime": now.isoformat(timespec="microseconds"),
            "reportingController": f"{names.GROUP}/operator",
            "reportingInstance": os.environ.get("HOSTNAME", "operator")[:128],
        }
        await self._ask(self._events.create_namespaced_event(metadata.namespace, body, _request_timeout=TIMEOUT))

    async def _ask(self, request: Awaitable[Answer]) -> Answer:
        try:
            return await request
        except ApiException as error:
            _refuse(error)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise KubeError(f"the API server cannot be reached: {type(error).__name__}: {error}") from error


def _cut(note: str) -> str:
    """As much of a note as the API takes: it counts bytes."""
    data = note.encode()
    return note if len(data) <= NOTE_MAX else data[: NOTE_MAX - 3].decode(errors="ignore") + "…"


def _refuse(error: ApiException) -> NoReturn:
    said = f"HTTP {error.status} {error.reason}: {str(error.body or '')[:500]}"
    match error.status:
        case 401 | 403:
            raise Forbidden(said) from error
        case 404:
            raise NotFound(said) from error
        case 409:
            raise Conflict(said) from error
    raise KubeError(said) from error


@asynccontextmanager
async def connect() -> AsyncIterator[Kube]:
    """A client for the cluster that we run in, or that KUBECONFIG names.

    Raises:
        KubeError: neither says where a cluster is.
    """
    configuration = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise KubeError(f"no cluster: set KUBECONFIG, or run as a pod with a service account ({error})") from error
    async with client.ApiClient(configuration) as api:
        yield Kube(api)
