"""Starts the operator: settings, kopf for the watches, our workers beside it, and an orderly end."""

import asyncio
import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime

import kopf
from prometheus_client import CollectorRegistry, ProcessCollector

from checkpoint_operator.controller import handlers, logs
from checkpoint_operator.controller.config import ConfigError, InlineConfig, Settings, load_inline, load_settings
from checkpoint_operator.controller.config_jobs import JobRules, load_job_rules
from checkpoint_operator.controller.decisions import Policy
from checkpoint_operator.controller.health import AddressError, Health, beat_forever, serve
from checkpoint_operator.controller.inline import InlineExecutor
from checkpoint_operator.controller.jobs.executor import JobExecutor
from checkpoint_operator.controller.kube import Forbidden, Kube, KubeError, NotFound, connect
from checkpoint_operator.controller.limits import LimitsFile, follow_limits
from checkpoint_operator.controller.metrics import Metrics
from checkpoint_operator.controller.queue import WorkQueue
from checkpoint_operator.controller.reconciler import Reconciler, resync_forever
from checkpoint_operator.controller.scheduling import Key, Limits

_log = logging.getLogger(__name__)


def _utc_now() -> datetime:
    # Kubernetes keeps whole seconds in metav1.Time; a finer value would never compare equal after a round trip.
    return datetime.now(UTC).replace(microsecond=0)


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


async def run(settings: Settings, rules: Rules, limits: Limits, limits_file: LimitsFile | None) -> None:
    """Run until a signal or a fatal error; Inline movers are stopped before it returns, Jobs go on."""
    queue: WorkQueue[Key] = WorkQueue()
    numbers = CollectorRegistry()
    metrics, health = Metrics(numbers), Health(settings.resync_seconds)
    ProcessCollector(registry=numbers)
    async with connect(metrics.called) as kube:
        executor, jobs = _executor_of(rules, kube, settings, queue)
        reconciler = Reconciler(kube, queue, executor, _policy_of(settings), limits, _utc_now, metrics, health)
        numbers.register(reconciler.state())
        registry = kopf.OperatorRegistry()
        handlers.register(registry, reconciler, jobs)
        namespaces = settings.namespace_list
        tasks = [asyncio.create_task(beat_forever(health), name="beat")]
        try:
            with serve(settings.listen_address, health, numbers):
                # Who decides about data must know everybody who names it: no worker starts on a cache that is half full.
                await reconciler.fill(namespaces)
                health.filled()
                tasks += _tasks_of(reconciler, jobs, settings, limits_file, metrics)
                for task in tasks:
                    health.watch_over(task)
                await kopf.operator(
                    registry=registry,
                    settings=handlers.settings(),
                    standalone=True,
                    clusterwide=not namespaces,
                    namespaces=namespaces,
                )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await executor.shutdown(settings.shutdown_seconds)


def _policy_of(settings: Settings) -> Policy:
    return Policy(
        max_attempts=settings.max_attempts,
        backoff=settings.backoff_seconds,
        backoff_max=settings.backoff_max_seconds,
        progress_every=settings.progress_seconds,
        no_progress=settings.no_progress_seconds,
    )


def _tasks_of(
    reconciler: Reconciler,
    jobs: JobExecutor | None,
    settings: Settings,
    limits_file: LimitsFile | None,
    metrics: Metrics,
) -> list[asyncio.Task[None]]:
    """What runs beside the watches, for as long as they do."""
    forever = {f"worker {number}": reconciler.work() for number in range(settings.reconcile_workers)}
    forever["resync"] = resync_forever(reconciler, settings.namespace_list, settings.resync_seconds)
    if jobs:
        forever["progress"] = jobs.follow()
    if limits_file:
        forever["limits"] = follow_limits(limits_file, reconciler.set_limits, metrics.limits_file)
    return [asyncio.create_task(work, name=name) for name, work in forever.items()]


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
        limits = Limits(settings.max_movers, settings.max_movers_per_namespace, settings.max_movers_per_bucket)
        limits_file = LimitsFile(settings.limits_file, limits) if settings.limits_file else None
    except ConfigError as error:
        print(f"checkpoint-operator: {error}", file=sys.stderr)
        return 2
    logs.configure(settings.log_level, settings.log_format)
    handlers.quiet()
    if isinstance(rules, InlineConfig):
        _log.info("serving %d claims inline", len(rules.claims))
    else:
        _log.info("movers run as Jobs, with the image %s", rules.image)
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(run(settings, rules, limits_file.limits if limits_file else limits, limits_file))
    except NotFound:
        print("checkpoint-operator: the cluster does not know CheckpointArtifacts: kubectl apply -f crds/", file=sys.stderr)
        return 1
    except Forbidden as error:
        print(f"checkpoint-operator: the rights are missing: kubectl apply -f deploy/manifests/ ({error})", file=sys.stderr)
        return 1
    except KubeError as error:
        print(f"checkpoint-operator: {error}", file=sys.stderr)
        return 1
    except AddressError as error:
        print(f"checkpoint-operator: setting listen_address: {error}", file=sys.stderr)
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
