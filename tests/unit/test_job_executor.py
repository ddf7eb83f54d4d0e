"""What the Job executor asks the API server for, and when: logs, live Jobs, nodes, namespaces; answers are canned."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from job_world import NAME, UID, artifact, claim, rules
from job_world import pod as holder

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.protocol import Failure, Operation, Progress, encode_line
from checkpoint_operator.controller.executor import FinishedMover, Held, NoMover, Prepared, RunningMover
from checkpoint_operator.controller.jobs.executor import JobExecutor
from checkpoint_operator.controller.kube import Forbidden, KubeError, NotFound

START = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)


class Canned:
    """An API server that has what it was given, and keeps what it was asked."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.log: bytes | Exception = b""
        self.asked: list[str] = []

    async def _get(self, kind: str, name: str) -> dict[str, Any]:
        self.asked.append(f"{kind} {name}")
        if (kind, name) not in self.objects:
            raise NotFound(name)
        return self.objects[kind, name]

    async def get_job(self, namespace: str, name: str) -> dict[str, Any]:
        return await self._get("job", name)

    async def get_claim(self, namespace: str, name: str) -> dict[str, Any]:
        return await self._get("claim", name)

    async def get_service_account(self, namespace: str, name: str) -> dict[str, Any]:
        return await self._get("account", name)

    async def get_namespace(self, name: str) -> dict[str, Any]:
        return await self._get("namespace", name)

    async def get_node(self, name: str) -> dict[str, Any]:
        return await self._get("node", name)

    async def list_pods(self, namespace: str) -> AsyncIterator[dict[str, Any]]:
        self.asked.append("pods")
        for kind, _ in self.objects:
            if kind == "pod":
                yield self.objects[kind, _]

    async def read_log(self, namespace: str, pod: str, container: str, *, lines: int, limit: int) -> bytes:
        self.asked.append(f"log {pod}")
        if isinstance(self.log, Exception):
            raise self.log
        return self.log


class World:
    """An executor, its clock, and whom it called for."""

    def __init__(self, **changes: Any) -> None:
        self.kube, self.now = Canned(), START
        self.notified: list[tuple[str, str]] = []
        self.called = asyncio.Event()
        self.executor = JobExecutor(
            self.kube,  # type: ignore[arg-type]
            rules(**changes),
            (),
            self._notify,
            lambda: self.now,
        )

    def _notify(self, key: tuple[str, str]) -> None:
        self.notified.append(key)
        self.called.set()

    def sees_job(self) -> None:
        self.executor.saw_job("ADDED", job())

    def sees_pod(self, **changes: Any) -> None:
        self.executor.saw_pod("MODIFIED", pod(**changes))

    async def turn(self, looks: int = 1) -> None:
        """Let the follower look so often, five seconds apart."""
        for _ in range(looks):
            self.now += timedelta(seconds=5)
            turn = asyncio.Semaphore(1)
            await self.executor._read_logs(turn)


def wire(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def owned(version: str, kind: str, uid: str) -> list[dict[str, Any]]:
    return [{"apiVersion": version, "kind": kind, "name": "n", "uid": uid, "controller": True}]


def job() -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "team-a",
            "name": NAME,
            "uid": "job",
            "resourceVersion": "1",
            "creationTimestamp": wire(START),
            "labels": {names.LABEL_ARTIFACT_UID: UID, names.LABEL_ARTIFACT_NAME: "step-1000"},
            "ownerReferences": owned(names.API_VERSION, names.KIND, UID),
        }
    }


def pod(*, version: int = 2, **metadata: Any) -> dict[str, Any]:
    state = {"running": {"startedAt": wire(START)}}
    return {
        "metadata": {
            "namespace": "team-a",
            "name": "pod",
            "uid": "pod",
            "resourceVersion": str(version),
            "creationTimestamp": wire(START),
            "labels": {names.LABEL_ARTIFACT_UID: UID, names.LABEL_ARTIFACT_NAME: "step-1000"},
            "ownerReferences": owned("batch/v1", "Job", "job"),
            **metadata,
        },
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Running", "containerStatuses": [{"name": "mover", "state": state}]},
    }


