"""A bucket of a real S3 server, for each test a prefix in it that nobody else uses."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from storage_world import Fault, ObjectWorld

import local_cluster as lc
from checkpoint_operator.api.names import PROBE_PREFIX
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage.s3 import S3Store, open_s3
from checkpoint_operator.storage.transfer import STREAMS
from checkpoint_operator.storage.turn import TURN

BUCKET = "checkpoints"


@dataclass
class S3World(ObjectWorld):
    """``hooks`` (botocore event, handler) are registered on every real client that the backend makes; ``calls`` counts
    what goes over the wire, by operation. ``before_body`` is called with PutObject or UploadPart before each body, which
    does not go through that client."""

    server: Any = None
    client: Any = None
    hooks: list[tuple[str, Callable[..., Any]]] = field(default_factory=list)
    before_body: list[Callable[[str], object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hooks.append(("before-call.s3", self._count))

    def settings(self) -> tuple[object, ...]:
        return (*super().settings(), *(id(handler) for _, handler in self.hooks))

    def connect(self, uri: TargetURI) -> S3Store:
        store = open_s3(uri, self.options, STREAMS)
        for event, handler in self.hooks:
            store._client.meta.events.register(event, handler)
        send = store._sending

        def counted(operation: str, key: str, *arguments: Any) -> Any:
            name = {"put": "PutObject", "put part": "UploadPart"}[operation]
            if PROBE_PREFIX not in key:
                with TURN.let_go():  # what is done here may wait for another thread, or be another upload
                    for action in self.before_body:
                        action(name)
                self.count(name)
            return send(operation, key, *arguments)

        store._sending = counted  # type: ignore[method-assign]
        return store

    def _count(self, model: Any, params: dict[str, Any], **_: object) -> None:
        path = params["url_path"].rpartition("/")[2]
        is_data = not path.startswith((".metadata", ".probe-"))
        self.count(model.name if is_data else f"{model.name} marker")

    def suffer(self, fault: Fault) -> None:
        match fault:
            case Fault.WRONG_CREDENTIALS:
                credentials(self.work / "credentials", self.server.access_key, "wrong-secret")
            case Fault.MISSING_BUCKET:
                self.base = "s3://no-such-bucket/x"
            case Fault.READ_ONLY:
                reader = self.server.identities["reader"]
                credentials(self.work / "credentials", reader.access_key, reader.secret_key)

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
        answer = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix)
        return sorted(item["Key"].removeprefix(self.prefix) for item in answer.get("Uploads", []))


def credentials(folder: Path, access_key: str, secret_key: str) -> str:
    """A folder of credentials as a mounted Secret has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "AWS_ACCESS_KEY_ID").write_text(access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(secret_key + "\n")
    return str(folder)


@pytest.fixture(scope="session")
def object_store() -> Iterator[lc.ObjectStore]:
    identities = [lc.Identity.read_only("reader"), lc.Identity.for_bucket("tenant", "bucket-a")]
    with lc.start_object_store("storage-tests", identities=identities) as store:
        client = store.client()
        for bucket in (BUCKET, "bucket-a"):
            client.create_bucket(Bucket=bucket)
        client.close()
        yield store


OneWorld = TypeVar("OneWorld", bound=S3World)


@contextmanager
def world_on(kind: str, server: Any, tmp_path: Path, make: type[OneWorld] = S3World) -> Iterator[OneWorld]:  # type: ignore[assignment]
    """A world of its own on a server that runs: an admin's keys, and a prefix that nobody else uses."""
    options = TargetOptions(
        endpoint=server.endpoint,
        force_path_style=True,
        credentials_directory=credentials(tmp_path / "credentials", server.access_key, server.secret_key),
    )
    client = server.client()
    base = f"s3://{BUCKET}/test-{secrets.token_hex(6)}"
    yield make(kind, base, options, tmp_path, server=server, client=client)
    client.close()


@pytest.fixture
def s3_world(object_store: lc.ObjectStore, tmp_path: Path) -> Iterator[S3World]:
    with world_on("s3", object_store, tmp_path) as world:
        yield world
