"""Starts the operator: settings, kopf for the watches, our workers beside it, and an orderly end."""

import asyncio
import json
import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime

import kopf

from checkpoint_operator.controller import handlers
from checkpoint_operator.controller.config import ConfigError, InlineConfig, Settings, load_inline, load_settings
from checkpoint_operator.controller.config_jobs import JobRules, load_job_rules
from checkpoint_operator.controller.inline import InlineExecutor
from checkpoint_operator.controller.jobs.executor import JobExecutor
from checkpoint_operator.controller.kube import Forbidden, Kube, KubeError, NotFound, connect
from checkpoint_operator.controller.plan import Policy
from checkpoint_operator.controller.queue import WorkQueue
from checkpoint_operator.controller.reconciler import Reconciler, resync_forever
from checkpoint_operator.controller.scheduling import Key, Limits

_log = logging.getLogger(__name__)


def _utc_now() -> datetime:
    # Kubernetes keeps whole seconds in metav1.Time; a finer value would never compare equal after a round trip.
    return datetime.now(UTC).replace(microsecond=0)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _configure_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    handlers.quiet()


Rules = InlineConfig | JobRules
"""What the admin decided about movers; which of the two says who runs them."""


def _executor_of(
    rules: Rules, kube: Kube, settings: Settings, queue: WorkQueue[Key]
) -> tuple[InlineExecutor | JobExecutor, JobExecutor | None]:
    """Who runs movers, and once more where that is who has to hear of Jobs and pods."""
    if isinstance(rules, InlineConfig):
        return InlineExecutor(rules, settings.state_directory, queue.add, _utc_now), None
    jobs = JobExecutor(kube, rules, settings.namespace_list, queue.add, _utc_now)
    return jobs, jobs


async def run(settings: Settings, rules: Rules) -> None:
    """Run until a signal or a fatal error; Inline movers are stopped before it returns, Jobs go on."""
    queue: WorkQueue[Key] = WorkQueue()
    async with connect() as kube:
        executor, jobs = _executor_of(rules, kube, settings, queue)
        reconciler = Reconciler(
            kube,
            queue,
            executor,
            Policy(
                max_attempts=settings.max_attempts,
                backoff=settings.backoff_seconds,
                backoff_max=settings.backoff_max_seconds,
                progress_every=settings.progress_seconds,
                no_progress=settings.no_progress_seconds,
            ),
            Limits(settings.max_movers, settings.max_movers_per_namespace, settings.max_movers_per_bucket),
            _utc_now,
        )
        registry = kopf.OperatorRegistry()
        handlers.register(registry, reconciler, jobs)
        namespaces = settings.namespace_list
        # Who decides about data must know everybody who names it: no worker starts on a cache that is half full.
        await reconciler.fill(namespaces)
        tasks = [
            *(asyncio.create_task(reconciler.work(), name=f"worker {n}") for n in range(settings.reconcile_workers)),
            asyncio.create_task(resync_forever(reconciler, namespaces, settings.resync_seconds), name="resync"),
            *([asyncio.create_task(jobs.follow(), name="progress")] if jobs else []),
        ]
        try:
            await kopf.operator(
                registry=registry,
                settings=handlers.settings(),
                standalone=True,
                clusterwide=not namespaces,
                namespaces=namespaces,
                liveness_endpoint=settings.probe_address or None,
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await executor.shutdown(settings.shutdown_seconds)


def main() -> int:
    """Entry point; wrong settings are told on standard error, by name, and nothing is started."""
    try:
        settings = load_settings(sys.argv[1:])
        rules: Rules
        if settings.executor == "job":
            rules = load_job_rules(settings.jobs_config)
        else:
            rules = load_inline(settings.inline_config)
            _prepare(settings, rules)
    except ConfigError as error:
        print(f"checkpoint-operator: {error}", file=sys.stderr)
        return 2
    _configure_logging(settings)
    if isinstance(rules, InlineConfig):
        _log.info("serving %d claims inline", len(rules.claims))
    else:
        _log.info("movers run as Jobs, with the image %s", rules.image)
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(run(settings, rules))
    except NotFound:
        print("checkpoint-operator: the cluster does not know CheckpointArtifacts: kubectl apply -f crds/", file=sys.stderr)
        return 1
    except Forbidden as error:
        print(f"checkpoint-operator: the rights are missing: kubectl apply -f deploy/manifests/ ({error})", file=sys.stderr)
        return 1
    except KubeError as error:
        print(f"checkpoint-operator: {error}", file=sys.stderr)
        return 1
    return 0


def _prepare(settings: Settings, inline: InlineConfig) -> None:
    if not inline.claims:
        return
    try:
        settings.state_directory.mkdir(parents=True, exist_ok=True)
        if not os.access(settings.state_directory, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise ConfigError(
            f"setting state_directory: '{settings.state_directory}' cannot be used: {error.strerror}; it must be a writable "
            "folder that survives a restart"
        ) from None
