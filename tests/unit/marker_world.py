"""Walks all interleavings of the real commit protocol against a store in memory, one atomic request at a time.

The protocol's generators yield requests, so a schedule is just the order in which pending requests are answered. The
explorer is breadth first and exhaustive: after every request each running actor may go on, be killed, or be killed with
its last request still on the wire (it arrives at any later time, or never). Two states are the same when marker and
objects are, and every actor stands at the same instruction with the same local variables.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.storage import commit
from checkpoint_operator.storage.commit import Claimant, Found, Request
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.manifest import FileTable, StoredFile, content_digest
from checkpoint_operator.storage.marker import Manifest, Marker, Seen

URI = "s3://bucket/place"


@dataclass(frozen=True)
class Actor:
    """One mover: what it was started for, the state of the source that it sees, and what its operator told it."""

    kind: Literal["upload", "delete", "clean"]  # clean: a deletion that keeps what is committed
    uid: str
    source: tuple[tuple[str, str], ...] = ()  # (path, content), in the order of the upload
    fenced: bool = True  # started only once no earlier mover of the artifact was running

    def generator(self, claims: Iterator[str]) -> Generator[Request, object, object]:
        who = Claimant(self.uid, ArtifactMetadata(), lambda: next(claims), earlier_mover_gone=self.fenced)
        if self.kind == "upload":
            return commit.upload(who, URI)
        return commit.delete(who, URI, keep_committed=self.kind == "clean")

    def table(self) -> FileTable:
        return FileTable(
            files=[StoredFile(path=path, size=1, sha256=content, etag=content) for path, content in self.source]
        )


Place = tuple[str, str, str]  # path, content, owner


@dataclass(frozen=True)
class World:
    """The store. ``version`` makes every marker's token unique, as an ETag over a random claim is."""

    marker: Seen | None = None
    objects: tuple[Place, ...] = ()
    version: int = 0

    def get(self, path: str) -> Place | None:
        return next((place for place in self.objects if place[0] == path), None)

    def without(self, path: str) -> World:
        return replace(self, objects=tuple(place for place in self.objects if place[0] != path))

    def write(self, marker: Marker) -> tuple[World, Seen]:
        seen = Seen(marker, f"v{self.version + 1}", "")
        return replace(self, marker=seen, version=self.version + 1), seen

    def broken(self) -> str | None:
        """Invariant I: what a committed manifest lists is there, and right."""
        if self.marker is None or not isinstance(self.marker.marker, Manifest):
            return None
        for file in self.marker.marker.table.files:
            place = self.get(file.path)
            if place is None or place[1] != file.sha256:
                return f"committed {file.path}={file.sha256}, the store holds {place}"
        return None


Units = tuple[object, ...]


def units(actor: Actor, request: Request) -> Units:
    """The atomic store requests that one protocol request consists of."""
    match request:
        case commit.PutObjects():
            return actor.source
        case commit.RemoveObjects(objects):
            return tuple(objects)
    return (request,)


def local(actor: Actor, request: Request) -> object:
    """The answer of a request that touches no shared state; None if it does."""
    match request:
        case commit.ScanSource():
            return repr(actor.source)
        case commit.HashSource():
            return content_digest(actor.table())
        case commit.AbortUploads():
            return True
    return None


def perform(world: World, actor: Actor, unit: object) -> tuple[World, object]:
    """One atomic request: the world after it, and the answer."""
    match unit:
        case commit.ReadMarker():
            return world, world.marker
        case commit.CreateMarker(marker):
            return (world, None) if world.marker else world.write(marker)
        case commit.SwapMarker(seen, marker):
            return world.write(marker) if world.marker == seen else (world, None)
        case commit.RemoveMarker(seen):
            return (replace(world, marker=None) if world.marker == seen else world), None
        case commit.ListObjects():
            return world, tuple(found(place) for place in world.objects)
        case commit.Verify(table):
            there = {place[0]: place[1] for place in world.objects}
            wrong = [file for file in table.files if there.get(file.path) != file.sha256]
            if wrong:
                return world, StorageError(commit.Reason.INTEGRITY_MISMATCH, "not what was written")
            expected = {file.path for file in table.files}
            return world, tuple(found(place) for place in world.objects if place[0] not in expected)
        case (str(path), str(content)):  # one create-only PUT
            place = world.get(path)
            if place is None:
                return replace(world, objects=tuple(sorted((*world.objects, (path, content, actor.uid))))), None
            return world, None if place[1] == content else found(place)
        case Found(path=path, token=token):  # one conditional DELETE
            place = world.get(path)
            return (world.without(path) if place and place[1] == token else world), None
    raise AssertionError(unit)


