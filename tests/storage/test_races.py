"""Sixteen writers, four deleters and a watcher at one place: one wins, all learn the truth, and the manifest never lies.

Against a bucket the requests of all actors go through a turnstile that lets them by one at a time, in an order that the seed
decides: the interleaving is as fine as the store can see. On a volume, where the kernel decides, the threads just run.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from storage_world import ObjectWorld, World, fetched, make, put_object, refused, tree

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Stored
from checkpoint_operator.storage import DeleteRequest, StorageBackend, StorageError, UploadRequest
from checkpoint_operator.storage.objects import ObjectStoreBackend

SEEDS = [int(seed) for seed in os.environ.get("RACE_SEEDS", "1 2 3").split()]
"""More of them when somebody hunts: ``RACE_SEEDS="$(seq -s ' ' 100)"``."""

CONTENTS = [{"a": b"0", "b": b"zero"}, {"a": b"1", "c": b"one"}, {"a": b"0", "b": b"ZERO"}]
LOST = {Reason.TARGET_BUSY, Reason.TARGET_EXISTS}
"""What a writer who came too late may be told. Both are true, and neither says that strangers' objects lie there."""


class Killed(BaseException):
    """The process is gone between two requests."""


class Turnstile:
    """Lets one request by at a time: whose, the seed says, once every actor that is still going has one."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - an order, no secret
        self._changed = threading.Condition()
        self._actors: set[int] = set()
        self._waiting: dict[object, int] = {}
        self._turn: object = None

    def enter(self, actor: int) -> None:
        self._actors.add(actor)

    def leave(self, actor: int) -> None:
        with self._changed:
            self._actors.discard(actor)
            self._choose()

    @contextmanager
    def turn(self, actor: int) -> Iterator[None]:
        ticket = object()
        with self._changed:
            self._waiting[ticket] = actor
            self._choose()
            assert self._changed.wait_for(lambda: self._turn is ticket, timeout=60), "the turnstile stands still"
        try:
            yield
        finally:
            with self._changed:
                self._turn = None
                self._choose()

    def _choose(self) -> None:
        if self._turn is None and self._waiting and self._actors <= set(self._waiting.values()):
            actor = self._random.choice(sorted(set(self._waiting.values())))
            self._turn = next(ticket for ticket, whose in self._waiting.items() if whose == actor)
            del self._waiting[self._turn]
            self._changed.notify_all()


class _Turned:
    """A store as one actor sees it. ``dies_at``: the request at which it is killed, and whether that one is still done."""

    def __init__(self, store: Any, gate: Turnstile, actor: int, dies_at: tuple[int, bool] | None = None) -> None:
        self._store, self._gate, self._actor, self._dies_at = store, gate, actor, dies_at
        self._requests = 0

    def without_conditions(self) -> _Turned:
        return self

    def __getattr__(self, verb: str) -> Any:
        found = getattr(self._store, verb)
        if verb in ("refusal", "part_size", "digest", "checksum", "is_part"):
            return found

        def turned(*arguments: Any, **named: Any) -> Any:
            with self._gate.turn(self._actor):
                self._requests += 1
                number, done = self._dies_at or (0, False)
                dies = self._requests == number
                if dies and not done:
                    raise Killed
                answer = list(found(*arguments, **named)) if verb.startswith("list") else found(*arguments, **named)
                if dies:
                    raise Killed
                return iter(answer) if verb.startswith("list") else answer

        return turned


@dataclass
class Race:
    """Actors at one place of a world, each a thread with a backend of its own."""

    world: World
    seed: int
    gate: Turnstile = field(init=False)
    acts: list[Callable[[], None]] = field(default_factory=list)
    problems: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = Turnstile(self.seed)

    def backend(self, actor: int, dies_at: tuple[int, bool] | None = None) -> StorageBackend:
        if not isinstance(self.world, ObjectWorld):
            return self.world.backend
        world = self.world
        return ObjectStoreBackend(lambda uri: _Turned(world.open(uri), self.gate, actor, dies_at))  # type: ignore[arg-type, return-value]

    def add(self, act: Callable[[int], None]) -> None:
        actor = len(self.acts)
        self.gate.enter(actor)
        self.acts.append(lambda: act(actor))

    def run(self) -> None:
        start = threading.Barrier(len(self.acts))

        def run(actor: int) -> None:
            try:
                start.wait()
                self.acts[actor]()
            except BaseException as error:
                self.problems.append(error)
            finally:
                self.gate.leave(actor)

        threads = [threading.Thread(target=run, args=(actor,)) for actor in range(len(self.acts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.problems:
            raise self.problems[0]


@pytest.fixture
def contents(tmp_path: Path) -> list[Path]:
    return [make(tmp_path / f"content-{number}", files) for number, files in enumerate(CONTENTS)]


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def upload(backend: StorageBackend, world: World, source: Path, uid: str, *, force: bool = False) -> Stored | Reason:
    try:
        return backend.upload_artifact(
            UploadRequest(str(source.parent), source.name, world.uri(), ArtifactMetadata(job_name=uid), uid=uid, force=force)
        )
    except StorageError as error:
        return error.reason


def assert_the_manifest_tells_the_truth(world: World) -> None:
    """Invariant I, past the backend: every byte that a Committed manifest lists is there and right."""
    for file in world.backend.get_manifest(world.uri()).table.files:
        assert hashlib.sha256(world.get(f"run/{file.path}")).hexdigest() == file.sha256


def is_committed(world: World) -> bool:
    try:
        world.backend.get_manifest(world.uri())
    except StorageError as error:
        if error.reason is not Reason.NOT_FOUND:
            raise
        return False
    return True


def watch(world: World, stop: threading.Event, seen: list[str]) -> None:
    """Look past the turnstile, all the time. Where the same manifest stands before and after, its bytes were right."""
    while not stop.is_set():
        try:
            before = world.backend.get_manifest(world.uri())
            found = [hashlib.sha256(world.get(f"run/{file.path}")).hexdigest() for file in before.table.files]
        except Exception:
            found = None  # being removed, or not there: then there is no manifest afterwards
        try:
            after = world.backend.get_manifest(world.uri())
        except StorageError:
            continue
        if found is not None and before.claim_id == after.claim_id:
            seen.append(before.artifact_uid)
            assert found == [file.sha256 for file in before.table.files]


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("seed", SEEDS)
def test_of_sixteen_writers_one_wins_and_all_learn_the_truth(world: World, contents: list[Path], seed: int) -> None:
    race, outcomes = Race(world, seed), dict[int, Stored | Reason]()
    chosen = random.Random(seed).choices(range(3), k=16)  # noqa: S311

    def write(actor: int) -> None:
        outcomes[actor] = upload(race.backend(actor), world, contents[chosen[actor]], f"uid-{actor}")

    for _ in range(16):
        race.add(write)
    race.run()
    manifest = world.backend.get_manifest(world.uri())
    winner = int(manifest.artifact_uid.removeprefix("uid-"))
    for actor, outcome in outcomes.items():
        if isinstance(outcome, Reason):
            assert outcome in LOST, f"uid-{actor} was told {outcome}"
        else:
            assert (outcome.content_digest, outcome.data_owner) == (manifest.content_digest, actor == winner)
    assert not isinstance(outcomes[winner], Reason)
    assert_the_manifest_tells_the_truth(world)
    assert tree(world.download()) == tree(contents[chosen[winner]])
    assert {path.partition("/")[0] for path in world.paths()} == {"run"}, "whoever lost left a copy behind"
    world.delete(uid=manifest.artifact_uid)
    assert world.paths() == []


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("seed", SEEDS)
def test_writers_and_deleters_never_make_a_manifest_lie(world: World, contents: list[Path], seed: int) -> None:
    race, chance = Race(world, seed), random.Random(seed)  # noqa: S311
    chosen = [chance.randrange(3) for _ in range(16)]
    told: list[Reason] = []

    def write(actor: int) -> None:
        backend = race.backend(actor)
        for _ in range(3):
            outcome = upload(backend, world, contents[chosen[actor]], f"uid-{actor}")
            if isinstance(outcome, Stored):
                return
            told.append(outcome)

    def delete(actor: int) -> None:
        backend = race.backend(actor)
        for _ in range(4):
            try:
                backend.delete_artifact(DeleteRequest(world.uri()))
            except StorageError as error:
                told.append(error.reason)

    for number in range(20):
        race.add(delete if number >= 16 else write)
    stop, seen = threading.Event(), list[str]()
    watcher = threading.Thread(target=watch, args=(world, stop, seen))
    failed: list[Any] = []
    before, threading.excepthook = threading.excepthook, failed.append
    watcher.start()
    try:
        race.run()
    finally:
        stop.set()
        watcher.join()
        threading.excepthook = before
    assert not failed, failed[0].exc_value
    assert set(told) <= {*LOST, Reason.EARLIER_MOVER_NOT_GONE}
    if is_committed(world):
        assert_the_manifest_tells_the_truth(world)
    for number in range(16):
        world.delete(uid=f"uid-{number}")
    assert world.paths() == []


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("seed", SEEDS)
def test_writers_that_are_killed_and_come_back_leave_the_truth(world: World, contents: list[Path], seed: int) -> None:
    if not isinstance(world, ObjectWorld):
        pytest.skip("a process that dies on a volume is in test_file_store.py: there the kernel frees its lock")
    race, chance = Race(world, seed), random.Random(seed)  # noqa: S311
    plans = [[(chance.randrange(3), (chance.randrange(1, 12), chance.random() < 0.5)) for _ in range(3)] for _ in range(6)]
    told: list[Reason] = []

    def live(actor: int) -> None:
        """Killed up to three times, each time perhaps with another state of the source, then whole, then removed."""
        uid = f"uid-{actor}"
        for content, dies_at in plans[actor]:
            try:
                outcome = upload(race.backend(actor, dies_at), world, contents[content], uid, force=True)
            except Killed:
                continue
            if isinstance(outcome, Reason):
                told.append(outcome)
        upload(race.backend(actor), world, contents[plans[actor][0][0]], uid, force=True)
        if actor % 2:
            race.backend(actor).delete_artifact(DeleteRequest(world.uri(), uid, force=True))

    for _ in range(6):
        race.add(live)
    race.run()
    assert set(told) <= LOST
    if is_committed(world):
        assert_the_manifest_tells_the_truth(world)
    for number in range(6):
        world.delete(uid=f"uid-{number}")
    assert world.paths() == []
    assert world.uploads() == []


# ---- The store alone: what the protocol stands on


def at_once(number: int, act: Callable[[int], Any]) -> list[Any]:
    """What that many threads were answered, all let go at one moment."""
    start, answers = threading.Barrier(number), [None] * number

    def run(index: int) -> None:
        start.wait()
        answers[index] = act(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def store_of(world: World) -> tuple[Any, str]:
    if not isinstance(world, ObjectWorld):
        pytest.skip("a volume has rename(2) and locks instead of conditions")
    return world.open(world.uri()), f"{world.prefix}small"


@pytest.mark.parametrize("verb", ["create", "put"])
def test_of_sixteen_creations_one_is_done_and_its_bytes_stay(world: World, verb: str) -> None:
    store, key = store_of(world)

    def create(index: int) -> Any:
        data = f"writer {index}".encode()
        return (
            store.create(key, data) if verb == "create" else put_object(store, key, data, store.digest(data), f"uid-{index}")
        )

    answers = at_once(16, create)
    [winner] = [index for index, answer in enumerate(answers) if answer is not None]
    data, token = store.read(key)
    assert data == f"writer {winner}".encode()
    assert token == (answers[winner] if verb == "create" else answers[winner].token)


def test_of_sixteen_swaps_of_one_version_one_is_done(world: World) -> None:
    store, key = store_of(world)
    token = store.create(key, b"before")
    answers = at_once(16, lambda index: store.swap(key, token, f"writer {index}".encode()))
    [winner] = [index for index, answer in enumerate(answers) if answer is not None]
    assert store.read(key) == (f"writer {winner}".encode(), answers[winner])


def test_a_removal_of_a_version_that_is_gone_removes_nothing(world: World) -> None:
    store, key = store_of(world)
    old = store.create(key, b"before")
    new = store.swap(key, old, b"after")
    store.remove(key, old)
    assert store.read(key) == (b"after", new)
    assert store.swap(key, old, b"zombie") is None
    store.remove(key, new)
    store.remove(key, new)
    assert store.read(key) is None
    assert store.swap(key, new, b"zombie") is None


def test_a_reader_of_a_version_that_was_replaced_is_told(world: World) -> None:
    store, key = store_of(world)
    old = store.create(key, b"before")
    store.swap(key, old, b"afterw")
    with refused(Reason.INTEGRITY_MISMATCH):
        fetched(store, key, old, 0, 6)
