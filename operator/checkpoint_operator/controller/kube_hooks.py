"""The requests of the chart's hooks: they have rights of their own, for seconds, which the operator never has."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from checkpoint_operator.api import names
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.controller.kube import TIMEOUT, Kube, NotFound, api_client

FIELD_MANAGER = "checkpoint-operator-crds"
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_GROUP = f"/apis/{names.GROUP}/{names.VERSION}"
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PAGE = 500


class HookKube(Kube):
    """What the hooks ask the API server, and so the rights in the chart's ``templates/hooks-*.yaml``."""

    async def find_crd(self, name: str) -> JsonObject | None:
        """A CustomResourceDefinition, or None."""
        with suppress(NotFound):
            return await self._send("GET", f"{_CRDS}/{name}")
        return None

    async def apply_crd(self, body: JsonObject) -> JsonObject:
        """Create or change a CRD by server-side apply, and own its fields whoever had them before."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._send("PATCH", f"{_CRDS}/{body['metadata']['name']}", body, content=_APPLY, query=query)

    async def list_held(self, namespace: str | None) -> AsyncIterator[JsonObject]:
        """The metadata of every artifact (of one namespace, or of all) that has our finalizer."""
        path = f"{_GROUP}/{names.PLURAL}" if namespace is None else f"{_GROUP}/namespaces/{namespace}/{names.PLURAL}"
        query: dict[str, Any] = {"limit": PAGE}
        while True:
            page = await self._send("GET", path, accept=_METADATA_ONLY, query=query)
            for item in page["items"] or ():  # null where there are none
                if names.FINALIZER in item["metadata"].get("finalizers", []):
                    yield item["metadata"]
            if not page["metadata"].get("continue"):
                return
            query["continue"] = page["metadata"]["continue"]

    async def let_go(self, metadata: JsonObject) -> None:
        """Take our finalizer off the artifact as it was seen.

        Raises:
            Conflict: it was changed since; NotFound: it is gone.
        """
        rest = [name for name in metadata["finalizers"] if name != names.FINALIZER]
        patch = {"metadata": {"finalizers": rest, "resourceVersion": metadata["resourceVersion"]}}
        path = f"{_GROUP}/namespaces/{metadata['namespace']}/{names.PLURAL}/{metadata['name']}"
        await self._send("PATCH", path, patch, content=_MERGE)

    async def served_kinds(self) -> list[str]:
        """The plural names that the API server serves in our group and version; anybody may ask."""
        with suppress(NotFound):
            return [resource["name"] for resource in (await self._send("GET", _GROUP))["resources"]]
        return []

    async def _send(
        self,
        method: str,
        path: str,
        body: JsonObject | None = None,
        *,
        content: str | None = None,
        accept: str = "application/json",
        query: dict[str, Any] | None = None,
    ) -> JsonObject:
        headers = {"Accept": accept, **({"Content-Type": content} if content else {})}
        answer: JsonObject = await self._ask(
            self._api.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                response_types_map={200: "object", 201: "object"},
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=TIMEOUT,
            )
        )
        return answer


@asynccontextmanager
async def connect_hook() -> AsyncIterator[HookKube]:
    """As :func:`kube.connect`, with a hook's requests."""
    async with api_client() as api:
        yield HookKube(api)
