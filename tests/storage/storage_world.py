"""What the tests of the storage layer share: one face for every kind of store, and sources that change on cue."""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, Stored, TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import (
    DeleteRequest,
    LocalStorageBackend,
    StorageBackend,
    StorageError,
    StorageManager,
    UploadRequest,
)
from checkpoint_operator.storage.backend import OnProgress
from checkpoint_operator.storage.objects import ObjectStoreBackend
from checkpoint_operator.storage.source import Selection
from checkpoint_operator.storage.store import ObjectStore, Written
from checkpoint_operator.storage.turn import TURN

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "tests" / "checkpoints" / "dpo-lora" / "checkpoint-2"
SHARDED = REPOSITORY / "tests" / "checkpoints" / "dpo-full-sharded" / "checkpoint-2"
MARKER = ".metadata.json"
MIB = 1 << 20
SIX = {f"{number}.bin": bytes([number]) * 100 for number in range(6)}

Tree = dict[str, bytes | str | None]
"""Path → content of a file, target of a link (as ``-> target``), None for an empty folder."""


class OnLook(threading.Event):
    """A `cancelled` event that does something the n-th time the upload looks at it: a cue between two pieces."""

    def __init__(self, look: int, action: Callable[[], object] | None = None) -> None:
        super().__init__()
        self._look, self._looks, self._action, self._counting = look, 0, action or self.set, threading.Lock()

    def is_set(self) -> bool:
        with self._counting:
            self._looks += 1
            is_due = self._looks == self._look
        if is_due:
            with TURN.let_go():  # the action may wait for another thread, or be another upload
                self._action()
        return super().is_set()


def refused(reason: Reason) -> pytest.RaisesExc[StorageError]:
    """Expects a :class:`StorageError` of exactly this reason."""
    return pytest.RaisesExc(StorageError, check=lambda error: error.reason is reason)


def put_object(store: ObjectStore, key: str, body: bytes, digest: bytes, owner: str) -> Written | None:
    """An object in one request, and its answer."""
    with store.put(key, body, digest, owner) as written:
        return written()


def fetched(store: ObjectStore, key: str, token: str, start: int, length: int) -> bytes:
    """A range of an object, by the store's own verb."""
    body, told = bytearray(length), [0]
    store.fetch(key, token, start, memoryview(body), lambda first, last: told.append(last))
    assert told[-1] == length, "whoever fetches hears of every byte"
    return bytes(body)


