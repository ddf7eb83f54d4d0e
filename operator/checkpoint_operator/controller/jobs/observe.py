"""What the cluster tells of a mover's Job and pods, as one state. Pure; what a pod says is checked by :mod:`.words`.

The API server's objects are cut down to what a decision reads as soon as they arrive: a thousand of them stay small.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from checkpoint_operator.api import names
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import RESULT_MAX_BYTES, Failure, Operation, Progress
from checkpoint_operator.controller.executor import (
    EarlierMover,
    FinishedMover,
    MoverState,
    NoMover,
    PendingMover,
    RunningMover,
    StopReason,
)
from checkpoint_operator.controller.jobs.words import plain, read_result

CONTAINER = "mover"
STOPPED_EXIT = 143
KILLED_EXIT = 137
_IMAGE_REASONS = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
}
_EXIT_CODE = re.compile(r"exit code (\d{1,3})\b")


class Node(StrEnum):
    """What is known of a pod's node."""

    FINE = "Fine"
    SILENT = "Silent"
    """It does not answer: what runs there may go on running, unseen."""
    GONE = "Gone"
    """It was deleted, or somebody who knows says that it is out of service: nothing runs there."""


@dataclass(frozen=True, slots=True)
class JobView:
    """What is read of a Job. ``taken_up``: the Job controller has looked at it. ``gone``: it was deleted, and this is the
    last that was seen of it."""

    namespace: str
    name: str
    uid: str
    version: int
    artifact_name: str
    owner_uid: str | None
    created: datetime
    deleting: bool
    complete: bool
    failed: str | None
    pinned: bool
    suspended: bool = False
    taken_up: bool = False
    gone: bool = False

    @property
    def is_movers(self) -> bool:
        """It has an artifact for an owner, and the name that only the operator gives. Others are left alone."""
        return self.owner_uid is not None and self.name.startswith(names.mover_prefix(self.owner_uid))


@dataclass(frozen=True, slots=True)
class PodView:
    """What is read of a pod. ``gone``: it was deleted, and this is the last that was seen of it."""

    namespace: str
    name: str
    uid: str
    version: int
    artifact_uid: str
    artifact_name: str
    job_uid: str | None
    created: datetime
    deleted_at: datetime | None
    phase: str
    node: str | None
    started: datetime | None
    exit_code: int | None
    ended_reason: str
    last_words: str
    waiting: tuple[str, str] | None
    unschedulable: str | None
    disrupted: str | None
    gone: bool = False

    @property
    def over(self) -> bool:
        """Nothing of it runs any more."""
        return self.gone or self.phase in ("Succeeded", "Failed") or self.exit_code is not None


@dataclass(frozen=True, slots=True)
class Told:
    """What is known beside the API objects: the log's last line of progress, and our own wish that it stops.

    ``was_pending``: when it was asked to stop it could not start.
    """

    progress: Progress | None = None
    moved_at: datetime | None = None
    stopping: StopReason | None = None
    was_pending: bool = False


def read_job(body: JsonObject, *, gone: bool = False) -> JobView:
    """Cut a Job down. Fields that are missing or odd are taken as absent: others may write Jobs with our labels."""
    metadata, status = body["metadata"], body.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or [] if item.get("status") == "True"}
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    template = ((body.get("spec") or {}).get("template") or {}).get("spec") or {}
    return JobView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=int(metadata["resourceVersion"]),
        artifact_name=(metadata.get("labels") or {}).get(names.LABEL_ARTIFACT_NAME, ""),
        owner_uid=_controller(metadata, names.KIND, names.GROUP),
        created=_time(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        complete="Complete" in conditions,
        failed=f"{failed.get('reason', '')}: {failed.get('message', '')}" if failed else None,
        pinned=bool((template.get("affinity") or {}).get("nodeAffinity")),
        suspended=bool((body.get("spec") or {}).get("suspend")),
        taken_up="startTime" in status,
        gone=gone,
    )