def found(place: Place) -> Found:
    return Found(place[0], 1, place[1], place[2])


def combine(actor: Actor, request: Request, answers: tuple[object, ...]) -> object:
    """The protocol's answer from the answers of its units."""
    match request:
        case commit.PutObjects():
            return commit.Put(actor.table(), tuple(answer for answer in answers if isinstance(answer, Found)))
        case commit.RemoveObjects():
            return None
    return answers[0] if answers else None


@dataclass(frozen=True)
class Running:
    """A running actor: the answers so far (by which its generator is made again), and those of the pending request."""

    answers: tuple[object, ...]
    partial: tuple[object, ...]
    place: str  # Instance.key() of the answers, kept because it is asked for often


@dataclass(frozen=True)
class Late:
    """A killed actor whose last request is still on its way."""

    unit: object


Standing = Running | Late | Literal["waiting", "ended"]


class Instance:
    """A generator brought to where its answers lead."""

    def __init__(self, actor: Actor, answers: tuple[object, ...]) -> None:
        claims = (f"{actor.uid}{actor.source}{actor.kind}{number}" for number in range(99))
        self.actor, self.pending = actor, None
        self.generator = actor.generator(claims)
        self.outcome: object = None
        self.answers: list[object] = []
        self._advance(None)
        for answer in answers:
            self.feed(answer)

    def feed(self, answer: object) -> None:
        self.answers.append(answer)
        self._advance(answer)

    def _advance(self, answer: object) -> None:
        try:
            if isinstance(answer, StorageError):
                self.pending = self.generator.throw(answer)
            else:
                self.pending = self.generator.send(answer)
            while (known := local(self.actor, self.pending)) is not None:
                self.pending = self.generator.send(known)
        except StopIteration as stop:
            self.pending, self.outcome = None, stop.value
        except StorageError as error:
            self.pending, self.outcome = None, error.reason

    def key(self) -> str:
        """Where the generator stands: instruction and local variables of every frame (round counters left out)."""
        frames, generator = [], self.generator
        while generator is not None and generator.gi_frame is not None:
            frame = generator.gi_frame
            values = {name: value for name, value in frame.f_locals.items() if name not in ("_", "who")}
            frames.append(f"{frame.f_code.co_name}:{frame.f_lasti}:{values!r}")
            generator = getattr(generator, "gi_yieldfrom", None)
        return "|".join(frames) if self.pending is not None else "ended"


@dataclass(frozen=True)
class State:
    standings: tuple[Standing, ...]
    world: World


@dataclass(frozen=True)
class Exploration:
    states: int
    broken: str | None
    path: tuple[str, ...]
    outcomes: frozenset[str]


class LateRequests(Enum):
    """Which requests of a killed actor may still arrive."""

    NONE = "none"
    WRITES = "everything but removals of data"
    ALL = "everything"


