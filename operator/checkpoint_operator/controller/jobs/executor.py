"""The Job executor: a mover is a Job in the artifact's namespace, and what it says is read from its pod (DESIGN §5).

Everything that is decided here is decided by pure functions beside it: :mod:`.bounds` and :mod:`.holder` whether and where a
mover may run, :mod:`.template` what its Job is, :mod:`.observe` what is seen of it. This file asks, creates and deletes.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Literal

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation
from checkpoint_operator.api.status import Phase
from checkpoint_operator.controller.config_jobs import JobRules
from checkpoint_operator.controller.executor import (
    FinishedMover,
    Held,
    MoverState,
    Notice,
    PendingMover,
    Preparation,
    Prepared,
    StopReason,
)
from checkpoint_operator.controller.jobs import addresses, adoption, bounds, holder, template
from checkpoint_operator.controller.jobs.cache import Key, MoverCache
from checkpoint_operator.controller.jobs.gather import Gatherer
from checkpoint_operator.controller.jobs.observe import (
    CONTAINER,
    JobView,
    Node,
    PodView,
    Told,
    is_running,
    observe,
    read_job,
    read_pod,
)
from checkpoint_operator.controller.jobs.words import read_progress
from checkpoint_operator.controller.kube import Conflict, Forbidden, Kube, KubeError, NotFound, Refused

LOG_EVERY = 5.0
"""Seconds between two looks at one mover's log."""
LOGS_PER_SECOND = 20
"""All movers together: a thousand of them are looked at less often each."""
LOG_READERS = 4
LOG_LINES = 10
LOG_BYTES = 16 * 1024
OVERDUE = timedelta(seconds=5)
"""A pod that should have ended so long ago makes us look at its node."""
UNSEEN_AFTER = timedelta(seconds=60)
"""And where the node seems fine, or may not be looked at: after so long it is treated as unseen."""
NODE_MEMORY = timedelta(seconds=10)
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"

_log = logging.getLogger(__name__)


