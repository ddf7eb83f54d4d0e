"""Every request to the Kubernetes API is made here, and no ApiException leaves this file."""

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
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
PAGE = 25
"""Objects in one page of a list: bounds the memory of a resync of ten thousand artifacts."""
NOTE_MAX = 1024
"""The API's own limit of an event's note, in bytes."""
FIELD_MANAGER = "checkpoint-operator"
_MERGE_PATCH = "application/merge-patch+json"
_CORE = "/api/v1"
_JOBS = "/apis/batch/v1"

_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
LOG_TIMEOUT = 5.0
"""Seconds for a look at a pod's log: it goes through a kubelet, which may be gone."""

Answer = TypeVar("Answer")


CountRequest = Callable[[str, str, int], None]
"""Told the method, the URL and the status of each request; 0: no answer came."""


class KubeError(Exception):
    """A request failed in a way that a later one may not: the API server is away, or refuses us."""


class Conflict(KubeError):
    """The object is not what we thought: read it again."""


class Forbidden(KubeError):
    """Our service account may not do this."""


class NotFound(KubeError):
    """There is no such object (any more)."""


class Refused(KubeError):
    """The API server, a quota or an admission rule does not take the object, and would not take it again as it is.

    ``invalid``: the object itself is wrong (422), not the moment.
    """

    def __init__(self, said: str, *, invalid: bool) -> None:
        super().__init__(said)
        self.invalid = invalid


