"""Level-based reconciliation: observe what is there, plan one step, act, look again.

The worker of a key is the only writer of that artifact's status, and every write names the version of the object that it
was decided upon. So a stale cache or a second operator costs a conflict and another look, never a wrong status.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact, parse_artifact
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.conditions import ConditionType, find_condition
from checkpoint_operator.api.protocol import Layout
from checkpoint_operator.api.status import ArtifactStatus
from checkpoint_operator.controller.cache import ArtifactCache, is_settled
from checkpoint_operator.controller.decisions import (
    LOOK_AGAIN,
    AddFinalizer,
    Decision,
    Event,
    Observed,
    Policy,
    Prepare,
    Record,
    ReleaseDependents,
    RemoveFinalizer,
    Start,
    Stop,
    Wait,
)
from checkpoint_operator.controller.executor import (
    EarlierMover,
    Executor,
    MoverState,
    NoMover,
    PendingMover,
)
from checkpoint_operator.controller.health import Health
from checkpoint_operator.controller.kube import Conflict, Kube, KubeError, NotFound
from checkpoint_operator.controller.logs import about
from checkpoint_operator.controller.metrics import Metrics, StateCollector, by_phase
from checkpoint_operator.controller.plan import plan
from checkpoint_operator.controller.queue import WorkQueue
from checkpoint_operator.controller.scheduling import Demand, Key, Limits, Places, bucket_of

MAX_STEPS = 10
"""Decisions for one key in a row before others get their turn."""

_log = logging.getLogger(__name__)


class Reconciler:
    """Owns the queue, the cache and the places of movers; ``now`` is the clock (UTC)."""

    def __init__(
        self,
        kube: Kube,
        queue: WorkQueue[Key],
        executor: Executor,
        policy: Policy,
        limits: Limits,
        now: Callable[[], datetime],
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._kube = kube
        self._queue = queue
        self._executor = executor
        self._policy = policy
        self._places = Places(limits)
        self._now = now
        self._metrics = metrics
        self._health = health
        self.cache = ArtifactCache()

    def saw(self, kind: str | None, body: JsonObject) -> None:
        """An event of the watch: remember the object, look at its key. What kind of event it was does not matter."""
        self._health.event()
        if kind == "DELETED":
            key = (body["metadata"]["namespace"], body["metadata"]["name"])
            self.cache.remove(key)
        else:
            key = self.cache.put(body)
        self._queue.add(key)

    async def fill(self, namespaces: tuple[str, ...]) -> None:
        """Learn of everybody, before any worker decides about data that somebody else may name, or about free places."""
        await self._executor.resync()
        async for body in self._kube.list_artifacts(namespaces):
            key = self.cache.put(body)
            if not is_settled(body):
                self._queue.add(key)
                self._line_up(body)
        for key in self._executor.artifacts():
            self._queue.add(key)

    def _line_up(self, body: JsonObject) -> None:
        """A mover that was found running has its place before the first new one asks for one, and whoever may want one is
        in line before the first look at anybody: else the quickest look would be first, and not the oldest artifact."""
        try:
            artifact = parse_artifact(body)
        except ValidationError:
            return
        mover = self._executor.state(artifact)
        if not isinstance(mover, NoMover | EarlierMover):
            self._places.take(self._demand(artifact), asleep=_is_asleep(mover))
        elif not artifact.spec.suspend and not artifact.status.next_retry_time:
            self._places.wait(self._demand(artifact))

    async def resync(self, namespaces: tuple[str, ...]) -> None:
        """Find what a broken watch never told: compare the versions of everything, fetch what differs."""
        await self._executor.resync()
        for key in self._executor.artifacts():
            self._queue.add(key)  # whoever has no use for its Job any more deletes it
        seen = {key: version async for key, version in self._kube.list_versions(namespaces)}
        # What is not in the list may have been created while its pages were read.
        everybody = {*seen, *self.cache.keys()}
        changed = {key for key in everybody if self.cache.version(key) != seen.get(key)}
        self._health.listed(len(changed))
        for key in everybody:
            if key in changed:
                await self._refresh(key)
            elif not is_settled(self.cache.get(key) or {}):
                self._queue.add(key)

    async def work(self) -> None:
        """One worker; runs for ever. An error of one key never ends it."""
        while True:
            key = await self._queue.get()
            body = self.cache.get(key)
            try:
                with about(key, body["metadata"]["uid"] if body else None), self._metrics.reconciling():
                    await self._work_on(key)
            finally:
                self._queue.done(key)

    async def _work_on(self, key: Key) -> None:
        try:
            seconds = await self._reconcile(key)
            self._queue.forget(key)
            if seconds is not None:
                self._queue.add_after(key, seconds)
        except Conflict:
            self._metrics.failed_to_reconcile("Conflict")
            _log.debug("%s/%s changed meanwhile, looking again", *key)
            await self._refresh(key)
        except NotFound:
            self.cache.remove(key)
            self._queue.add(key)
        except KubeError as error:
            self._metrics.failed_to_reconcile("API")
            self._leave(key)  # nobody waits for the one whose turn it is while that waits for the API server
            delay = self._queue.retry(key)
            _log.warning("%s/%s: %s; trying again in %.0f s", *key, error, delay)
        except Exception:
            self._metrics.failed_to_reconcile("Bug")
            self._leave(key)
            delay = self._queue.retry(key)
            _log.exception("%s/%s: reconciling failed; trying again in %.0f s", *key, delay)

    async def _refresh(self, key: Key) -> None:
        try:
            self.cache.put(await self._kube.get(*key), live=True)
            self._queue.add(key)
        except NotFound:
            self.cache.remove(key)
            self._queue.add(key)
        except KubeError:
            self._queue.retry(key)

    async def _reconcile(self, key: Key) -> float | None:
        """Take steps until there is nothing to do now; seconds until the next look, or None."""
        for _ in range(MAX_STEPS):
            body = self.cache.get(key)
            if await self._executor.stop_others(key, body["metadata"]["uid"] if body else None):
                # The mover of an object that is gone keeps its place until it has ended; its end is reported to this key.
                return LOOK_AGAIN
            if body is None or is_settled(body):
                if body is not None:
                    await self._executor.forget(key, body["metadata"]["uid"])
                self._metrics.ended(key, self._now())
                self._release(key)
                return None
            try:
                artifact = parse_artifact(body)
            except ValidationError as error:
                fields = ", ".join(".".join(str(part) for part in item["loc"]) for item in error.errors())
                _log.error("%s/%s is not understood and left alone, see: %s", *key, fields)
                self._leave(key)
                return None
            seconds = await self._step(artifact)
            if seconds != 0:
                return seconds
        return 0

    async def _step(self, artifact: CheckpointArtifact) -> float | None:
        """One decision and its execution; 0: look again at once."""
        await self._executor.look(artifact)
        terminating = await self._is_namespace_terminating(artifact)
        now = self._now()
        seen = replace(self._observe(artifact, now), namespace_terminating=terminating)
        decision = plan(seen, self._policy, now)
        if isinstance(decision, Prepare):
            decision = await self._prepare(artifact, seen, decision, now)
        if not isinstance(decision, Wait):
            _log.debug("%s/%s: %s", *artifact.key, type(decision).__name__)
        if not _waits_in_line(seen, decision):
            self._leave(artifact.key)
        match decision:
            case Wait(seconds):
                return seconds
            case AddFinalizer():
                finalizers = [*artifact.metadata.finalizers, names.FINALIZER]
                await self._write(artifact, {"metadata": {"finalizers": finalizers}})
                return 0
            case ReleaseDependents():
                finalizers = [name for name in artifact.metadata.finalizers if name != names.FOREGROUND_DELETION]
                await self._write(artifact, {"metadata": {"finalizers": finalizers}})
                return 0
            case RemoveFinalizer(event):
                await self._post(artifact, event, now)
                finalizers = [name for name in artifact.metadata.finalizers if name != names.FINALIZER]
                await self._write(artifact, {"metadata": {"finalizers": finalizers}})
                self._metrics.let_go(event.reason if event else "NothingStored")
                self._metrics.ended(artifact.key, now)
                await self._forget(artifact)
                self._release(artifact.key)
                return None
            case Record(status, event, seconds, forget):
                await self._write_status(artifact, status.to_wire())
                self._metrics.wrote(artifact, status, now)
                await self._post(artifact, event, now)
                if forget:
                    self._metrics.ended(artifact.key, now)
                    await self._forget(artifact)
                    self._release(artifact.key)
                return seconds
            case Start(status, operation):
                await self._forget(artifact)
                await self._write_status(artifact, status.to_wire())
                assert status.mover is not None
                notice = await self._executor.start(status.mover.name, artifact, operation, now)
                self._metrics.started(artifact.key, operation, now)
                if notice:
                    await self._post(artifact, Event(notice.reason, notice.message, warning=True), now)
                return LOOK_AGAIN
            case Stop(reason):
                assert artifact.status.mover is not None
                await self._executor.stop(artifact.status.mover.name, artifact, reason)
                return LOOK_AGAIN
            case Prepare():
                raise AssertionError("what was prepared is decided")

    async def _prepare(self, artifact: CheckpointArtifact, seen: Observed, wanted: Prepare, now: datetime) -> Decision:
        """Ask whether a mover could start, and decide with the answer."""
        # The place was found free in this very turn of the event loop: take it before anything else runs.
        self._places.take(self._demand(artifact))
        decision: Decision | None = None
        try:
            preparation = await self._executor.prepare(wanted.name, artifact, wanted.operation)
            decision = plan(replace(seen, preparation=preparation), self._policy, now)
        finally:
            if not isinstance(decision, Start):
                self._release(artifact.key)
        return decision

    def _observe(self, artifact: CheckpointArtifact, now: datetime) -> Observed:
        """Gather what a decision depends on; reads caches only, so that nothing changes between look and decision."""
        key, status = artifact.key, artifact.status
        mover = self._executor.state(artifact)
        demand = self._demand(artifact)
        why = None
        # A finished mover keeps its place until what it said is written: else the next one decides on the status of before.
        if isinstance(mover, NoMover | EarlierMover):
            if self._places.runs(key):
                self._release(key)
            # For this look: whoever is not told to wait, or wants no mover now, leaves the line as soon as that is decided.
            self._places.wait(demand)
            why = self._places.explain(demand, now, _told(status))
        elif not self._places.runs(key) or self._places.sleeps(key) != _is_asleep(mover):
            # It was found running after a restart; or somebody else lets it sleep, or has woken it.
            self._places.take(demand, asleep=_is_asleep(mover))
            self._wake()
        return Observed(
            artifact=artifact,
            mover=mover,
            kind=self._executor.kind,
            blocked=why,
            look_again=self._places.look_again(),
            refusal=self._executor.refuse(artifact),
            also_stored_by=self._also_stored_by(artifact),
        )

    async def _is_namespace_terminating(self, artifact: CheckpointArtifact) -> bool:
        """Asked live, and only where the next step may be to remove data: who deletes a namespace deletes its artifacts
        after it, so that an answer from before would not do."""
        status = artifact.status
        is_held = artifact.metadata.deletion_timestamp is not None and names.FINALIZER in artifact.metadata.finalizers
        if not is_held or status.launches == status.clean_launches:
            return False
        if not isinstance(self._executor.state(artifact), NoMover):
            return False
        try:
            namespace = await self._kube.get_namespace(artifact.metadata.namespace)
        except NotFound:
            return True
        return "deletionTimestamp" in namespace["metadata"]

    def _also_stored_by(self, artifact: CheckpointArtifact) -> str | None:
        """Another Ready artifact at the same place, as far as this one's namespace may know of it."""
        if artifact.metadata.deletion_timestamp is None or artifact.spec.target.layout is Layout.UNIQUE:
            return None
        place = self._executor.place(artifact)
        for body in self.cache.ready_at(artifact.spec.target.uri):
            try:
                other = parse_artifact(body)
            except ValidationError:
                return "an artifact that is not understood"
            if other.metadata.uid != artifact.metadata.uid and self._executor.place(other) == place:
                return other.metadata.name if other.key[0] == artifact.key[0] else "an artifact of another namespace"
        return None

    def _demand(self, artifact: CheckpointArtifact) -> Demand:
        place = self._executor.place(artifact)
        return Demand(artifact.key, place, artifact.metadata.creation_timestamp, bucket_of(artifact))

    def _release(self, key: Key) -> None:
        """Give back a mover's place, and look at those who get it."""
        if self._places.release(key):
            self._wake()

    def _leave(self, key: Key) -> None:
        """It wants no mover now: whoever is behind it moves up."""
        if self._places.leave(key):
            self._wake()

    def _wake(self) -> None:
        """Look at those who may start now, and at nobody else: a thousand may be waiting."""
        for demand in self._places.next():
            self._queue.add(demand.key)

    def state(self) -> StateCollector:
        """What is true at the moment that somebody asks for it, as numbers; may be asked from another thread."""
        return StateCollector(
            self._places, lambda: by_phase(self.cache.statuses()), self._queue.__len__, self._health.heard_ago
        )

    def set_limits(self, limits: Limits) -> None:
        """More movers start at once where more may; none is stopped where fewer may."""
        self._places.limits = limits
        self._wake()

    async def _forget(self, artifact: CheckpointArtifact) -> None:
        if artifact.status.mover:
            await self._executor.forget(artifact.key, artifact.metadata.uid, artifact.status.mover.name)

    async def _write(self, artifact: CheckpointArtifact, patch: JsonObject) -> None:
        self.cache.put(await self._kube.patch(artifact, patch))

    async def _write_status(self, artifact: CheckpointArtifact, status: JsonObject) -> None:
        patch = merge_patch(artifact.status.to_wire(), status)
        if patch:
            self.cache.put(await self._kube.patch(artifact, {"status": patch}, status=True))

    async def _post(self, artifact: CheckpointArtifact, event: Event | None, now: datetime) -> None:
        """Events are for people: one that cannot be posted is logged, and stops nothing."""
        if event is None:
            return
        _log.log(
            logging.WARNING if event.warning else logging.INFO, "%s/%s: %s: %s", *artifact.key, event.reason, event.message
        )
        try:
            await self._kube.post_event(
                artifact, event.reason, event.message, now, warning=event.warning, of_namespace=event.of_namespace
            )
        except KubeError as error:
            _log.warning("%s/%s: the event %s was not posted: %s", *artifact.key, event.reason, error)


