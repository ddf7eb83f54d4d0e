"""Many files, a large file, many artifacts: on every store, counted in requests; times are printed, never asserted."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from storage_world import MARKER, MIB, ObjectWorld, World, make

from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Progress
from checkpoint_operator.storage.marker import encode
from checkpoint_operator.storage.source import Selection

FULL = os.environ.get("TEST_SCALE") == "full"
"""``make test-scale``: every store gets everything. In ``make test`` the slow servers get what shows the same code."""

PATIENCE = 3600 if FULL else 300
"""Seconds after which a test of many or large files is stopped."""

FILES = 10_000
FOLDERS = 7
TAKEN = {"file": 7, "s3": 7}
"""Folders by world; the others take one. Their servers take ten times as long for a file, and more than one page of a
listing is what matters there: GCS has 1,000 to a page, a folder 1,428 files. (Azure has 5,000: pages of two are shown in
test_azure_store.py.)"""

GIB = 1 << 30
WHOLE = 3 * GIB + 1
"""Beyond what a signed number of 32 bits counts."""
LARGE = {"file": WHOLE, "s3": WHOLE}
"""By world. The other servers keep objects in memory or in a thousand small files: there a file of several parts shows the
same code, in ``OTHERS`` bytes."""
OTHERS = 80 * MIB + 1
ARTIFACTS = 1_000


@pytest.fixture(scope="session")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    return make(root / "many", {name_of(number): str(number).encode() for number in range(FILES)})


def name_of(number: int) -> str:
    return f"shard-{number % FOLDERS}/{number:05}"


def took(what: str, world: World, started: float) -> None:
    print(f"\n{world.kind}: {what} in {time.monotonic() - started:.1f} s")


@pytest.mark.timeout(PATIENCE)
def test_ten_thousand_small_files_go_up_come_back_and_are_removed(world: World, many_files: Path) -> None:
    last, seen = FOLDERS if FULL else TAKEN.get(world.kind, 1), list[Progress]()
    numbers = [number for number in range(FILES) if number % FOLDERS < last]
    files = len(numbers)
    started = time.monotonic()
    stored = world.upload(many_files, selection=Selection(include=[f"shard-[0-{last - 1}]"]), progress=seen.append)
    took(f"{files} files stored", world, started)
    assert stored.file_count == files
    assert (seen[-1].files_done, seen[-1].bytes_done) == (files, stored.size_bytes)
    if isinstance(world, ObjectWorld):
        assert world.calls["put"] == files
        assert world.calls["stat"] == 0, "what a write answers is not asked again"
        assert world.calls["list"] <= 4, "one listing serves all files"
    started = time.monotonic()
    restored = world.download()
    took(f"{files} files restored", world, started)
    if isinstance(world, ObjectWorld):
        assert world.calls["fetch"] == files
    wrong = [number for number in numbers if (restored / name_of(number)).read_bytes() != str(number).encode()]
    assert wrong == []
    assert sum(1 for path in restored.rglob("*") if path.is_file()) == files
    shutil.rmtree(restored)
    started = time.monotonic()
    world.delete()
    took(f"{files} files removed", world, started)
    assert world.paths() == []


def sparse(path: Path, size: int) -> dict[int, bytes]:
    """A file of mostly holes. What is not a hole lies where counters overflow and where parts meet; offset → bytes."""
    marks = {
        at: at.to_bytes(8) for at in (0, 8 * MIB - 4, 16 * MIB - 4, 64 * MIB - 4, 2 * GIB - 4, size - 8) if at + 8 <= size
    }
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(size)
        for at, mark in marks.items():
            file.seek(at)
            file.write(mark)
    return marks


@pytest.mark.timeout(PATIENCE)
def test_a_large_sparse_file_goes_up_and_comes_back(world: World, tmp_path: Path) -> None:
    size = WHOLE if FULL else LARGE.get(world.kind, OTHERS)
    if shutil.disk_usage(tmp_path).free < 5 * size:
        pytest.skip(f"less than {5 * size >> 30} GiB are free on this disk")
    source = tmp_path / "large" / "model.bin"
    marks = sparse(source, size)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    started = time.monotonic()
    world.upload(source.parent)
    took(f"{size >> 20} MiB stored", world, started)
    [line] = world.backend.get_manifest(world.uri()).table.files
    assert (line.size, line.sha256) == (size, digest)
    if isinstance(world, ObjectWorld):
        assert line.parts > 1
        assert world.calls["put_part"] == line.parts
    try:
        started = time.monotonic()
        restored = world.download() / "model.bin"
        took(f"{size >> 20} MiB restored", world, started)
        assert restored.stat().st_size == size
        with restored.open("rb") as file:
            for at, mark in marks.items():
                file.seek(at)
                assert file.read(8) == mark
        restored.unlink()
    finally:
        world.delete()
    assert world.paths() == []
    assert not isinstance(world, ObjectWorld) or world.uploads() == []


def together(readers: int) -> Callable[[str, str], None]:
    """A cue that lets the first readers of markers go on only when so many are there: none, if they come one by one."""
    meeting, lock, met = threading.Barrier(readers), threading.Lock(), 0

    def cue(verb: str, key: str) -> None:
        nonlocal met
        if verb not in ("read", "fetch") or not key.endswith(MARKER):
            return
        with lock:
            met += 1
            mine = met
        if mine <= readers:
            meeting.wait(timeout=60)

    return cue


def test_a_thousand_artifacts_are_listed_by_pages_with_their_manifests_read_in_parallel(world: World, source: Path) -> None:
    world.upload(source, "pattern")
    manifest = world.backend.get_manifest(world.uri("pattern"))

    def plant(number: int) -> str:
        """An artifact that is a manifest and one file, past the backend: that is quicker than a thousand uploads."""
        place = f"many/job-{number % 10}/step-{number:04}"
        metadata = ArtifactMetadata(
            artifact_id=f"uid-{number}",
            artifact_type="checkpoint" if number % 3 else "merged",
            job_name=f"job-{number % 10}",
            tags={"experiment": "production" if number % 2 else "trial"},
            storage_path=f"{world.base}/{place}",
        )
        world.put(f"{place}/{MARKER}", encode(manifest.replace(artifact_uid=f"uid-{number}", metadata=metadata)))
        return str(metadata.storage_path)

    with ThreadPoolExecutor(8) as pool:
        planted = list(pool.map(plant, range(ARTIFACTS)))
    world.put("many/foreign/.metadata.json", b'{"mine": true}')
    world.put("many-more/.metadata.json", encode(manifest))
    if isinstance(world, ObjectWorld):
        world.calls.clear()
        world.cues.append(together(4))
    started = time.monotonic()
    listed = [str(found.storage_path) for found in world.backend.list_artifacts(world.uri("many"))]
    took(f"{ARTIFACTS} artifacts listed", world, started)
    assert sorted(listed) == sorted(planted)
    if isinstance(world, ObjectWorld):
        assert listed == sorted(planted, key=str.encode), "the order of the store"
        assert world.calls["read marker"] + world.calls["fetch marker"] == ARTIFACTS + 1
        assert world.calls["list"] == 1
        world.cues.clear()

    def filtered(**filters: object) -> set[str]:
        found = world.manager().list(f"{world.base}/many", **filters)  # type: ignore[arg-type]
        return {str(one.artifact_id) for one in found}

    def expected(wanted: Callable[[int], bool]) -> set[str]:
        return {f"uid-{number}" for number in range(ARTIFACTS) if wanted(number)}

    assert filtered(artifact_type="merged") == expected(lambda number: number % 3 == 0)
    assert filtered(job_name="job-3", tags={"experiment": "production"}) == expected(lambda number: number % 10 == 3)
    assert filtered(job_name="job-3", tags={"experiment": "trial"}) == set()
    assert filtered(prefix="job-7/step-00") == expected(lambda number: number % 10 == 7 and number < 100)
    assert filtered(prefix="job-7/step-0007/") == {"uid-7"}
    assert filtered(prefix="job") == expected(lambda number: True)


def test_a_list_can_be_left_early(world: World, source: Path) -> None:
    for number in range(5):
        world.upload(source, f"many/{number}", uid=f"uid-{number}")
    if isinstance(world, ObjectWorld):
        world.calls.clear()
    listing = world.backend.list_artifacts(world.uri("many"))
    assert next(listing).storage_path == str(world.uri("many/0"))
    listing.close()  # type: ignore[attr-defined]
    if isinstance(world, ObjectWorld):
        assert world.calls["list"] == 1
