"""What the tests of the storage layer share: one face for every kind of store, and sources that change on cue."""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, Stored, TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import DeleteRequest, LocalStorageBackend, StorageBackend, StorageManager, UploadRequest
from checkpoint_operator.storage.backend import Report
from checkpoint_operator.storage.objects import ObjectStoreBackend
from checkpoint_operator.storage.s3 import S3Store, open_s3
from checkpoint_operator.storage.source import Selection
from checkpoint_operator.storage.transfer import DEFAULT_WORKERS

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "tests" / "checkpoints" / "dpo-lora" / "checkpoint-2"
SHARDED = REPOSITORY / "tests" / "checkpoints" / "dpo-full-sharded" / "checkpoint-2"
MARKER = ".metadata.json"
MIB = 1 << 20

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
            if self._looks == self._look:
                self._action()
        return super().is_set()


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


@dataclass
class World:
    """A store with one backend, and a raw way into it that goes past the backend."""

    kind: str
    base: str
    options: TargetOptions
    work: Path
    backend: StorageBackend = field(init=False)

    def uri(self, name: str = "run") -> TargetURI:
        return TargetURI.parse(f"{self.base}/{name}")

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
        report: Report | None = None,
        cancelled: threading.Event | None = None,
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
                report=report,
                cancelled=cancelled or threading.Event(),
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

    def download(self, name: str = "run", report: Report | None = None) -> Path:
        destination = self.work / f"restored-{secrets.token_hex(4)}"
        self.backend.download_artifact(self.uri(name), destination, report)
        return destination

    def put(self, path: str, data: bytes) -> None:
        raise NotImplementedError

    def get(self, path: str) -> bytes:
        raise NotImplementedError

    def remove(self, path: str) -> None:
        raise NotImplementedError

    def paths(self) -> list[str]:
        """Every file or object of the test, whoever wrote it, sorted."""
        raise NotImplementedError


@dataclass
class FileWorld(World):
    """The volume's root is ``work/volume``."""

    def __post_init__(self) -> None:
        self.root = self.work / "volume"
        self.root.mkdir()
        self.options = TargetOptions(file_root=str(self.root))
        self.backend = LocalStorageBackend(self.root)
        self.place = self.root / self.uri("x").path.rpartition("/")[0]

    def put(self, path: str, data: bytes) -> None:
        make(self.place, {path: data})

    def get(self, path: str) -> bytes:
        return (self.place / path).read_bytes()

    def remove(self, path: str) -> None:
        (self.place / path).unlink()

    def paths(self) -> list[str]:
        return sorted(key for key, value in tree(self.place).items() if value is not None)


@dataclass
class S3World(World):
    """``hooks`` (botocore event, handler) are registered on every real client that the backend makes; ``calls`` counts."""

    client: Any = None
    bucket: str = ""
    hooks: list[tuple[str, Callable[..., Any]]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[tuple[object, ...], S3Store] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hooks.append(("before-call.s3", self._count))
        self.backend = ObjectStoreBackend(self.open)
        self.prefix = self.uri("x").path.removesuffix("x")

    def open(self, uri: TargetURI) -> S3Store:
        key = (uri.bucket, self.options.model_dump_json(), tuple(id(handler) for _, handler in self.hooks))
        with self._counting:
            if key not in self._open:  # a client takes longer to make than most tests to run
                store = open_s3(uri, self.options, DEFAULT_WORKERS)
                for event, handler in self.hooks:
                    store._client.meta.events.register(event, handler)
                self._open[key] = store
            return self._open[key]

    def _count(self, model: Any, params: dict[str, Any], **_: object) -> None:
        path = params["url_path"].rpartition("/")[2]
        with self._counting:
            is_data = not path.startswith((".metadata", ".probe-"))
            self.calls[model.name if is_data else f"{model.name} marker"] += 1

    def put(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.prefix + path, Body=data)

    def get(self, path: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=self.bucket, Key=self.prefix + path)["Body"].read()
        return body

    def remove(self, path: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + path)

    def paths(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        return sorted(item["Key"].removeprefix(self.prefix) for page in pages for item in page.get("Contents", []))

    def uploads(self) -> list[str]:
        """The keys of unfinished multipart uploads of the test."""
        answer = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix)
        return sorted(item["Key"].removeprefix(self.prefix) for item in answer.get("Uploads", []))


def credentials(folder: Path, access_key: str, secret_key: str) -> str:
    """A folder of credentials as a mounted Secret has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "AWS_ACCESS_KEY_ID").write_text(access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(secret_key + "\n")
    return str(folder)
