"""kopf's view of the operator: events become keys, settings become kopf's, nothing is decided here."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import kopf

from checkpoint_operator.api import names
from checkpoint_operator.controller.jobs.executor import JobExecutor
from checkpoint_operator.controller.reconciler import Reconciler

_JOBS, _PODS = ("batch", "v1", "jobs"), ("", "v1", "pods")


class _NoDiffBase(kopf.DiffBaseStorage):
    """kopf keeps the last seen spec in an annotation, on every object; we compare levels, and need none."""

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: Any) -> None:
        return None


def login_in_pod(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """kopf's own, but by the address that every pod is told, as other clients do: kopf goes by the server's name, and would
    depend on the cluster's DNS."""
    found = kopf.login_with_service_account(**kwargs)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if found is None or not host:
        return found
    return replace(found, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")


def register(registry: kopf.OperatorRegistry, reconciler: Reconciler, jobs: JobExecutor | None) -> None:
    """Watch CheckpointArtifacts, and with the Job executor the Jobs and pods of movers; whatever happens to one, the
    artifact's key is looked at."""

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        # As kube.connect() chooses: both must talk to one cluster.
        if os.environ.get("KUBECONFIG"):
            return kopf.login_with_kubeconfig(**kwargs)
        return login_in_pod(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    def artifact_event(event: Mapping[str, Any], **_: Any) -> None:
        reconciler.saw(event["type"], dict(event["object"]))

    if jobs is None:
        return

    @kopf.on.event(*_JOBS, registry=registry)
    def job_event(event: Mapping[str, Any], **_: Any) -> None:
        jobs.saw_job(event["type"], dict(event["object"]))

    @kopf.on.event(*_PODS, registry=registry)
    def pod_event(event: Mapping[str, Any], **_: Any) -> None:
        jobs.saw_pod(event["type"], dict(event["object"]))


def settings() -> kopf.OperatorSettings:
    """kopf's settings; each one has a reason in DESIGN §4."""
    chosen = kopf.OperatorSettings()
    # On the server: a decorator's `labels` would have every pod of the cluster sent to us first.
    for watched in (_JOBS, _PODS):
        chosen.watching.label_selectors[watched] = names.LABEL_ARTIFACT_UID
    chosen.posting.enabled = False  # we post our own events
    chosen.scanning.disabled = True  # no right to list CRDs is needed
    chosen.peering.standalone = True
    chosen.persistence.diffbase_storage = _NoDiffBase()
    # kopf strips what it takes for its own finalizer from every object.
    chosen.persistence.finalizer = f"{names.GROUP}/kopf-unused"
    chosen.watching.server_timeout = 300
    chosen.watching.connect_timeout = 10
    chosen.watching.chunk_size = 25  # whole objects of one page are in memory several times over
    # Each object has a worker that holds its last event for as long as it idles: at the start that is all of them.
    chosen.queueing.idle_timeout = 0.5
    chosen.networking.request_timeout = 30
    # A watch that exhausts its retries stops the operator: an API server may be away for hours.
    chosen.networking.error_backoffs = [1, 2, 5, *([10] * 24 * 360)]
    return chosen


def quiet() -> None:
    """kopf and aiohttp log a line for each event and request at INFO, and the Kubernetes client whole objects at DEBUG."""
    for name in ("kopf.objects", "kopf._core.engines.activities", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("kopf", "kubernetes", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))