def make(root: Path, files: dict[str, bytes]) -> Path:
    """A source folder of these files."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tree(root: Path) -> Tree:
    """Everything that lies below a folder."""
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        for name in [*files, *folders]:
            path = here / name
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = f"-> {os.readlink(path)}"
            elif name in files:
                found[key] = path.read_bytes()
            elif not any(path.iterdir()):
                found[key] = None
    return found


class Fault(StrEnum):
    """What a store may suffer from, whatever it is."""

    WRONG_CREDENTIALS = "wrong credentials"
    MISSING_BUCKET = "a missing bucket"
    READ_ONLY = "no right to write"


@dataclass
class World:
    """A store with one backend, and a raw way into it that goes past the backend.

    ``kind`` is the name in ``WORLDS``. ``base`` is a URI below which nobody else works.
    """

    kind: str
    base: str
    options: TargetOptions
    work: Path
    backend: StorageBackend = field(init=False)

    def uri(self, name: str = "run") -> TargetURI:
        return TargetURI.parse(f"{self.base}/{name}")

    def place(self, name: str = "run") -> TargetURI:
        """Where an upload is sent; it may lie in a folder below (layout Unique)."""
        return TargetURI.parse(f"{self.base}/{name}")

    def prefix_of_files(self) -> str:
        """What stands before the names of files of ``run`` in the store; of the right length."""
        return f"{self.uri().path}/"

    def manager(self) -> StorageManager:
        return StorageManager(self.options)

    def upload(
        self,
        source: Path,
        name: str = "run",
        uid: str | None = "uid-a",
        *,
        metadata: ArtifactMetadata | None = None,
        layout: Layout = Layout.PLAIN,
        selection: Selection | None = None,
        force: bool = False,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
        keep_parts: bool = True,
    ) -> Stored:
        return self.backend.upload_artifact(
            UploadRequest(
                root=str(source.parent),
                path=source.name,
                uri=self.uri(name),
                metadata=metadata or ArtifactMetadata(),
                uid=uid,
                layout=layout,
                selection=selection or Selection(),
                force=force,
                progress=progress,
                cancelled=cancelled or threading.Event(),
                keep_parts=keep_parts,
            )
        )

    def delete(
        self,
        name: str = "run",
        uid: str | None = "uid-a",
        *,
        layout: Layout = Layout.PLAIN,
        keep: bool = False,
        force: bool = True,
    ) -> str:
        return self.backend.delete_artifact(DeleteRequest(self.uri(name), uid, layout, keep_committed=keep, force=force))

    def download(self, name: str = "run", progress: OnProgress | None = None) -> Path:
        destination = self.work / f"restored-{secrets.token_hex(4)}"
        self.backend.download_artifact(self.uri(name), destination, progress)
        return destination

    @property
    def is_bucket(self) -> bool:
        """Whether the place has a marker with states. A volume has none: its locks say who is gone."""
        return isinstance(self, ObjectWorld)

    def suffer(self, fault: Fault) -> None:
        """Bring the fault about, for whatever the backend does from now on; skip, with the reason, where that cannot be."""
        raise NotImplementedError

    def put(self, path: str, data: bytes) -> None:
        """Write past the backend, below ``base``; what is there is replaced."""
        raise NotImplementedError

    def get(self, path: str) -> bytes:
        raise NotImplementedError

    def remove(self, path: str) -> None:
        raise NotImplementedError

    def paths(self) -> list[str]:
        """Every file or object of the test, whoever wrote it, sorted."""
        raise NotImplementedError

    def real_paths(self) -> list[str]:
        """The same where a world shows another path than the store has."""
        return self.paths()


def assert_nothing_committed(world: World, name: str = "run") -> None:
    with refused(Reason.NOT_FOUND):
        world.backend.get_metadata(world.uri(name))
    assert list(world.backend.list_artifacts(world.uri(name))) == []


@dataclass
class FileWorld(World):
    """The volume's root is ``work/volume``."""

    def __post_init__(self) -> None:
        self.root = self.work / "volume"
        self.root.mkdir()
        self.options = TargetOptions(file_root=str(self.root))
        self.backend = LocalStorageBackend(self.root)
        self.folder = self.root / self.uri("x").path.rpartition("/")[0]

    def suffer(self, fault: Fault) -> None:
        match fault:
            case Fault.WRONG_CREDENTIALS:
                pytest.skip("a volume asks for no credentials")
            case Fault.MISSING_BUCKET:
                self.root.rmdir()
            case Fault.READ_ONLY:
                if os.geteuid() == 0:
                    pytest.skip("root writes wherever it wants; a volume that is mounted read-only is in test_disks.py")
                self.root.chmod(0o555)

    def put(self, path: str, data: bytes) -> None:
        make(self.folder, {path: data})

    def get(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def remove(self, path: str) -> None:
        (self.folder / path).unlink()

    def paths(self) -> list[str]:
        return sorted(key for key, value in tree(self.folder).items() if value is not None)


Cue = Callable[[str, str], object]
"""Called with the verb of :class:`ObjectStore` and the key (or prefix), before the store is asked."""

_REQUESTS = {name for name in dir(ObjectStore) if not name.startswith("_")} - {
    "refusal",
    "part_size",
    "digest",
    "checksum",
    "is_part",
    "without_conditions",
}


@dataclass
class ObjectWorld(World):
    """What every bucket has in common. A new store brings ``connect``, ``suffer``, and its raw way in.

    ``calls`` counts by verb of :class:`ObjectStore` (``put``, ``read marker``; a subclass may count its wire as well), and
    ``cues`` are told of each.
    """

    calls: Counter[str] = field(default_factory=Counter)
    cues: list[Cue] = field(default_factory=list)
    bucket: str = field(init=False)
    prefix: str = field(init=False)
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[tuple[object, ...], ObjectStore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backend = ObjectStoreBackend(self.open)
        self.bucket = self.uri("x").bucket
        self.prefix = self.uri("x").path.removesuffix("x")

    def connect(self, uri: TargetURI) -> ObjectStore:
        """A real store, made from ``options`` as they are now."""
        raise NotImplementedError

    def settings(self) -> tuple[object, ...]:
        """What a store that is open already depends on."""
        keys = Path(self.options.credentials_directory or os.devnull).glob("*")
        return (self.options.model_dump_json(), *(path.read_bytes() for path in sorted(keys)))

    def open(self, uri: TargetURI) -> ObjectStore:
        key = (uri.bucket, *self.settings())
        with self._counting:
            if key not in self._open:  # a client takes longer to make than most tests to run
                self._open[key] = _Watched(self.connect(uri), self)  # type: ignore[assignment]
            return self._open[key]

    def count(self, what: str) -> None:
        with self._counting:
            self.calls[what] += 1

    def uploads(self) -> list[str]:
        """The keys of unfinished uploads of the test."""
        found = self.connect(self.uri("x")).list_uploads(self.prefix)
        return sorted(upload.key.removeprefix(self.prefix) for upload in found)


class _Watched:
    """A store whose requests are counted and cued; everything else passes through."""

    def __init__(self, store: ObjectStore, world: ObjectWorld) -> None:
        self._store, self._world = store, world

    def without_conditions(self) -> _Watched:
        return _Watched(self._store.without_conditions(), self._world)

    def __getattr__(self, verb: str) -> Any:
        found = getattr(self._store, verb)
        if verb not in _REQUESTS:
            return found

        def watched(key: str, *arguments: Any, **named: Any) -> Any:
            is_data = not key.rpartition("/")[2].startswith((".metadata", ".probe-"))
            self._world.count(verb if is_data else f"{verb} marker")
            with TURN.let_go():  # a cue may wait for another thread, or be another upload
                for cue in self._world.cues:
                    cue(verb, key)
            return found(key, *arguments, **named)

        return watched


def race(world: World, sources: Sequence[Path], place: str) -> tuple[int, Reason]:
    """Both sources are uploaded to one place at once, as uid-0 and uid-1: who won, and what the other was told."""
    barrier, outcomes = threading.Barrier(2), dict[int, object]()

    def attempt(number: int) -> None:
        barrier.wait()
        try:
            outcomes[number] = world.upload(sources[number], place, uid=f"uid-{number}")
        except StorageError as error:
            outcomes[number] = error.reason

    threads = [threading.Thread(target=attempt, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [number for number, outcome in outcomes.items() if not isinstance(outcome, Reason)]
    lost = outcomes[1 - winner]
    assert isinstance(lost, Reason)
    return winner, lost