class Kube:
    """The requests that the operator makes, and so the rights that it needs (docs/permissions.md)."""

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
        for path in _paths(base, names.PLURAL, namespaces):
            async for item in self._pages(path, accept=_METADATA_ONLY):
                metadata = item["metadata"]
                yield (metadata["namespace"], metadata["name"]), metadata["resourceVersion"]

    async def list_mover_jobs(self, namespaces: tuple[str, ...]) -> AsyncIterator[JsonObject]:
        """Every Job with our label."""
        for path in _paths(_JOBS, "jobs", namespaces):
            async for item in self._pages(path, labelSelector=names.LABEL_ARTIFACT_UID):
                yield item

    async def list_mover_pods(self, namespaces: tuple[str, ...]) -> AsyncIterator[JsonObject]:
        """Every pod with our label."""
        for path in _paths(_CORE, "pods", namespaces):
            async for item in self._pages(path, labelSelector=names.LABEL_ARTIFACT_UID):
                yield item

    async def list_pods(self, namespace: str) -> AsyncIterator[JsonObject]:
        """Every pod of a namespace, dead or alive."""
        async for item in self._pages(f"{_CORE}/namespaces/{namespace}/pods"):
            yield item

    async def get_job(self, namespace: str, name: str) -> JsonObject:
        """One Job as it is now. Raises :class:`NotFound`."""
        return await self._request(f"{_JOBS}/namespaces/{namespace}/jobs/{name}")

    async def create_job(self, namespace: str, body: JsonObject) -> JsonObject:
        """Create a Job. Raises :class:`Conflict` where one of that name is there, :class:`Refused` where it may not be."""
        return await self._request(f"{_JOBS}/namespaces/{namespace}/jobs", "POST", body, fieldManager=FIELD_MANAGER)

    async def delete_job(self, namespace: str, name: str, uid: str, *, wait_for_pods: bool) -> None:
        """Delete exactly this Job and its pods; that it is gone (or another one by now) is no error.

        ``wait_for_pods``: the Job stays until its pods have ended.
        """
        body = {
            "preconditions": {"uid": uid},
            "propagationPolicy": "Foreground" if wait_for_pods else "Background",
        }
        with suppress(NotFound, Conflict):
            await self._request(f"{_JOBS}/namespaces/{namespace}/jobs/{name}", "DELETE", body)

    async def get_claim(self, namespace: str, name: str) -> JsonObject:
        """A PersistentVolumeClaim. Raises :class:`NotFound`."""
        return await self._request(f"{_CORE}/namespaces/{namespace}/persistentvolumeclaims/{name}")

    async def get_service_account(self, namespace: str, name: str) -> JsonObject:
        """Raises :class:`NotFound`."""
        return await self._request(f"{_CORE}/namespaces/{namespace}/serviceaccounts/{name}")

    async def get_namespace(self, name: str) -> JsonObject:
        """Raises :class:`NotFound`."""
        return await self._request(f"{_CORE}/namespaces/{name}")

    async def get_node(self, name: str) -> JsonObject:
        """Raises :class:`NotFound` where the node was deleted, :class:`Forbidden` where we serve listed namespaces only."""
        return await self._request(f"{_CORE}/nodes/{name}")

    async def read_log(self, namespace: str, pod: str, container: str, *, lines: int, limit: int) -> bytes:
        """The end of a container's log: at most so many lines and bytes."""
        query = {"container": container, "tailLines": lines, "limitBytes": limit}
        answer = await self._ask(
            self._api.call_api(
                f"{_CORE}/namespaces/{namespace}/pods/{pod}/log",
                "GET",
                query_params=list(query.items()),
                auth_settings=["BearerToken"],
                _preload_content=False,  # the client would read a log of one JSON line as an object
                _request_timeout=LOG_TIMEOUT,
            )
        )
        async with answer:
            data: bytes = await self._ask(answer.content.read(limit))
            if answer.status != 200:
                _refuse(ApiException(status=answer.status, reason=answer.reason))
        return data

    async def _pages(self, path: str, *, accept: str | None = None, **query: Any) -> AsyncIterator[JsonObject]:
        query["limit"] = PAGE
        while True:
            page = await self._request(path, accept=accept, **query)
            for item in page["items"] or ():  # null in a list of metadata alone where there are none
                yield item
            query["continue"] = page["metadata"].get("continue")
            if not query["continue"]:
                break

    async def _request(
        self, path: str, method: str = "GET", body: JsonObject | None = None, *, accept: str | None = None, **query: Any
    ) -> JsonObject:
        """One request and its JSON, without the client's models: they cost several times the memory and time."""
        answer: JsonObject = await self._ask(
            self._api.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": accept} if accept else {},
                body=body,
                response_types_map={200: "object", 201: "object", 202: "object"},
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=TIMEOUT,
            )
        )
        return answer

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
        self,
        artifact: CheckpointArtifact,
        reason: str,
        note: str,
        now: datetime,
        *,
        warning: bool,
        of_namespace: bool = False,
    ) -> None:
        """Say something about an artifact, for ``kubectl describe`` and ``kubectl events``.

        ``of_namespace``: about its namespace instead, which is being deleted and takes no new event itself.
        """
        metadata = artifact.metadata
        where = "default" if of_namespace else metadata.namespace
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{metadata.name[:48].rstrip('.')}-", "namespace": where},
            "regarding": {"apiVersion": "v1", "kind": "Namespace", "name": metadata.namespace}
            if of_namespace
            else {
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
        await self._ask(self._events.create_namespaced_event(where, body, _request_timeout=TIMEOUT))

    async def _ask(self, request: Awaitable[Answer]) -> Answer:
        try:
            return await request
        except ApiException as error:
            _refuse(error)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise KubeError(f"the API server cannot be reached: {type(error).__name__}: {error}") from error


class _CountingClient(client.ApiClient):  # type: ignore[misc]
    """A client whose every request is counted, whoever of its generated classes makes it."""

    def __init__(self, configuration: client.Configuration, count: CountRequest | None) -> None:
        super().__init__(configuration)
        self._count = count or (lambda _method, _url, _code: None)

    async def request(self, method: str, url: str, *args: Any, **more: Any) -> Any:
        code = 0
        try:
            answer = await super().request(method, url, *args, **more)
            code = answer.status
        except ApiException as error:
            code = error.status or 0
            raise
        finally:
            self._count(method, url, code)
        return answer


def _paths(base: str, plural: str, namespaces: tuple[str, ...]) -> list[str]:
    return [f"{base}/namespaces/{name}/{plural}" for name in namespaces] or [f"{base}/{plural}"]


def _cut(note: str) -> str:
    """As much of a note as the API takes: it counts bytes."""
    data = note.encode()
    return note if len(data) <= NOTE_MAX else data[: NOTE_MAX - 3].decode(errors="ignore") + "…"


def _message(body: Any) -> str:
    """The sentence in a metav1.Status, or whatever came instead of one."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, TypeError, KeyError):
        return str(body or "")


def _refuse(error: ApiException) -> NoReturn:
    said = f"HTTP {error.status} {error.reason}: {_message(error.body)[:500]}"
    match error.status:
        case 401:
            raise Forbidden(said) from error
        case 403:
            # Rights, quotas and admission share the code; only the authorizer speaks of what a user cannot do.
            if "cannot" in said and "User" in said:
                raise Forbidden(said) from error
            raise Refused(said, invalid=False) from error
        case 404:
            raise NotFound(said) from error
        case 409:
            raise Conflict(said) from error
        case 400 | 422:
            raise Refused(said, invalid=error.status == 422) from error
    raise KubeError(said) from error


@asynccontextmanager
async def connect(count: CountRequest | None = None) -> AsyncIterator[Kube]:
    """The operator's requests, by :func:`api_client`."""
    async with api_client(count) as api:
        yield Kube(api)


@asynccontextmanager
async def api_client(count: CountRequest | None = None) -> AsyncIterator[client.ApiClient]:
    """A client for the cluster that we run in, or that KUBECONFIG names; ``count`` is told of each request.

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
    async with _CountingClient(configuration, count) as api:
        yield api