def started(**status: Any) -> CheckpointArtifact:
    mover = {"kind": "Job", "name": NAME}
    return artifact(status={"phase": "Uploading", "launches": 1, "mover": mover, **status})


HALF = encode_line(Progress(bytes_done=1, bytes_total=2)).encode()


async def test_progress_is_read_from_the_log_and_told() -> None:
    world = World()
    world.sees_job()
    world.sees_pod()
    world.kube.log = b"noise\n" + HALF + b"\n"
    world.notified.clear()
    await world.turn()
    state = world.executor.state(started())
    assert isinstance(state, RunningMover)
    assert state.progress == Progress(bytes_done=1, bytes_total=2)
    assert state.moved_at == world.now
    assert world.notified == [("team-a", "step-1000")]


async def test_a_log_that_says_the_same_again_is_no_movement() -> None:
    world = World()
    world.sees_job()
    world.sees_pod()
    world.kube.log = HALF
    await world.turn()
    moved = world.now
    world.notified.clear()
    await world.turn(3)
    state = world.executor.state(started())
    assert isinstance(state, RunningMover)
    assert state.moved_at == moved
    assert world.notified == []


async def test_a_mover_whose_log_cannot_be_read_is_not_taken_for_one_that_stands_still() -> None:
    world = World()
    world.sees_job()
    world.sees_pod()
    world.kube.log = HALF
    await world.turn()
    world.kube.log = KubeError("the kubelet does not answer")
    await world.turn(100)
    state = world.executor.state(started())
    assert isinstance(state, RunningMover)
    assert state.moved_at == world.now


async def test_no_log_is_read_more_often_than_every_five_seconds() -> None:
    world = World()
    world.sees_job()
    world.sees_pod()
    world.now += timedelta(seconds=5)
    for _ in range(5):
        await world.executor._read_logs(asyncio.Semaphore(1))
    assert world.kube.asked == ["log pod"]


async def test_without_the_right_to_logs_nobody_knows_whether_it_moves() -> None:
    world = World()
    world.sees_job()
    world.sees_pod()
    world.kube.log = Forbidden("no")
    with pytest.raises(Forbidden):
        await world.turn()
    state = world.executor.state(started())
    assert isinstance(state, RunningMover)
    assert state.moved_at is None


async def test_a_mover_that_ends_or_was_deleted_is_asked_no_more() -> None:
    world = World()
    world.sees_job()
    world.sees_pod(version=3, deletionTimestamp=wire(START))
    await world.turn()
    assert world.kube.asked == []


async def test_a_job_that_was_seen_since_its_watch_began_is_not_read_again() -> None:
    world = World()
    world.sees_job()
    await world.executor.look(started())
    assert world.kube.asked == []


async def test_a_job_that_a_new_watch_has_not_listed_is_read_live() -> None:
    world = World()
    world.sees_job()
    other = job()
    other["metadata"] |= {"name": "ckpt-other-1", "uid": "other"}
    world.executor.saw_job(None, other)
    await world.executor.look(started())
    assert world.kube.asked == [f"job {NAME}"]
    assert isinstance(world.executor.state(started()), FinishedMover)  # it was deleted while nobody watched
    await world.executor.look(started())
    assert world.kube.asked == [f"job {NAME}"]


async def test_a_job_that_nobody_saw_is_read_live_once_before_another_is_made() -> None:
    world = World()
    for _ in range(2):
        await world.executor.look(started())
    assert world.kube.asked == [f"job {NAME}"]
    assert isinstance(world.executor.state(started()), NoMover)


async def test_a_job_of_an_inline_mover_is_not_looked_for() -> None:
    world = World()
    await world.executor.look(started(mover={"kind": "Inline", "name": NAME}))
    assert world.kube.asked == []