class JobExecutor:
    """Implements :class:`checkpoint_operator.controller.executor.Executor`.

    ``notify`` is called with an artifact's key whenever there is news of its mover; ``now`` is the clock.
    """

    kind: Literal["Job"] = "Job"

    def __init__(
        self,
        kube: Kube,
        rules: JobRules,
        namespaces: tuple[str, ...],
        notify: Callable[[Key], None],
        now: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._gather = Gatherer(kube)
        self._rules = rules
        self._namespaces = namespaces
        self._notify = notify
        self._now = now
        self.cache = MoverCache(by_namespace=bool(namespaces))
        self._told: dict[Key, Told] = {}
        self._missing: set[Key] = set()
        self._rendered: dict[Key, JsonObject] = {}
        self._refused: dict[Key, Failure] = {}
        self._nodes: dict[str, Node] = {}
        self._node_memory: dict[str, tuple[Node, datetime]] = {}
        self._look_due: dict[str, datetime] = {}

    # What is there

    async def resync(self) -> None:
        """List all Jobs and pods of ours and replace what is remembered. Before anything else, and every few minutes."""
        mark = self.cache.mark()
        jobs, pods = set(), set()
        async for body in self._kube.list_mover_jobs(self._namespaces):
            job = read_job(body)
            jobs.add(job.uid)
            self.cache.put_job(job)
        async for body in self._kube.list_mover_pods(self._namespaces):
            pod = read_pod(body)
            pods.add(pod.uid)
            self.cache.put_pod(pod)
        self.cache.sweep(mark, jobs, pods)
        known = {(job.namespace, job.name) for job in self.cache.jobs()}
        self._told = {key: told for key, told in self._told.items() if key in known}
        self._missing.clear()
        running = {pod.uid for pod in self.cache.pods() if not pod.over}
        self._nodes = {uid: node for uid, node in self._nodes.items() if uid in running}
        self._look_due = {uid: due for uid, due in self._look_due.items() if uid in running}

    def artifacts(self) -> set[Key]:
        """(namespace, name) of every artifact that a Job is there for: those without a use for it shall delete it."""
        return {(job.namespace, job.artifact_name) for job in self.cache.jobs() if job.is_movers}

    def saw_job(self, kind: str | None, body: JsonObject) -> None:
        self._notify(self.cache.saw_job(kind, body))

    def saw_pod(self, kind: str | None, body: JsonObject) -> None:
        self._notify(self.cache.saw_pod(kind, body))

    def refuse(self, artifact: CheckpointArtifact) -> Failure | None:
        return bounds.refuse(artifact, self._rules)

    def place(self, artifact: CheckpointArtifact) -> str:
        target = artifact.spec.target
        uri = target.uri.removesuffix("/")
        if target.persistent_volume_claim:
            return f"{artifact.metadata.namespace}/{target.persistent_volume_claim.claim_name}|{uri}"
        return f"{addresses.store_of(target.endpoint)}|{uri}"

    async def look(self, artifact: CheckpointArtifact) -> None:
        namespace, mover = artifact.metadata.namespace, artifact.status.mover
        if mover and mover.kind == "Job" and not mover.done and self._should_read(artifact, (namespace, mover.name)):
            try:
                self.cache.put_job(read_job(await self._kube.get_job(namespace, mover.name)), live=True)
            except NotFound:
                self._missing.add((namespace, mover.name))
                self.cache.remove_job(namespace, mover.name)
        for pod in self.cache.pods_of(namespace, artifact.metadata.uid):
            self._nodes.pop(pod.uid, None)
            if self._is_in_doubt(pod):
                self._nodes[pod.uid] = await self._node_of(pod)

    def _should_read(self, artifact: CheckpointArtifact, key: Key) -> bool:
        """The cached Job is believed if it was seen since its watch last began; one that is gone is gone."""
        if key in self._missing or key in self._refused or artifact.status.phase == Phase.READY:
            return False
        job = self.cache.job(*key)
        return job is None or not (job.gone or self.cache.is_fresh(*key))

    def _is_in_doubt(self, pod: PodView) -> bool:
        overdue = pod.deleted_at is not None and self._now() > pod.deleted_at + OVERDUE
        return not pod.over and pod.node is not None and (overdue or pod.disrupted is not None)

    async def _node_of(self, pod: PodView) -> Node:
        assert pod.node is not None
        now = self._now()
        known, asked = self._node_memory.get(pod.node, (Node.FINE, None))
        if asked is None or now > asked + NODE_MEMORY:
            try:
                known = _read_node(await self._kube.get_node(pod.node))
            except NotFound:
                known = Node.GONE
            except Forbidden:
                known = Node.FINE
            self._node_memory[pod.node] = known, now
        if known is Node.FINE and pod.deleted_at and now > pod.deleted_at + UNSEEN_AFTER:
            return Node.SILENT
        return known

    def state(self, artifact: CheckpointArtifact) -> MoverState:
        namespace, uid, mover = artifact.metadata.namespace, artifact.metadata.uid, artifact.status.mover
        pods = self.cache.pods_of(namespace, uid)
        job, told, operation = None, Told(), Operation.UPLOAD
        if mover and mover.kind == "Job" and not mover.done:
            key = (namespace, mover.name)
            if refused := self._refused.get(key):
                return FinishedMover(0, None, failure=refused, ran=False)
            job, told, operation = self.cache.job(*key), self._told.get(key, told), Operation(mover.operation)
            if job and job.owner_uid != uid:
                job = None  # somebody was faster to take the name; what it says is not about this artifact
        return observe(job, pods, told, operation, artifact.spec.target.uri, self._nodes)

    # What is done

    async def prepare(self, name: str, artifact: CheckpointArtifact, operation: Operation) -> Preparation:
        namespace = artifact.metadata.namespace
        wanted = holder.claim_names(artifact, operation)
        claims = {claim: await self._gather.claim(artifact, claim) for claim in wanted}
        # Without its claim nothing starts, whoever the others are.
        pods = await self._gather.holders(artifact) if wanted and None not in claims.values() else []
        account = bounds.service_account_name(artifact, self._rules)
        service_account = await self._gather.service_account(artifact, account) if account else None
        # What the namespace allows matters only to what would be refused without it: most starts need not ask.
        bare: JsonObject = {"metadata": {"name": namespace}}
        answer = holder.assess(artifact, operation, claims, pods, bare, service_account, self._rules)
        if isinstance(answer, Failure):
            allowed = await self._gather.namespace(artifact)
            answer = holder.assess(artifact, operation, claims, pods, allowed, service_account, self._rules)
        match answer:
            case Failure():
                return answer
            case holder.Hold(reason, message):
                return Held(reason, message)
        job = template.render(name, artifact, operation, answer, self._rules, self._earlier_mover_gone(artifact))
        if isinstance(job, Failure):
            return job
        self._rendered[namespace, name] = job
        return Prepared(answer.run_as_user)

    def _earlier_mover_gone(self, artifact: CheckpointArtifact) -> bool:
        pods = self.cache.pods_of(artifact.metadata.namespace, artifact.metadata.uid)
        return not any(pod.job_uid and is_running(pod, self._nodes) for pod in pods)

    async def start(self, name: str, artifact: CheckpointArtifact, operation: Operation, now: datetime) -> Notice | None:
        namespace = artifact.metadata.namespace
        wanted = self._rendered.pop((namespace, name))
        self._missing.discard((namespace, name))
        notice = None
        try:
            try:
                live = await self._kube.create_job(namespace, wanted)
            except Conflict:
                live = await self._kube.get_job(namespace, name)
                if not self._is_ours(live, wanted, artifact.metadata.uid):
                    uid = live["metadata"]["uid"]
                    message = f"a Job named {name} was there that the operator had not made; it was deleted"
                    notice = Notice("ForeignJob", message)
                    await self._kube.delete_job(namespace, name, uid, wait_for_pods=False)
                    live = await self._kube.create_job(namespace, wanted)
        except Refused as error:
            self._refused[namespace, name] = _why_refused(error)
            self._notify(artifact.key)
        else:
            self.cache.put_job(read_job(live), live=True)
        return notice

    @staticmethod
    def _is_ours(live: JsonObject, wanted: JsonObject, uid: str) -> bool:
        job = read_job(live)
        return job.owner_uid == uid and not job.deleting and adoption.equals(live, wanted)

    async def stop(self, name: str, artifact: CheckpointArtifact, reason: StopReason) -> None:
        key = (artifact.metadata.namespace, name)
        job = self.cache.job(*key)
        if job is None or job.gone:
            return
        pending = isinstance(self.state(artifact), PendingMover)
        await self._kube.delete_job(job.namespace, job.name, job.uid, wait_for_pods=True)
        self._told[key] = replace(self._told.get(key, Told()), stopping=reason, was_pending=pending)
        self._notify(artifact.key)

    async def stop_others(self, key: Key, uid: str | None) -> bool:
        others = [job for job in self.cache.jobs_of(key) if job.is_movers and job.owner_uid != uid]
        for job in others:
            if not job.gone and not job.deleting:
                await self._kube.delete_job(job.namespace, job.name, job.uid, wait_for_pods=True)
            if job.gone:
                self._drop(job)
        owners = {job.owner_uid for job in others if job.owner_uid}
        pods = [pod for owner in owners for pod in self.cache.pods_of(key[0], owner)]
        return any(pod.job_uid and is_running(pod, self._nodes) and not self._is_in_doubt(pod) for pod in pods)

    async def forget(self, key: Key, uid: str, name: str | None = None) -> None:
        if name:
            self._refused.pop((key[0], name), None)
        for job in self.cache.jobs_of(key):
            if not job.is_movers or job.owner_uid != uid or name not in (None, job.name) or self.cache.is_forgotten(job):
                continue
            if not job.gone and not job.deleting:
                await self._kube.delete_job(job.namespace, job.name, job.uid, wait_for_pods=False)
            self._drop(job)

    def _drop(self, job: JobView) -> None:
        self.cache.forget(job)
        self._told.pop((job.namespace, job.name), None)
        for pod in self.cache.pods_of(job.namespace, job.owner_uid or ""):
            self._look_due.pop(pod.uid, None)

    # Progress

    async def follow(self) -> None:
        """Look at what no watch tells of: running movers' logs, pods that should have ended. Runs for ever."""
        turn, reads_logs = asyncio.Semaphore(LOG_READERS), self._rules.progress_from_logs
        while True:
            await asyncio.sleep(1)
            self._call_for_doubtful()
            if reads_logs:
                try:
                    await self._read_logs(turn)
                except Forbidden as error:
                    _log.warning("progress is not shown, the right pods/log is missing: %s", error)
                    self._told = {key: replace(told, moved_at=None) for key, told in self._told.items()}
                    reads_logs = False

    def _call_for_doubtful(self) -> None:
        """Nobody tells of a node that went silent: have the artifacts of its pods looked at."""
        now = self._now()
        for pod in self.cache.pods():
            if self._is_in_doubt(pod) and self._look_due.get(pod.uid, now) <= now:
                self._look_due[pod.uid] = now + NODE_MEMORY
                self._notify((pod.namespace, pod.artifact_name))

    async def _read_logs(self, turn: asyncio.Semaphore) -> None:
        running = [(job, pod) for pod in self.cache.pods() if (job := self._runs_for(pod)) is not None]
        every = timedelta(seconds=max(LOG_EVERY, len(running) / LOGS_PER_SECOND))
        now = self._now()
        due = [(job, pod) for job, pod in running if self._look_due.get(pod.uid, now) <= now]
        for _, pod in due:
            self._look_due[pod.uid] = now + every
        await asyncio.gather(*(self._read_progress(job, pod, turn, every) for job, pod in due))

    def _runs_for(self, pod: PodView) -> JobView | None:
        """The Job of a pod whose mover runs, if both are what they say."""
        if pod.over or pod.started is None or pod.deleted_at is not None:
            return None
        jobs = self.cache.jobs_of((pod.namespace, pod.artifact_name))
        return next((job for job in jobs if job.uid == pod.job_uid and job.owner_uid == pod.artifact_uid), None)

    async def _read_progress(self, job: JobView, pod: PodView, turn: asyncio.Semaphore, every: timedelta) -> None:
        key = (job.namespace, job.name)
        try:
            async with turn:
                tail = await self._kube.read_log(pod.namespace, pod.name, CONTAINER, lines=LOG_LINES, limit=LOG_BYTES)
        except Forbidden:
            raise
        except KubeError as error:
            _log.debug("the log of %s/%s: %s", pod.namespace, pod.name, error)
            told = self._told.get(key, Told())
            if told.moved_at:
                # Who cannot be seen is not accused of standing still.
                self._told[key] = replace(told, moved_at=told.moved_at + every)
            return
        told, progress = self._told.get(key, Told()), read_progress(tail)
        if progress is not None and progress != told.progress:
            self._told[key] = replace(told, progress=progress, moved_at=self._now())
            self._notify((job.namespace, job.artifact_name))
        elif told.moved_at is None:
            self._told[key] = replace(told, moved_at=self._now())

    async def shutdown(self, seconds: float) -> None:
        """Nothing: movers go on, and the next operator finds them."""


def _read_node(body: JsonObject) -> Node:
    taints = (body.get("spec") or {}).get("taints") or []
    if any(taint.get("key") == _OUT_OF_SERVICE for taint in taints):
        return Node.GONE
    conditions = (body.get("status") or {}).get("conditions") or []
    ready = any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)
    return Node.FINE if ready else Node.SILENT


def _why_refused(error: Refused) -> Failure:
    """Why the API server did not take a Job; it was never there, so nothing was written."""
    if error.invalid:
        return Failure(reason=Reason.INVALID_SPEC, message=f"the mover's Job is refused: {error}", wrote=False)
    quota = "exceeded quota" in str(error)
    reason = Reason.QUOTA_EXCEEDED if quota else Reason.POD_REFUSED
    return Failure(reason=reason, message=f"the mover's Job is refused: {error}", wrote=False)