def read_pod(body: JsonObject, *, gone: bool = False) -> PodView:
    """Cut a pod down; see :func:`read_job`."""
    metadata, status = body["metadata"], body.get("status") or {}
    labels = metadata.get("labels") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    scheduled, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    containers = status.get("containerStatuses") or []
    state = next((item.get("state") or {} for item in containers if item.get("name") == CONTAINER), {})
    ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    started = (state.get("running") or ended).get("startedAt")
    disrupted = None
    if disruption.get("status") == "True":
        disrupted = disruption.get("message") or disruption.get("reason") or "it was disrupted"
    elif status.get("reason") in ("Evicted", "Preempted", "Preempting", "Terminated", "NodeShutdown", "NodeLost"):
        disrupted = status.get("message") or status["reason"]
    deleted_at = metadata.get("deletionTimestamp")
    return PodView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=int(metadata["resourceVersion"]),
        artifact_uid=labels.get(names.LABEL_ARTIFACT_UID, ""),
        artifact_name=labels.get(names.LABEL_ARTIFACT_NAME, ""),
        job_uid=_controller(metadata, "Job", "batch"),
        created=_time(metadata["creationTimestamp"]),
        deleted_at=_time(deleted_at) if deleted_at else None,
        phase=status.get("phase") or "Pending",
        node=(body.get("spec") or {}).get("nodeName"),
        started=_time(started) if started else None,
        exit_code=ended.get("exitCode"),
        ended_reason=ended.get("reason") or "",
        last_words=(ended.get("message") or "")[: 2 * RESULT_MAX_BYTES],
        waiting=(waiting.get("reason") or "", waiting.get("message") or "") if waiting else None,
        unschedulable=(scheduled.get("message") or "no node was found")
        if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
        else None,
        disrupted=plain(disrupted) if disrupted else None,
        gone=gone,
    )


def _controller(metadata: JsonObject, kind: str, group: str) -> str | None:
    """The uid of the object that controls this one, if it is of that kind."""
    for owner in metadata.get("ownerReferences") or []:
        if owner.get("controller") and owner.get("kind") == kind and str(owner.get("apiVersion")).startswith(f"{group}/"):
            return str(owner["uid"])
    return None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def observe(
    job: JobView | None,
    pods: Sequence[PodView],
    told: Told,
    operation: Operation,
    target_uri: str,
    nodes: dict[str, Node],
) -> MoverState:
    """The state of an artifact's mover.

    ``job``: the one that the status names, if its owner is the artifact. ``pods``: all of the artifact's namespace with its
    label. ``nodes``: by pod uid, for those whose node was asked for; the others' are taken to be fine.
    """
    state = _observe(job, pods, told, operation, target_uri, nodes)
    if job is None or isinstance(state, NoMover | EarlierMover):
        return state
    return replace(state, uid=job.uid)


def _observe(
    job: JobView | None,
    pods: Sequence[PodView],
    told: Told,
    operation: Operation,
    target_uri: str,
    nodes: dict[str, Node],
) -> MoverState:
    own = [pod for pod in pods if job and pod.job_uid == job.uid]
    # Without an owner that is a Job, a pod with our labels is somebody else's, whatever it says.
    others = [pod for pod in pods if pod.job_uid and pod not in own]
    if job is None:
        return _nobody(others, nodes)
    pod = _chosen(own)
    if pod is None:
        return _without_pod(job, told)
    if pod.over:
        return _ended(job, pod, told, operation, target_uri)
    match nodes.get(pod.uid, Node.FINE):
        case Node.GONE | Node.SILENT as node:
            how = "is gone" if node is Node.GONE else "does not answer"
            return _disrupted(f"node '{pod.node}' {how} (pod {pod.name})", told)
    if told.stopping or job.deleting or job.gone or pod.deleted_at:
        return RunningMover(told.progress, told.moved_at, told.stopping or StopReason.SHUTDOWN)
    if pod.started is None:
        return _pending(job, pod)
    moved_at = max(pod.started, told.moved_at) if told.moved_at else None
    return RunningMover(told.progress, moved_at)


def _chosen(pods: Sequence[PodView]) -> PodView | None:
    """backoffLimit 0 gives one pod; should there be more, one that runs decides, then the one that was made last."""
    return max(pods, key=lambda pod: (not pod.over, pod.created, pod.uid), default=None)


def is_running(pod: PodView, nodes: dict[str, Node]) -> bool:
    """Whether something of the pod may still run."""
    return not pod.over and nodes.get(pod.uid) is not Node.GONE


def _nobody(others: Sequence[PodView], nodes: dict[str, Node]) -> MoverState:
    running = [pod for pod in others if is_running(pod, nodes)]
    if any(nodes.get(pod.uid) is not Node.SILENT for pod in running):
        return EarlierMover()
    if running:
        return NoMover(unseen=f"pod {running[0].name} on node '{running[0].node}', which does not answer")
    return NoMover()


