"""Brings the CRD to the cluster (``operator crds apply``), and never an older one over a newer.

A Helm hook runs it: a CRD that was part of the release would go with it, and every artifact with the CRD.
"""

import asyncio
import re

from checkpoint_operator.api import names
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.crd import custom_resource_definition
from checkpoint_operator.controller.kube import KubeError
from checkpoint_operator.controller.kube_hooks import HookKube

ESTABLISHED_SECONDS = 60.0
"""How long the API server may take to serve the kind."""

# As people write versions (0.2.0-rc.1) and as Python packages do (0.2.0rc1).
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(?:[-.]?(dev|alpha|a|beta|b|rc)[-.]?(\d+)?)?(?:\+[0-9A-Za-z.-]+)?")
_RANKS = {"dev": 0, "alpha": 1, "a": 1, "beta": 2, "b": 2, "rc": 3, None: 4}


class OlderCRD(Exception):
    """The cluster's CRD is newer than ours, or of a version that we cannot order; nothing was changed."""


def definition(version: str) -> JsonObject:
    """The CRD, marked with the version that brings it."""
    body = custom_resource_definition()
    metadata = {**body["metadata"], "annotations": {names.ANNOTATION_CRD_VERSION: version}}
    return {**body, "metadata": metadata}


def refusal(there: JsonObject | None, version: str) -> str | None:
    """Why ours may not replace what is there, or None."""
    if there is None:
        return None
    theirs = there["metadata"].get("annotations", {}).get(names.ANNOTATION_CRD_VERSION)
    if theirs is None:  # older than the annotation
        return None
    name = there["metadata"]["name"]
    before, after = _order(theirs), _order(version)
    if before is None or after is None:
        return (
            f"the cluster's CRD {name} says that it is of version {theirs!r:.100}, which cannot be compared with {version}: "
            f"correct its annotation {names.ANNOTATION_CRD_VERSION}, or remove it to have {version} applied"
        )
    if after < before:
        return (
            f"the cluster's CRD {name} is of version {theirs}, and this is {version}: an older one would drop fields that "
            f"artifacts have by now. Upgrade to {theirs} or newer; an older operator works with a newer CRD: use "
            "`helm rollback`, or set crds.apply=false"
        )
    return None


def _order(version: str) -> tuple[int, int, int, int, int] | None:
    found = _VERSION.fullmatch(version)
    if found is None:
        return None
    major, minor, patch, stage, number = found.groups()
    return int(major), int(minor), int(patch), _RANKS[stage], int(number or 0)


async def apply(kube: HookKube, version: str) -> str:
    """Apply the CRD and wait until it is served; a sentence for the log.

    Raises:
        OlderCRD: nothing was changed.
        KubeError: the API server is away, refuses, or does not come to serve the kind.
    """
    ours = definition(version)
    name = ours["metadata"]["name"]
    reason = refusal(await kube.find_crd(name), version)
    if reason is not None:
        raise OlderCRD(reason)
    live = await kube.apply_crd(ours)
    deadline = asyncio.get_running_loop().time() + ESTABLISHED_SECONDS
    while not _is_established(live):
        if asyncio.get_running_loop().time() > deadline:
            raise KubeError(f"the CRD {name} was applied, but is not served after {ESTABLISHED_SECONDS:g} s")
        await asyncio.sleep(0.2)
        live = await kube.find_crd(name) or live
    return f"the CRD {name} of version {version} is applied and served"


def _is_established(live: JsonObject) -> bool:
    conditions = live.get("status", {}).get("conditions") or []  # null when it was just made
    return any(condition["type"] == "Established" and condition["status"] == "True" for condition in conditions)