def _is_asleep(mover: MoverState) -> bool:
    """Whether somebody else than the operator decides when it runs: its Job is suspended."""
    return isinstance(mover, PendingMover) and mover.patient


def _told(status: ArtifactStatus) -> str | None:
    """What stands in the Ready condition."""
    ready = find_condition(status.conditions, ConditionType.READY)
    return ready.message if ready else None


def _waits_in_line(seen: Observed, decision: Decision) -> bool:
    """Whether an artifact stays in line: it is about to start, or was told to wait for others and not for something else."""
    if isinstance(decision, AddFinalizer | Start):
        return True
    return seen.blocked is not None and seen.blocked == _told(
        decision.status if isinstance(decision, Record) else seen.artifact.status
    )


def merge_patch(old: JsonObject, new: JsonObject) -> JsonObject:
    """The RFC 7386 merge patch that turns ``old`` into ``new``; empty if they are equal. Unknown fields stay untouched."""
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := merge_patch(before, value):
                patch[key] = inner
        elif value != before:
            patch[key] = value
    return patch


async def resync_forever(reconciler: Reconciler, namespaces: tuple[str, ...], seconds: float) -> None:
    """Resync now and then; an API server that is away is tried again at the next turn."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await reconciler.resync(namespaces)
        except KubeError as error:
            _log.warning("resync: %s", error)
