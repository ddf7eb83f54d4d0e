"""What was seen of mover Jobs and their pods, cut down; fed by watches, by lists, and by what we created ourselves.

A watch that begins anew lists everything, and never tells what was deleted meanwhile. So each entry knows whether it was
seen since its watch began (:meth:`MoverCache.is_fresh`), and :meth:`MoverCache.sweep` drops what a list does not have.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.controller.jobs.observe import JobView, PodView, read_job, read_pod

Key = tuple[str, str]
"""(namespace, name)."""
Item = TypeVar("Item")


@dataclass
class _Watches:
    """Counts, for each watch, how often it began anew: a listed object comes without a type of event."""

    by_namespace: bool
    _began: dict[str, int] = field(default_factory=dict)
    _listing: set[str] = field(default_factory=set)

    def saw(self, kind: str | None, namespace: str) -> None:
        scope = self._scope(namespace)
        if kind is not None:
            self._listing.discard(scope)
        elif scope not in self._listing:
            self._listing.add(scope)
            self._began[scope] = self._began.get(scope, 0) + 1

    def epoch(self, namespace: str) -> int:
        return self._began.get(self._scope(namespace), 0)

    def _scope(self, namespace: str) -> str:
        return namespace if self.by_namespace else ""


@dataclass(slots=True)
class _Entry:
    job: JobView
    epoch: int
    touched: int


class MoverCache:
    """Jobs by (namespace, name), pods by uid. ``by_namespace``: each namespace has a watch of its own."""

    def __init__(self, *, by_namespace: bool) -> None:
        self._watches = _Watches(by_namespace)
        self._jobs: dict[Key, _Entry] = {}
        self._jobs_of: dict[Key, set[Key]] = {}
        self._pods: dict[str, tuple[PodView, int]] = {}
        self._pods_of: dict[Key, set[str]] = {}
        self._forgotten: set[str] = set()
        self._ended: dict[str, int] = {}  # uids whose end was heard of: a list that was begun before may still have them
        self._clock = 0

    def saw_job(self, kind: str | None, body: JsonObject) -> Key:
        """An event of the watch; (namespace, name) of the artifact that it is about."""
        job = read_job(body, gone=kind == "DELETED")
        self._watches.saw(kind, job.namespace)
        self.put_job(job)
        return job.namespace, job.artifact_name

    def put_job(self, job: JobView, *, live: bool = False) -> None:
        """Keep it unless a newer version is known. ``live``: it was read just now."""
        key, known = (job.namespace, job.name), self._jobs.get((job.namespace, job.name))
        if job.gone:
            self._ended[job.uid] = self._tick()
        elif job.uid in self._ended:
            return
        if job.gone and (known is None or known.job.uid != job.uid or job.uid in self._forgotten):
            if known is not None and known.job.uid == job.uid:
                self._drop_job(key)
            return
        if known is not None and not live:
            was_gone = known.job.gone and known.job.uid == job.uid
            if was_gone or job.version < known.job.version:
                return
        if known is not None and known.job.artifact_name != job.artifact_name:
            self._drop_job(key)
        self._jobs[key] = _Entry(job, self._watches.epoch(job.namespace), self._tick())
        self._jobs_of.setdefault((job.namespace, job.artifact_name), set()).add(key)

    def saw_pod(self, kind: str | None, body: JsonObject) -> Key:
        """An event of the watch; (namespace, name) of the artifact that it is about."""
        pod = read_pod(body, gone=kind == "DELETED")
        self.put_pod(pod)
        return pod.namespace, pod.artifact_name

    def put_pod(self, pod: PodView) -> None:
        """Keep it unless a newer version is known."""
        known, _ = self._pods.get(pod.uid, (None, 0))
        if pod.gone:
            self._ended[pod.uid] = self._tick()
        elif pod.uid in self._ended:
            return
        if known is not None and (known.gone or pod.version < known.version):
            return
        if pod.gone and (known is None or pod.job_uid is None or pod.job_uid in self._forgotten):
            self._drop_pod(pod.uid)
            return
        if known is not None and pod.job_uid is None:
            # Its Job was deleted and the pod left alone: it is a mover all the same.
            pod = replace(pod, job_uid=known.job_uid)
        self._pods[pod.uid] = pod, self._tick()
        self._pods_of.setdefault((pod.namespace, pod.artifact_uid), set()).add(pod.uid)

    def job(self, namespace: str, name: str) -> JobView | None:
        entry = self._jobs.get((namespace, name))
        return entry.job if entry else None

    def is_fresh(self, namespace: str, name: str) -> bool:
        """Whether the Job was seen since its watch last began; one that is unknown is not."""
        entry = self._jobs.get((namespace, name))
        return entry is not None and entry.epoch == self._watches.epoch(namespace)

    def jobs_of(self, artifact: Key) -> list[JobView]:
        """The Jobs that carry an artifact's name, whoever's they are."""
        return [self._jobs[key].job for key in self._jobs_of.get(artifact, ())]

    def pods_of(self, namespace: str, artifact_uid: str) -> list[PodView]:
        """The pods that carry an artifact's label, whoever's they are."""
        return [self._pods[uid][0] for uid in self._pods_of.get((namespace, artifact_uid), ())]

    def jobs(self) -> list[JobView]:
        return [entry.job for entry in self._jobs.values()]

    def pods(self) -> Iterator[PodView]:
        for pod, _ in list(self._pods.values()):
            yield pod

    def remove_job(self, namespace: str, name: str) -> None:
        """It was asked for, and there is none of that name."""
        if entry := self._jobs.get((namespace, name)):
            entry.job = replace(entry.job, gone=True)

    def forget(self, job: JobView) -> None:
        """Nothing of this Job is needed any more, but for its pods while they run."""
        self._forgotten.add(job.uid)
        if job.gone:
            self._drop_job((job.namespace, job.name))
        for pod in self.pods_of(job.namespace, job.owner_uid or ""):
            if pod.job_uid == job.uid and pod.gone:
                self._drop_pod(pod.uid)

    def is_forgotten(self, job: JobView) -> bool:
        """Whether :meth:`forget` was called for it: its end just has not arrived yet."""
        return job.uid in self._forgotten

    def mark(self) -> int:
        """A point in time for :meth:`sweep`."""
        return self._tick()

    def sweep(self, mark: int, jobs: set[str], pods: set[str]) -> None:
        """Two lists, begun after ``mark``, have these uids: what they lack, and was not seen since, is gone."""
        for key, entry in list(self._jobs.items()):
            if entry.touched < mark and entry.job.uid not in jobs:
                if entry.job.gone:
                    self._drop_job(key)
                else:
                    entry.job = replace(entry.job, gone=True)
        for uid, (pod, touched) in list(self._pods.items()):
            if touched < mark and uid not in pods:
                if pod.gone or pod.job_uid in self._forgotten:
                    self._drop_pod(uid)
                else:
                    self._pods[uid] = replace(pod, gone=True), touched
        self._ended = {uid: heard for uid, heard in self._ended.items() if heard >= mark}
        self._forgotten &= {entry.job.uid for entry in self._jobs.values()} | {
            str(pod.job_uid) for pod, _ in self._pods.values()
        }

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _drop_job(self, key: Key) -> None:
        entry = self._jobs.pop(key, None)
        if entry is not None:
            owner = (entry.job.namespace, entry.job.artifact_name)
            _discard(self._jobs_of, owner, key)

    def _drop_pod(self, uid: str) -> None:
        pod, _ = self._pods.pop(uid, (None, 0))
        if pod is not None:
            _discard(self._pods_of, (pod.namespace, pod.artifact_uid), uid)


def _discard(index: dict[Key, set[Item]], owner: Key, item: Item) -> None:
    if held := index.get(owner):
        held.discard(item)
        if not held:
            del index[owner]
