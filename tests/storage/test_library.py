"""What a user of the library sees, on real stores: the round trip, lists, cancellation, and every example of its page."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

import pytest
from s3_world import S3World
from storage_world import CHECKPOINT, MIB, REPOSITORY, FileWorld, ObjectWorld, OnLook, World, make, tree

import local_cluster as lc
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Progress
from checkpoint_operator.storage import (
    ArtifactMetadata,
    AsyncStorageManager,
    Cancelled,
    Layout,
    StorageError,
    StorageManager,
    manager,
)

BIG = 96 * MIB
"""Several pieces on every store, so that a cancellation comes while something is open."""


def refused(reason: Reason) -> pytest.RaisesExc[StorageError]:
    return pytest.RaisesExc(StorageError, check=lambda error: error.reason is reason)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    folder = make(tmp_path / "big", {"config.json": b"{}"})
    with (folder / "model.bin").open("wb") as file:
        for number in range(BIG // MIB):
            file.write(bytes([number]) * MIB)
    return folder


def assert_invisible(world: World, name: str = "run") -> None:
    with refused(Reason.NOT_FOUND):
        world.manager().get_metadata(f"{world.base}/{name}")
    assert list(world.manager().list(world.base)) == []
    if isinstance(world, ObjectWorld) and world.kind != "azure":  # where blocks that nobody commits expire by themselves
        assert world.uploads() == []
    if isinstance(world, FileWorld):
        assert world.paths() == []


# ---- The round


def test_what_upload_returns_is_what_the_other_calls_take(world: World, source: Path) -> None:
    storage = world.manager()
    metadata = ArtifactMetadata(artifact_id="mine", job_name="dpo", final_loss=0.31, future={"a": [1]})
    for layout in Layout:
        uri = storage.upload(source, f"{world.base}/{layout}", metadata, layout=layout)
        assert uri.startswith(f"{world.base}/{layout}")
        found = storage.get_metadata(uri)
        assert (found.artifact_id, found.final_loss, found.storage_path) == ("mine", "0.31", uri)
        assert found.to_dict()["future"] == {"a": [1]}
        assert storage.verify(uri) == found
        assert storage.download(uri, world.work / f"restored-{layout}") == found
        assert tree(world.work / f"restored-{layout}") == tree(source)
        assert storage.upload(source, f"{world.base}/{layout}", metadata, layout=layout) == uri
        storage.delete(uri)
        with refused(Reason.NOT_FOUND):
            storage.verify(uri)
        storage.delete(uri)


def test_progress_tells_bytes_and_files_of_each_transfer(world: World, source: Path) -> None:
    storage, uri = world.manager(), f"{world.base}/run"
    size = sum(len(content) for content in tree(source).values() if isinstance(content, bytes))
    for transfer in (
        lambda progress: storage.upload(source, uri, progress=progress),
        lambda progress: storage.verify(uri, progress=progress),
        lambda progress: storage.download(uri, world.work / "restored", progress=progress),
    ):
        seen: list[Progress] = []
        transfer(seen.append)
        assert (seen[-1].bytes_done, seen[-1].bytes_total) == (size, size)
        assert (seen[-1].files_done, seen[-1].files_total) == (3, 3)


def test_a_manager_serves_many_threads_with_the_clients_that_it_has(s3_world: S3World, source: Path) -> None:
    storage = s3_world.manager()

    def round_trip(number: int) -> Path:
        uri = storage.upload(source, f"{s3_world.base}/run-{number}")
        storage.download(uri, s3_world.work / f"restored-{number}")
        return s3_world.work / f"restored-{number}"

    with ThreadPoolExecutor(8) as pool:
        assert all(tree(restored) == tree(source) for restored in pool.map(round_trip, range(16)))


# ---- Lists


def test_a_list_is_filtered_by_prefix_and_by_what_is_known_of_an_artifact(world: World, source: Path) -> None:
    storage = world.manager()
    for name, metadata in {
        "experiments/dpo/1": ArtifactMetadata(job_name="dpo", step=1, tags={"experiment": "production", "a": "1"}),
        "experiments/dpo/10": ArtifactMetadata(job_name="dpo", step=10, labels={"app": "x"}),
        "experiments/ppo/1": ArtifactMetadata(job_name="ppo", algorithm="ppo", tags={"experiment": "production"}),
        "experiments-2/1": ArtifactMetadata(job_name="dpo", artifact_type="model"),
    }.items():
        storage.upload(source, f"{world.base}/{name}", metadata)

    def listed(uri: str = world.base, **wanted: object) -> list[str]:
        found = storage.list(uri, **wanted)  # type: ignore[arg-type]
        return sorted(str(artifact.storage_path).removeprefix(f"{world.base}/") for artifact in found)

    everything = ["experiments-2/1", "experiments/dpo/1", "experiments/dpo/10", "experiments/ppo/1"]
    assert listed() == everything
    assert listed(prefix="exp") == everything
    assert listed(prefix="experiments/") == everything[1:]
    assert listed(prefix="experiments/dpo/1") == ["experiments/dpo/1", "experiments/dpo/10"]
    assert listed(prefix="experiments/dpo/1/") == ["experiments/dpo/1"]
    assert listed(f"{world.base}/experiments", prefix="p") == ["experiments/ppo/1"]
    assert listed(prefix="nothing") == []
    assert listed(prefix="experiments/", job_name="dpo") == ["experiments/dpo/1", "experiments/dpo/10"]
    assert listed(tags={"experiment": "production"}) == ["experiments/dpo/1", "experiments/ppo/1"]
    assert listed(tags={"experiment": "production", "a": "1"}) == ["experiments/dpo/1"]
    assert listed(labels={"app": "x"}) == ["experiments/dpo/10"]
    assert listed(step=10) == ["experiments/dpo/10"]
    assert listed(artifact_type="model") == ["experiments-2/1"]
    assert listed(artifact_type="model", algorithm="ppo") == []


def test_a_list_goes_on_where_somebody_elses_marker_lies(world: World, source: Path) -> None:
    storage = world.manager()
    storage.upload(source, f"{world.base}/a")
    world.put("b/.metadata.json", b"not ours")
    storage.upload(source, f"{world.base}/c")
    assert [str(found.storage_path).rpartition("/")[2] for found in storage.list(world.base)] == ["a", "c"]


def test_an_artifact_is_listed_where_it_is_and_not_where_it_was_written(tmp_path: Path, source: Path) -> None:
    storage, home = StorageManager(), tmp_path.resolve()
    storage.upload(source, home / "runs" / "before")
    os.rename(home / "runs" / "before", home / "runs" / "after")
    (found,) = storage.list(home / "runs")
    assert found.storage_path == f"file://{home}/runs/after"
    assert storage.verify(found.storage_path) == found


def test_a_list_can_be_left_and_cancelled(world: World, source: Path) -> None:
    storage, stop = world.manager(), threading.Event()
    for number in range(3):
        storage.upload(source, f"{world.base}/{number}")
    found = storage.list(world.base, cancelled=stop)
    next(found)
    stop.set()
    with pytest.raises(Cancelled):
        next(found)
    left = storage.list(world.base)
    next(left)
    left.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("list")]


# ---- Cancellation


def cancel_at_first_bytes(stop: Callable[[], None]) -> Callable[[Progress], None]:
    return lambda progress: stop() if progress.bytes_total else None


def test_a_cancelled_upload_leaves_nothing_visible_and_nothing_open(world: World, big: Path) -> None:
    stop = threading.Event()
    with pytest.raises(Cancelled):
        world.manager().upload(big, f"{world.base}/run", progress=cancel_at_first_bytes(stop.set), cancelled=stop)
    assert_invisible(world)
    uri = world.manager().upload(big, f"{world.base}/run")
    assert world.manager().verify(uri).size_bytes == BIG + 2


@pytest.mark.usefixtures("sequential")
def test_what_a_cancelled_upload_leaves_is_seen_by_nobody_and_removed_by_one_call(world: World, big: Path) -> None:
    storage, uri = world.manager(), f"{world.base}/run"
    make(big, {f"a/{number}": b"whole" for number in range(4)})
    with pytest.raises(Cancelled):
        storage.upload(big, uri, cancelled=OnLook(4 + 3))  # four whole files, and two pieces of the next one
    assert_invisible(world)
    with refused(Reason.NOT_FOUND):
        storage.download(uri, world.work / "restored")
    assert not (world.work / "restored").exists()
    if world.is_bucket:
        assert [path for path in world.paths() if path.startswith("run/a/")] == [f"run/a/{number}" for number in range(4)]
        with refused(Reason.EARLIER_MOVER_NOT_GONE):
            storage.delete(uri)
    storage.delete(uri, force=True)
    assert world.paths() == []
    assert_invisible(world)


def test_a_cancelled_download_or_verification_leaves_nothing_that_looks_like_the_artifact(world: World, big: Path) -> None:
    storage = world.manager()
    uri = storage.upload(big, f"{world.base}/run")
    stop, restored = threading.Event(), world.work / "restored"
    with pytest.raises(Cancelled):
        storage.download(uri, restored, progress=cancel_at_first_bytes(stop.set), cancelled=stop)
    assert not restored.exists()
    with pytest.raises(Cancelled):
        storage.verify(uri, progress=cancel_at_first_bytes(stop.set), cancelled=stop)
    storage.download(uri, restored)
    assert (restored / "model.bin").stat().st_size == BIG


def test_a_call_that_is_cancelled_before_it_begins_does_nothing(world: World, source: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        world.manager().upload(source, f"{world.base}/run", cancelled=stop)
    assert world.paths() == []


async def test_a_cancelled_task_ends_only_when_its_thread_has_ended(world: World, big: Path) -> None:
    storage, loop = AsyncStorageManager(world.manager()), asyncio.get_running_loop()
    under_way = asyncio.Event()
    report = cancel_at_first_bytes(lambda: loop.call_soon_threadsafe(under_way.set))
    task = asyncio.create_task(storage.upload(big, f"{world.base}/run", progress=report))
    await under_way.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # once more, while it waits for its thread
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("transfer")]
    assert_invisible(world)


async def test_a_timeout_ends_a_download_and_the_next_one_succeeds(world: World, big: Path) -> None:
    storage = AsyncStorageManager(world.manager())
    uri = await storage.upload(big, f"{world.base}/run")
    restored = world.work / "restored"
    loop = asyncio.get_running_loop()

    async def download_until_the_deadline() -> None:
        async with asyncio.timeout(None) as deadline:
            report = cancel_at_first_bytes(lambda: loop.call_soon_threadsafe(deadline.reschedule, loop.time()))
            await storage.download(uri, restored, progress=report)

    with pytest.raises(TimeoutError):
        await download_until_the_deadline()
    assert not restored.exists()
    assert await storage.verify(uri) == await storage.download(uri, restored)


async def test_a_call_that_waits_for_its_turn_is_cancelled_without_ever_beginning(world: World, source: Path) -> None:
    storage, busy = AsyncStorageManager(world.manager()), threading.Event()
    blockers = [storage._threads.submit(busy.wait) for _ in range(storage._threads._max_workers)]
    task = asyncio.create_task(storage.upload(source, f"{world.base}/run"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    busy.set()
    assert all(blocker.result() for blocker in blockers)
    assert world.paths() == []


async def test_a_list_is_an_async_iterator_that_can_be_left(world: World, source: Path) -> None:
    storage = AsyncStorageManager(world.manager())
    for number in range(3):
        await storage.upload(source, f"{world.base}/{number}", ArtifactMetadata(step=number))
    assert [found.step async for found in storage.list(world.base)] == [0, 1, 2]
    assert [found.step async for found in storage.list(world.base, step=1)] == [1]
    async with aclosing(storage.list(world.base)) as found:
        async for artifact in found:
            assert artifact.step == 0
            break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("list")]


def test_ctrl_c_ends_an_upload_as_a_cancellation_does(world: World, big: Path) -> None:
    script = textwrap.dedent(
        """
        import signal, sys
        from checkpoint_operator.storage import StorageManager, TargetOptions
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        said = []
        def say(progress):
            if progress.bytes_total and not said:
                said.append(print("under way", flush=True))
                sys.stdin.read()
        try:
            StorageManager(TargetOptions.model_validate_json(sys.argv[1])).upload(sys.argv[2], sys.argv[3], progress=say)
        except KeyboardInterrupt:
            sys.exit(130)
        """
    )
    command = [sys.executable, "-c", script, world.options.model_dump_json(by_alias=True), str(big), f"{world.base}/run"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"under way\n"
        child.send_signal(signal.SIGINT)
        child.stdin.close()
        assert child.wait(60) == 130
    assert_invisible(world)


# ---- The page


PAGES = [REPOSITORY / "docs" / "library.md", REPOSITORY / "docs" / "commit.md", REPOSITORY / "README.md"]


@pytest.fixture(scope="module")
def bucket(object_store: lc.ObjectStore) -> None:
    client = object_store.client()
    client.create_bucket(Bucket="bucket")
    client.close()


@pytest.fixture
def newcomer(object_store: lc.ObjectStore, bucket: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads the page: a checkpoint in the working directory, a bucket called "bucket", keys in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", object_store.endpoint)
    monkeypatch.delenv("RLHF_STORAGE_PATH", raising=False)
    monkeypatch.setattr(manager, "_managers", {})
    home = tmp_path / "home"
    for name in ("checkpoint-1000", "outputs/checkpoint-1000"):
        shutil.copytree(CHECKPOINT, home / name)
    monkeypatch.chdir(home)


@pytest.mark.usefixtures("newcomer")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_of_the_page_runs_and_prints_what_it_says(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = StorageManager()
    for left in storage.list("s3://bucket"):
        storage.delete(str(left.storage_path))
    if page.name == "commit.md":
        storage.upload("checkpoint-1000", "s3://bucket/runs/dpo/checkpoint-1000")
    names: dict[str, object] = {"__name__": "page"}
    examples = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert examples
    for example in examples:
        exec(compile(example, page.name, "exec"), names)  # noqa: S102 - the page is ours
        printed = capsys.readouterr().out
        for line in re.findall(r"print\(.*\)  # (.*)$", example, re.MULTILINE):
            assert line in printed