@pytest.mark.parametrize(
    ("node", "unseen"),
    [
        ({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}, True),
        ({"spec": {"taints": [{"key": "node.kubernetes.io/out-of-service"}]}}, False),
        (None, False),
    ],
    ids=["silent", "out of service", "deleted"],
)
async def test_a_pod_that_should_have_ended_makes_us_look_at_its_node(node: dict[str, Any] | None, unseen: bool) -> None:
    world = World()
    world.sees_pod(deletionTimestamp=wire(START))
    if node is not None:
        world.kube.objects["node", "node-1"] = node
    ended = artifact(status={"phase": "Waiting", "launches": 1, "mover": {"kind": "Job", "name": NAME, "done": True}})
    await world.executor.look(ended)
    assert world.kube.asked == []
    world.now += timedelta(seconds=6)
    await world.executor.look(ended)
    assert world.kube.asked == ["node node-1"]
    state = world.executor.state(ended)
    assert isinstance(state, NoMover)
    assert (state.unseen is not None) == unseen


async def test_without_its_claim_nothing_else_is_asked_for() -> None:
    world = World()
    answer = await world.executor.prepare(NAME, artifact(), Operation.UPLOAD)
    assert isinstance(answer, Held)
    assert answer.reason == "ClaimNotFound"
    assert world.kube.asked == ["claim dpo-output"]


async def test_the_namespace_is_asked_only_where_something_is_refused_without_it() -> None:
    world = World()
    world.kube.objects["claim", "dpo-output"] = claim()
    world.kube.objects["namespace", "team-a"] = {"metadata": {"name": "team-a"}}
    assert isinstance(await world.executor.prepare(NAME, artifact(), Operation.UPLOAD), Prepared)
    assert "namespace team-a" not in world.kube.asked
    world = World()
    world.kube.objects["claim", "dpo-output"] = claim()
    world.kube.objects["namespace", "team-a"] = {"metadata": {"name": "team-a"}}
    world.kube.objects["pod", "trainer"] = holder(pod_security={"runAsUser": 0})
    assert isinstance(await world.executor.prepare(NAME, artifact(), Operation.UPLOAD), Failure)
    assert "namespace team-a" in world.kube.asked


async def test_what_many_want_to_know_at_once_is_asked_once() -> None:
    world = World()
    world.kube.objects["claim", "dpo-output"] = claim()
    await asyncio.gather(*(world.executor.prepare(NAME, artifact(), Operation.UPLOAD) for _ in range(50)))
    assert sorted(world.kube.asked) == ["claim dpo-output", "pods"]


async def test_a_pod_that_is_overdue_has_its_artifact_looked_at_without_an_event() -> None:
    world = World()
    world.sees_pod(deletionTimestamp=wire(START))
    world.notified.clear()
    world.called.clear()
    world.now += timedelta(seconds=6)
    following = asyncio.create_task(world.executor.follow())
    try:
        await asyncio.wait_for(world.called.wait(), 60)
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
    assert set(world.notified) == {("team-a", "step-1000")}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://minio.example", "https://MINIO.example:443/", True),
        ("http://minio.example:80", "http://minio.example.", True),
        ("https://[::1]:9000", "https://[::1]:9000/", True),
        ("https://minio.example", "https://minio.example:9000", False),
        ("https://minio.example", "http://minio.example:443", False),
        ("https://minio.example/a", "https://minio.example/b", False),
        ("https://minio.example", None, False),
        ("https://s3.eu-central-1.amazonaws.com", None, True),
        ("https://s3.amazonaws.com", "https://s3.dualstack.eu-central-1.amazonaws.com/", True),
        ("https://storage.googleapis.com", None, True),
        ("https://team.blob.core.windows.net", None, True),
        ("https://amazonaws.com.example", None, False),
        ("https://s3.cn-north-1.amazonaws.com.cn", None, True),
    ],
)
def test_a_place_is_the_same_however_its_endpoint_is_spelled(one: str, other: str | None, same: bool) -> None:
    """Else the deletion of one artifact removed what another one, of the other spelling, has as its own."""

    def place(endpoint: str | None) -> str:
        target = {"uri": "s3://bucket/dpo/checkpoint-1000", **({"endpoint": endpoint} if endpoint else {})}
        return World().executor.place(artifact(target=target))

    assert (place(one) == place(other)) is same
