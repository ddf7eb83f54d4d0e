"""Real servers for the whole session, and for each test a place in each of them that nobody else uses.

One suite for every store: a test that takes ``world`` runs once for each name in ``WORLDS``. A store is a module
``<name>_world.py`` with a fixture ``<name>_world``, imported here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from azure_world import azure_world as azure_world
from azure_world import azurite as azurite
from gcs_world import fake_gcs as fake_gcs
from gcs_world import gcp_storage_emulator as gcp_storage_emulator
from gcs_world import gcs_without_conditions_world as gcs_without_conditions_world
from gcs_world import gcs_world as gcs_world
from s3_world import object_store as object_store
from s3_world import s3_world as s3_world
from storage_world import FileWorld, World, make
from stripped_world import CANNOT_HOLD
from stripped_world import s3_stripped_world as s3_stripped_world
from versity_world import versitygw as versitygw
from versity_world import versitygw_world as versitygw_world

from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage import driver, staging

WORLDS = ["file", "s3", "versitygw", "gcs", "azure"]
CONFORMANCE = {f"test_{name}" for name in ("conformance", "whole_or_nothing", "integrity", "names", "verify", "restore")}
"""Modules that hold for a store without conditions as well; the others are about conditions, numbers and clients."""

_FOREIGN = ("AWS_", "S3_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_")


@pytest.fixture(autouse=True)
def _no_identity_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def file_world(tmp_path: Path) -> FileWorld:
    return FileWorld("file", "file:///team/test", TargetOptions(), tmp_path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" in metafunc.fixturenames:
        worlds = [*WORLDS, "s3_stripped"] if metafunc.module.__name__ in CONFORMANCE else WORLDS
        metafunc.parametrize("world", [_param(name, metafunc.function.__name__) for name in worlds], indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """A name that no test has any more is a case that nobody looks at: said where all of those modules were collected."""
    modules = {item.module.__name__ for item in session.items if isinstance(item, pytest.Function)}
    if modules >= CONFORMANCE and not session.config.option.keyword:
        names = {item.originalname for item in session.items if isinstance(item, pytest.Function)}
        assert names >= CANNOT_HOLD.keys(), f"no such tests: {CANNOT_HOLD.keys() - names}"


def _param(world: str, test: str) -> Any:
    reason = CANNOT_HOLD.get(test) if world == "s3_stripped" else None
    return pytest.param(world, marks=[pytest.mark.skip(reason=reason)] if reason else [])


@pytest.fixture
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(f"{request.param}_world")
    return found


@pytest.fixture
def sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file after the other, so that a cue at the n-th look always comes at the same byte."""
    monkeypatch.setattr(driver, "FILES_AT_ONCE", 1)
    monkeypatch.setattr(driver, "STREAMS", 1)
    monkeypatch.setattr(staging, "WORKERS", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small checkpoint: three files, one of them in a folder."""
    return make(tmp_path / "source", {"config.json": b"{}", "model.safetensors": b"weights", "sub/optimizer.pt": b"state"})