def explore(
    actors: tuple[Actor, ...], *, late: LateRequests = LateRequests.NONE, fence: bool = True, limit: int = 400_000
) -> Exploration:
    """Visit every reachable state; stop at the first one that breaks the invariant, with the schedule that led there.

    ``fence=False``: the operator lies about earlier movers, every actor starts whenever it likes.
    """
    start = State(tuple("waiting" for _ in actors), World())
    parents: dict[object, tuple[object, str] | None] = {}
    queue: deque[State] = deque()
    outcomes: set[str] = set()

    def visit(state: State, parent: object, step: str) -> str | None:
        key = _key(state)
        if key not in parents:
            parents[key] = (parent, step) if parent is not None else None
            queue.append(state)
            return state.world.broken()
        return None

    visit(start, None, "")
    while queue:
        state = queue.popleft()
        key = _key(state)
        for index, actor in enumerate(actors):
            for standing, world, step in _successors(actors, state, index, late, fence):
                if isinstance(standing, str) and standing == "ended" and step.startswith("ends"):
                    outcomes.add(f"{actor.kind} {actor.uid}: {step[5:]}")
                after = State((*state.standings[:index], standing, *state.standings[index + 1 :]), world)
                said = f"{index}:{actor.kind} {actor.uid} {step}"
                if broken := visit(after, key, said):
                    return Exploration(len(parents), broken, _path(parents, key, said), frozenset(outcomes))
        if len(parents) > limit:
            raise AssertionError(f"more than {limit} states: make the scenario smaller")
    return Exploration(len(parents), None, (), frozenset(outcomes))


def _successors(
    actors: tuple[Actor, ...], state: State, index: int, late: LateRequests, fence: bool
) -> Iterator[tuple[Standing, World, str]]:
    actor, standing, world = actors[index], state.standings[index], state.world
    if standing == "ended":
        return
    if standing == "waiting":
        others = [state.standings[i] for i, other in enumerate(actors) if i != index and other.uid == actor.uid]
        if not (actor.fenced and fence) or not any(isinstance(other, Running) for other in others):
            yield Running((), (), Instance(actor, ()).key()), world, "starts"
        return
    if isinstance(standing, Late):
        yield "ended", perform(world, actor, standing.unit)[0], f"late {_name(standing.unit)}"
        return
    assert isinstance(standing, Running)
    instance = Instance(actor, standing.answers)
    assert instance.pending is not None
    todo = units(actor, instance.pending)
    if len(standing.partial) < len(todo):
        unit = todo[len(standing.partial)]
        world, answer = perform(world, actor, unit)
        partial = (*standing.partial, answer)
        step = f"{_name(unit)} -> {_name(answer)}"
        if late is LateRequests.ALL or (late is LateRequests.WRITES and not isinstance(unit, Found)):
            yield Late(unit), state.world, f"killed during {_name(unit)}"
    else:
        unit, partial, step = None, standing.partial, "goes on"
    yield "ended", state.world, "killed"
    if len(partial) < len(todo):
        yield replace(standing, partial=partial), world, step
        return
    instance.feed(combine(actor, instance.pending, partial))
    if instance.pending is None:
        yield "ended", world, f"ends {_outcome(instance.outcome)}"
    else:
        yield Running(tuple(instance.answers), (), instance.key()), world, step


def _key(state: State) -> object:
    def place(standing: Standing) -> object:
        if isinstance(standing, Running):
            return standing.place, tuple(_text(answer) for answer in standing.partial)
        return _text(standing.unit) if isinstance(standing, Late) else standing

    return tuple(place(standing) for standing in state.standings), _text(state.world.marker), state.world.objects


_TEXTS: dict[int, tuple[object, str]] = {}


def _text(value: object) -> str:
    """``repr``, remembered: states share most of their parts, and writing out a marker is slow. The value is kept with
    its text, so that its id is not used again."""
    if (entry := _TEXTS.get(id(value))) is None:
        entry = _TEXTS[id(value)] = (value, repr(value))
    return entry[1]


def _name(value: object) -> str:
    if isinstance(value, Seen):
        return f"{value.marker.state}({value.marker.artifact_uid})@{value.token}"
    return repr(value) if isinstance(value, tuple | Found | type(None)) else type(value).__name__


def _outcome(value: object) -> str:
    match value:
        case commit.Committed(owner=owner):
            return "committed" if owner else "shared"
        case commit.Removed(removed=removed):
            return "removed" if removed else "kept"
    return str(value)


def _path(parents: dict[object, tuple[object, str] | None], key: object, last: str) -> tuple[str, ...]:
    steps = [last]
    while (entry := parents[key]) is not None:
        key, step = entry
        steps.append(step)
    return tuple(reversed(steps))
