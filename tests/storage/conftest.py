"""One real S3 server for the whole session, and for each test a place in it that nobody else uses."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from storage_world import FileWorld, S3World, World, credentials

import local_cluster as lc
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage import objects

BUCKET = "checkpoints"


@pytest.fixture(autouse=True)
def _no_identity_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "S3_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def object_store() -> Iterator[lc.ObjectStore]:
    identities = [lc.Identity.read_only("reader"), lc.Identity.for_bucket("tenant", "bucket-a")]
    with lc.start_object_store("storage-tests", identities=identities) as store:
        client = store.client()
        for bucket in (BUCKET, "bucket-a"):
            client.create_bucket(Bucket=bucket)
        client.close()
        yield store


@pytest.fixture
def s3_world(object_store: lc.ObjectStore, tmp_path: Path) -> Iterator[S3World]:
    options = TargetOptions(
        endpoint=object_store.endpoint,
        force_path_style=True,
        credentials_directory=credentials(tmp_path / "credentials", object_store.access_key, object_store.secret_key),
    )
    client = object_store.client()
    base = f"s3://{BUCKET}/test-{secrets.token_hex(6)}"
    yield S3World("s3", base, options, tmp_path, client=client, bucket=BUCKET)
    client.close()


@pytest.fixture
def file_world(tmp_path: Path) -> FileWorld:
    return FileWorld("file", "file:///team/test", TargetOptions(), tmp_path)


@pytest.fixture(params=["file", "s3"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(f"{request.param}_world")
    return found


@pytest.fixture
def sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file after the other, so that a cue at the n-th look always comes at the same byte."""
    monkeypatch.setattr(objects, "DEFAULT_WORKERS", 1)