def _without_pod(job: JobView, told: Told) -> MoverState:
    if job.gone:
        if told.stopping:
            return FinishedMover(STOPPED_EXIT, None, told.stopping, ran=False)
        return FinishedMover(KILLED_EXIT, None, failure=_lost(f"Job {job.name} was deleted before its mover had ended"))
    if job.deleting or told.stopping:
        return RunningMover(told.progress, told.moved_at, told.stopping or StopReason.SHUTDOWN)
    if job.failed is not None:
        if "DisruptionTarget" in job.failed:
            return _disrupted(job.failed, told)
        # "Container mover for pod ns/name failed with exit code 31 matching FailJob rule at index 0": it outlives the pod.
        if code := _EXIT_CODE.search(job.failed):
            return FinishedMover(int(code.group(1)), None, told.stopping)
    if job.failed is not None or job.complete:
        return FinishedMover(
            KILLED_EXIT, None, told.stopping, _lost(f"the pod of Job {job.name} is gone, and so is its result")
        )
    if job.suspended:
        message = f"Job {job.name} is suspended: Kueue, or whoever suspended it, has to let it start"
        return PendingMover(job.created, Reason.MOVER_NOT_STARTED, message, patient=True)
    if not job.taken_up:
        message = f"the Job controller has not looked at Job {job.name} yet"
        return PendingMover(job.created, None, message, job.pinned)
    return PendingMover(
        job.created,
        Reason.POD_REFUSED,
        f"no pod could be created for Job {job.name}: a ResourceQuota, a LimitRange or an admission rule refuses it; "
        f"see: kubectl -n {job.namespace} describe job {job.name}",
        job.pinned,
    )


def _ended(job: JobView, pod: PodView, told: Told, operation: Operation, target_uri: str) -> FinishedMover:
    result = read_result(pod.last_words, operation, target_uri)
    code = pod.exit_code if pod.exit_code is not None else KILLED_EXIT
    if result is not None and (result.failure is None) == (code == 0):
        return FinishedMover(code, result, told.stopping)
    if told.stopping:
        # A container that never was is reported as one that could not be found any more.
        never_was = told.was_pending and pod.started is None and pod.ended_reason in ("", "ContainerStatusUnknown")
        return FinishedMover(code, None, told.stopping, ran=not never_was)
    if pod.ended_reason == "OOMKilled":
        message = f"the mover used more memory than its limit allows (pod {pod.name}, OOMKilled)"
        return FinishedMover(code, None, None, Failure(reason=Reason.OUT_OF_MEMORY, message=message))
    if pod.disrupted:
        return _disrupted(f"pod {pod.name}: {pod.disrupted}", told)
    interrupted = code in (STOPPED_EXIT, KILLED_EXIT) or pod.exit_code is None
    if interrupted and (job.deleting or job.gone or pod.deleted_at or pod.gone):
        return FinishedMover(code, None, None, _lost(f"Job {job.name} or its pod was deleted while the mover ran"))
    if code == 0:
        return FinishedMover(
            code, None, None, _lost(f"pod {pod.name} ended well, and left no result that can be understood")
        )
    return FinishedMover(code, None)


def _lost(message: str) -> Failure:
    return Failure(reason=Reason.POD_LOST, message=message)


def _disrupted(message: str, told: Told) -> FinishedMover:
    failure = Failure(reason=Reason.MOVER_DISRUPTED, message=plain(f"the mover was interrupted: {message}"))
    return FinishedMover(KILLED_EXIT, None, told.stopping, failure)


def _pending(job: JobView, pod: PodView) -> PendingMover:
    if pod.unschedulable is not None:
        message = f"no node takes pod {pod.name}: {plain(pod.unschedulable)}"
        return PendingMover(pod.created, Reason.UNSCHEDULABLE, message, job.pinned)
    if pod.waiting and pod.waiting[0] in _IMAGE_REASONS:
        message = f"the image of pod {pod.name} cannot be pulled: {plain(pod.waiting[1] or pod.waiting[0])}"
        return PendingMover(pod.created, Reason.IMAGE_PULL_FAILED, message, job.pinned)
    if pod.waiting and pod.waiting[0] not in ("", "ContainerCreating", "PodInitializing"):
        message = f"pod {pod.name} does not start: {pod.waiting[0]}: {plain(pod.waiting[1])}"
        return PendingMover(pod.created, Reason.MOVER_NOT_STARTED, message, job.pinned)
    if pod.node is None:
        return PendingMover(pod.created, None, f"no scheduler has looked at pod {pod.name} yet", job.pinned)
    # What a kubelet waits for with a volume it says in events alone, which the operator has no right to read.
    message = (
        f"pod {pod.name} does not start on node '{pod.node}': is there the Secret that credentialsSecretRef names, can the "
        f"volumes be mounted? See: kubectl -n {pod.namespace} describe pod {pod.name}"
    )
    return PendingMover(pod.created, None, message, job.pinned)
