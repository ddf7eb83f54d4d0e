"""A thousand artifacts and four places, through the real reconciler: in order, without a herd, few writes for each."""

import asyncio
import copy
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

import pytest
from prometheus_client import CollectorRegistry

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.protocol import Failure, Operation, Result, Stored
from checkpoint_operator.controller.decisions import Policy
from checkpoint_operator.controller.executor import (
    FinishedMover,
    MoverState,
    NoMover,
    Preparation,
    Prepared,
    RunningMover,
    StopReason,
)
from checkpoint_operator.controller.health import Health
from checkpoint_operator.controller.kube import Conflict, Kube, KubeError
from checkpoint_operator.controller.metrics import Metrics
from checkpoint_operator.controller.queue import WorkQueue
from checkpoint_operator.controller.reconciler import Reconciler
from checkpoint_operator.controller.scheduling import Key, Limits

START = datetime(2026, 11, 24, tzinfo=UTC)
Object = dict[str, Any]


class Server:
    """As much of an API server as the reconciler asks: versions, guarded merge patches, and an event for each write."""

    def __init__(self) -> None:
        self.objects: dict[Key, Object] = {}
        self.patches: Counter[Key] = Counter()
        self.queued: Counter[Key] = Counter()
        self.tell: Callable[[str, Object], None] = lambda kind, body: None
        self.news = asyncio.Event()
        self.refuses: set[Key] = set()
        self._version = 0

    def create(self, number: int, namespace: str) -> Key:
        name = f"c-{number:04}"
        self._version += 1
        self.objects[namespace, name] = {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": f"{namespace}-{name}",
                "generation": 1,
                "resourceVersion": str(self._version),
                "creationTimestamp": (START + timedelta(seconds=number // 30)).isoformat().replace("+00:00", "Z"),
            },
            "spec": {
                "source": {"persistentVolumeClaim": {"claimName": "v"}, "path": name},
                "target": {"uri": f"s3://bucket/{namespace}/{name}"},
            },
        }
        self.tell("ADDED", copy.deepcopy(self.objects[namespace, name]))
        return namespace, name

    async def patch(self, artifact: CheckpointArtifact, patch: Object, *, status: bool = False) -> Object:
        await asyncio.sleep(0)
        if artifact.key in self.refuses:
            raise KubeError("a webhook refuses it")
        body = self.objects[artifact.key]
        if artifact.metadata.resource_version != body["metadata"]["resourceVersion"]:
            raise Conflict("changed meanwhile")
        merge(body, patch)
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self.patches[artifact.key] += 1
        conditions = patch.get("status", {}).get("conditions", [])
        self.queued[artifact.key] += any(condition["reason"] == "Queued" for condition in conditions)
        self.tell("MODIFIED", copy.deepcopy(body))
        self.news.set()
        return copy.deepcopy(body)

    async def get(self, namespace: str, name: str) -> Object:
        return copy.deepcopy(self.objects[namespace, name])

    async def post_event(self, *_: object, **__: object) -> None:
        await asyncio.sleep(0)

    async def list_artifacts(self, _: tuple[str, ...]) -> AsyncIterator[Object]:
        for body in self.objects.values():
            yield copy.deepcopy(body)


def merge(into: Object, patch: Object) -> None:
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


class Movers:
    """Movers that run until the test ends them."""

    kind: Literal["Inline"] = "Inline"

    def __init__(self, notify: Callable[[Key], None], now: Callable[[], datetime]) -> None:
        self._notify = notify
        self._now = now
        self._states: dict[str, MoverState] = {}
        self.started: list[Key] = []
        self.running: list[CheckpointArtifact] = []
        self.looks: Counter[Key] = Counter()
        self.news = asyncio.Event()

    def end_the_oldest(self) -> None:
        artifact = self.running.pop(0)
        stored = Stored(
            storage_uri=artifact.spec.target.uri,
            size_bytes=1,
            file_count=1,
            manifest_digest="m",
            content_digest="c",
            data_owner=True,
        )
        self._states[artifact.metadata.uid] = FinishedMover(0, Result(stored=stored))
        self._notify(artifact.key)

    async def resync(self) -> None: ...

    def artifacts(self) -> Collection[Key]:
        return []

    def refuse(self, artifact: CheckpointArtifact) -> Failure | None:
        return None

    def place(self, artifact: CheckpointArtifact) -> str:
        return artifact.spec.target.uri

    async def look(self, artifact: CheckpointArtifact) -> None:
        self.looks[artifact.key] += 1

    def state(self, artifact: CheckpointArtifact) -> MoverState:
        return self._states.get(artifact.metadata.uid, NoMover())

    async def prepare(self, name: str, artifact: CheckpointArtifact, operation: Operation) -> Preparation:
        await asyncio.sleep(0)
        return Prepared()

    async def start(self, name: str, artifact: CheckpointArtifact, operation: Operation, now: datetime) -> None:
        self._states[artifact.metadata.uid] = RunningMover(None, self._now())
        self.started.append(artifact.key)
        self.running.append(artifact)
        self.news.set()

    async def stop(self, name: str, artifact: CheckpointArtifact, reason: StopReason) -> None: ...

    async def stop_others(self, key: Key, uid: str | None) -> bool:
        return False

    async def forget(self, key: Key, uid: str, name: str | None = None) -> None:
        if isinstance(self._states.get(uid), FinishedMover):
            del self._states[uid]


class World:
    """The reconciler with its workers, and a clock that stands still until a mover ends."""

    def __init__(self, limits: Limits) -> None:
        self.seconds = 0
        self.server = Server()
        queue: WorkQueue[Key] = WorkQueue()
        self.movers = Movers(queue.add, self.now)
        self.reconciler = Reconciler(
            cast("Kube", self.server),
            queue,
            self.movers,
            Policy(),
            limits,
            self.now,
            Metrics(CollectorRegistry()),
            Health(300),
        )
        self.server.tell = self.reconciler.saw
        self.workers: list[asyncio.Task[None]] = []

    def work(self) -> None:
        self.workers = [asyncio.create_task(self.reconciler.work()) for _ in range(8)]

    def now(self) -> datetime:
        return START + timedelta(seconds=60 + self.seconds)

    async def until_started(self, count: int) -> None:
        while len(self.movers.started) < count:
            self.movers.news.clear()
            await self.movers.news.wait()

    async def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self.server.news.clear()
            await self.server.news.wait()

    def phases(self) -> Counter[str]:
        return Counter(body.get("status", {}).get("phase", "Pending") for body in self.server.objects.values())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World(Limits(4, 4, 1000))
    yield made
    for task in made.workers:
        task.cancel()
    await asyncio.gather(*made.workers, return_exceptions=True)


async def test_a_thousand_artifacts_drain_in_order_without_a_herd(world: World) -> None:
    world.work()
    keys = [world.server.create(number, "team") for number in range(1000)]
    await world.until(lambda: world.phases() == {"Uploading": 4, "Queued": 996})
    looks_while_queued = sum(world.movers.looks.values())
    for ended in range(1, 1001):
        world.seconds += 1
        assert len(world.movers.running) <= 4
        world.movers.end_the_oldest()
        await world.until_started(min(1000, ended + 4))
    await world.until(lambda: world.phases() == {"Ready": 1000})
    assert world.movers.started == keys
    # Finalizer, Queued, started, Ready: an artifact that waits is told so once.
    assert max(world.server.patches.values()) == 4
    assert max(world.server.queued.values()) == 1
    # Whoever waits is not looked at when others get their turn: a start and an end are some looks each, of that one alone.
    looks = sum(world.movers.looks.values()) - looks_while_queued
    assert looks <= 8 * 1000


async def test_artifacts_that_are_there_when_the_operator_starts_begin_in_their_order(world: World) -> None:
    keys = [world.server.create(number * 30, "team") for number in reversed(range(50))]  # listed by name, as it were
    await world.reconciler.fill(())
    world.work()
    await world.until_started(4)
    assert sorted(world.movers.started) == sorted(keys[-4:])
    await world.until(lambda: world.phases() == {"Uploading": 4, "Queued": 46})


async def test_nobody_waits_for_one_whose_turn_it_is_but_whom_the_api_server_refuses(world: World) -> None:
    keys = [world.server.create(number, "team") for number in range(10)]
    world.server.refuses.add(keys[1])
    await world.reconciler.fill(())
    world.work()
    await world.until_started(4)
    assert sorted(world.movers.started) == [keys[0], *keys[2:5]]


async def test_of_many_namespaces_each_gets_its_turn(world: World) -> None:
    world.work()
    for number in range(100):
        world.server.create(number, "crowd")
    await world.until(lambda: world.phases() == {"Uploading": 4, "Queued": 96})
    late = world.server.create(200, "single")
    await world.until(lambda: world.phases() == {"Uploading": 4, "Queued": 97})
    world.movers.end_the_oldest()
    await world.until_started(5)
    assert world.movers.started[4] == late


async def test_a_raised_cap_starts_as_many_more_at_once_and_a_lowered_one_stops_nobody(world: World) -> None:
    world.work()
    for number in range(50):
        world.server.create(number, "team")
    await world.until(lambda: world.phases() == {"Uploading": 4, "Queued": 46})
    world.reconciler.set_limits(Limits(10, 10, 1000))
    await world.until(lambda: world.phases() == {"Uploading": 10, "Queued": 40})
    world.reconciler.set_limits(Limits(2, 2, 1000))
    for _ in range(8):
        world.movers.end_the_oldest()
    await world.until(lambda: world.phases() == {"Ready": 8, "Uploading": 2, "Queued": 40})
    world.movers.end_the_oldest()
    await world.until_started(11)
    assert len(world.movers.running) == 2


async def test_whoever_is_suspended_while_it_waits_leaves_the_line_to_the_next(world: World) -> None:
    world.work()
    keys = [world.server.create(number, "team") for number in range(7)]
    await world.until(lambda: world.phases() == {"Uploading": 4, "Queued": 3})
    body = world.server.objects[keys[4]]
    body["spec"]["suspend"] = True
    body["metadata"]["resourceVersion"] = "100000"
    world.reconciler.saw("MODIFIED", copy.deepcopy(body))
    await world.until(lambda: world.phases() == {"Uploading": 4, "Queued": 2, "Suspended": 1})
    world.movers.end_the_oldest()
    await world.until_started(5)
    assert world.movers.started[4] == keys[5]


async def test_whoever_is_deleted_while_it_waits_leaves_the_line_to_the_next(world: World) -> None:
    world.work()
    keys = [world.server.create(number, "team") for number in range(6)]
    await world.until(lambda: world.phases() == {"Uploading": 4, "Queued": 2})
    world.reconciler.saw("DELETED", world.server.objects.pop(keys[4]))
    world.movers.end_the_oldest()
    await world.until_started(5)
    assert world.movers.started[4] == keys[5]
