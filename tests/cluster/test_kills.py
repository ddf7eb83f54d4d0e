"""What nobody chose the moment of: kills, an API server that is away, names nobody thought of; checkpoints stay whole.

``KILLS_SEED=7 pytest tests/cluster/test_kills.py`` kills at other moments.
"""

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BUCKET, Operator
from fault_proxy import FaultProxy

import local_cluster as lc

MIB = 1 << 20
SEED = int(os.environ.get("KILLS_SEED", "20260714"))
ROUNDS, ARTIFACTS, KILLS = 4, 3, 8
KILLING_SECONDS = 8.0
"""In each round the kills come at random moments of this time; after it the round has peace to end."""
OUTAGE_SECONDS = 10.0


@pytest.fixture(autouse=True)
def _mended(proxy: FaultProxy) -> Iterator[None]:
    yield
    proxy.mend()


@pytest.fixture
def api(cluster: lc.Cluster) -> Iterator[FaultProxy]:
    """A wire to the API server; TLS goes through it, the certificate is for 127.0.0.1 on any port."""
    with FaultProxy(int(cluster.server.rpartition(":")[2])) as started:
        yield started


def seeded() -> random.Random:
    return random.Random(SEED)  # noqa: S311 - nothing is secret here, and it must be repeatable


def key_of(operator: Operator, name: str) -> str:
    return f"{operator.namespace}/proxied/{name}"


def create(operator: Operator, name: str, *, place: str | None = None, **more: Any) -> None:
    """Create an artifact that is stored through the wire that can be slowed down."""
    operator.create(name, uri=f"s3://{BUCKET}/{key_of(operator, place or name)}", **more)


def uid_of(operator: Operator, name: str) -> str:
    return str(operator.get(name)["metadata"]["uid"])


def assert_is_the_checkpoint(operator: Operator, name: str, files: dict[str, bytes], what: str, place: str = "") -> None:
    """One committed manifest of this artifact, every file that it lists is right, nothing else lies there."""
    key = key_of(operator, place or name)
    # A mover that is killed while it asks what the store can leaves its question there (docs/commit.md); it never counts.
    found = {path: data for path, data in operator.objects(key).items() if not path.startswith(".probe-")}
    manifest = json.loads(found.pop(".metadata.json"))
    assert manifest["state"] == "Committed", what
    assert manifest["artifactUID"] == uid_of(operator, name), what
    listed = {file["path"]: (file["size"], file["sha256"]) for file in manifest["table"]["files"]}
    assert listed == {path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in found.items()}, what
    assert found.keys() == files.keys(), what
    assert [path for path in files if found[path] != files[path]] == [], what
    assert operator.uploads(key) == [], what


def checkpoint(rng: random.Random, size: int) -> dict[str, bytes]:
    """A folder whose large file is stored in several parts."""
    return {
        "config.json": json.dumps({"seed": rng.random()}).encode(),
        "weights.bin": rng.randbytes(size),
        **{f"state/{number}.json": rng.randbytes(rng.randrange(1, 5000)) for number in range(4)},
    }


def kill_something(operator: Operator, rng: random.Random) -> str:
    """``kill -9`` a mover, or the operator, which is started again at once."""
    assert operator.process is not None
    assert operator.process.poll() is None, operator.log.read_text()[-3000:]
    wants_mover, choice = rng.random() < 0.5, rng.random()
    movers = sorted(operator.movers())
    if wants_mover and movers:
        os.kill(movers[int(choice * len(movers))], signal.SIGKILL)
        return "mover"
    operator.stop(signal.SIGKILL)
    operator.start()
    return "operator"


def test_whatever_is_killed_at_whatever_moment_every_artifact_ends_ready_and_whole(
    make_operator: Callable[[str], Operator], proxy: FaultProxy
) -> None:
    rng = seeded()
    operator = make_operator("kills")
    operator.flags = (*operator.flags, "--max-attempts=50")
    operator.start()
    saved: dict[str, dict[str, bytes]] = {}
    killed: Counter[str] = Counter()
    for number in range(ROUNDS):
        proxy.bytes_per_second = 14 * MIB  # each artifact's large file then takes one and a half to three seconds
        names = [f"kill-{number}-{letter}" for letter in "abc"[:ARTIFACTS]]
        for name in names:
            saved[name] = checkpoint(rng, rng.randrange(20 * MIB, 40 * MIB))
            operator.save(name, saved[name])
        moments = sorted(rng.uniform(0, KILLING_SECONDS) for _ in range(KILLS))
        began = time.monotonic()
        for name in names:
            create(operator, name)
        for moment in moments:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            killed[kill_something(operator, rng)] += 1
        for name in names:
            operator.wait(name, "Ready")
    what = f"KILLS_SEED={SEED}, killed {dict(killed)}"
    assert killed.total() == ROUNDS * KILLS, what
    assert min(killed["mover"], killed["operator"]) > 0, what
    for name, files in saved.items():
        assert operator.status(name)["phase"] == "Ready", f"{name}: {what}"
        assert_is_the_checkpoint(operator, name, files, f"{name}: {what}")
    listing = operator.store.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{operator.namespace}/")  # below one page
    expected = {f"{key_of(operator, name)}/{path}" for name in saved for path in (*saved[name], ".metadata.json")}
    assert {item["Key"] for item in listing["Contents"]} == expected, what
    assert operator.uploads(operator.namespace) == [], what
    assert "Traceback" not in operator.log.read_text(), what
    assert operator.stop() == 0


class MoverWatch:
    """Looks at the operator's movers all the time: how many worked for one artifact at once, and which there were."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mover watch", daemon=True)
        self.most_at_once: Counter[str] = Counter()
        self.seen: dict[str, set[int]] = {}

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            movers = self._operator.movers()
            self.most_at_once |= Counter(movers.values())
            for pid, uid in movers.items():
                self.seen.setdefault(uid, set()).add(pid)

    def __enter__(self) -> "MoverWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_an_api_server_that_is_away_for_ten_seconds_in_the_middle_of_uploads_costs_nothing_but_time(
    make_operator: Callable[[str], Operator], proxy: FaultProxy, api: FaultProxy
) -> None:
    rng = seeded()
    operator = make_operator("api-away")
    operator.api = api
    # One that ends while the API server is away, one about when it comes back, one after it.
    saved = {f"before-{size}": checkpoint(rng, size * MIB) for size in (32, 48, 64)}
    new = {f"during-{number}": checkpoint(rng, 20 * MIB) for number in range(3)}
    for name, files in {**saved, **new}.items():
        operator.save(name, files)
    proxy.bytes_per_second = 4 * MIB
    operator.start()
    before = proxy.forwarded
    for name in saved:
        create(operator, name)
    for name in saved:
        operator.wait(name, "Uploading")
    wait_for_bytes(operator, proxy, before)
    with MoverWatch(operator) as watch:
        api.cut()
        ends = time.monotonic() + OUTAGE_SECONDS
        for name in new:
            create(operator, name)
        time.sleep(max(0.0, ends - time.monotonic()))
        assert {operator.status(name).get("phase") for name in new} == {None}
        assert {operator.status(name)["phase"] for name in saved} == {"Uploading"}
        api.mend()
        ends = time.monotonic() + 60
        for name in {**saved, **new}:
            operator.wait(name, "Ready", seconds=max(1.0, ends - time.monotonic()))
    for name, files in {**saved, **new}.items():
        status, uid = operator.status(name), uid_of(operator, name)
        assert_is_the_checkpoint(operator, name, files, name)
        assert (status["launches"], status["attempts"]) == (1, 1), name
        assert (watch.most_at_once[uid], len(watch.seen[uid])) == (1, 1), name
    assert "Traceback" not in operator.log.read_text()
    assert operator.stop() == 0


def tear_off(operator: Operator, name: str) -> None:
    """Delete an artifact as an admin in a hurry does it, behind the operator's back."""
    operator.kubectl("delete", "ckpt", name, "--wait=false")
    operator.patch(name, {"metadata": {"finalizers": None}})
    operator.wait_gone(name)


def wait_for_bytes(operator: Operator, proxy: FaultProxy, before: int) -> None:
    """Until a part is on its way; what the status says comes only after a whole one."""
    deadline = time.monotonic() + 30
    while proxy.forwarded < before + 2 * MIB:
        assert time.monotonic() < deadline, operator.log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.parametrize("old_is", ["ready", "uploading"])
def test_an_artifact_of_the_same_name_that_came_while_the_watch_was_down_gets_its_own_content(
    make_operator: Callable[[str], Operator], proxy: FaultProxy, api: FaultProxy, old_is: str
) -> None:
    rng = seeded()
    operator = make_operator(f"twin-{old_is}")
    operator.api = api
    operator.start("--resync-seconds=10")
    old, new = checkpoint(rng, 40 * MIB), checkpoint(rng, 20 * MIB)
    operator.save("old", old)
    operator.save("new", new)
    if old_is == "uploading":
        proxy.bytes_per_second = 2 * MIB
    before = proxy.forwarded
    create(operator, "twin", path="old", place="old")
    if old_is == "uploading":
        wait_for_bytes(operator, proxy, before)
    else:
        operator.wait("twin", "Ready")
    old_uid = uid_of(operator, "twin")
    api.cut()
    tear_off(operator, "twin")
    create(operator, "twin", path="new", place="new")
    new_uid = uid_of(operator, "twin")
    api.mend()
    proxy.mend()
    status = operator.wait("twin", "Ready")
    assert new_uid != old_uid
    assert status["storageURI"] == f"s3://{BUCKET}/{key_of(operator, 'new')}"
    assert_is_the_checkpoint(operator, "twin", new, old_is, place="new")
    left = operator.objects(key_of(operator, "old"))
    marker = json.loads(left[".metadata.json"])
    assert marker["artifactUID"] == old_uid
    if marker["state"] == "Committed":
        assert {path: data for path, data in left.items() if path != ".metadata.json"} == old
    assert "Traceback" not in operator.log.read_text()
    assert operator.stop() == 0


def test_a_mover_whose_artifact_went_while_the_watch_was_down_is_stopped_by_the_resync(
    make_operator: Callable[[str], Operator], proxy: FaultProxy, api: FaultProxy
) -> None:
    operator = make_operator("vanished")
    operator.api = api
    operator.start("--resync-seconds=10")
    operator.save("vanished", checkpoint(seeded(), 100 * MIB))
    proxy.bytes_per_second = 2 * MIB
    before = proxy.forwarded
    create(operator, "vanished")
    wait_for_bytes(operator, proxy, before)
    api.cut()
    tear_off(operator, "vanished")
    api.mend()
    deadline = time.monotonic() + 30  # alone, it would upload for 50 s
    while operator.movers():
        assert time.monotonic() < deadline, operator.log.read_text()[-3000:]
        time.sleep(0.1)
    assert json.loads(operator.objects(key_of(operator, "vanished"))[".metadata.json"])["state"] == "Uploading"
    assert "Traceback" not in operator.log.read_text()
    assert operator.stop() == 0


@pytest.fixture(scope="module")
def operator(make_operator: Callable[[str], Operator]) -> Iterator[Operator]:
    started = make_operator("bad-input")
    started.claims[0]["targets"].append({"prefix": "gs://bucket/bad-input"})
    started.start()
    yield started
    assert "Traceback" not in started.log.read_text()
    assert started.stop() == 0


def with_fifo(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"{}")
    os.mkfifo(folder / "pipe")


def with_newline(folder: Path) -> None:
    (folder / "config\n.json").write_bytes(b"{}")


def with_file(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"{}")


def with_nothing(_: Path) -> None:
    """An empty folder."""


def with_empty_folders(folder: Path) -> None:
    (folder / "state" / "deep").mkdir(parents=True)


LONG_PATH = "/".join(["checkpoint"] * 91)[:1000]
LONG_NAME = "c" * 1000


@pytest.mark.parametrize(
    ("name", "fill", "spec", "reason", "says"),
    [
        ("fifo", with_fifo, {}, "SourceUnsupported", ("'pipe'", "FIFO", "remove it or exclude it")),
        ("empty", with_nothing, {}, "SourceEmpty", ("source.path 'bad-empty'", "source.include and source.exclude")),
        ("hollow", with_empty_folders, {}, "SourceEmpty", ("source.path 'bad-hollow'", "source.exclude")),
        (
            "newline",
            with_newline,
            {},
            "UnsupportedName",
            ("'config", "control character", "rename it or exclude it"),
        ),
        ("long-path", with_file, {"path": LONG_PATH}, "SourceNotFound", ("source.path 'checkpoint/", "does not exist")),
        ("long-name", with_file, {"path": LONG_NAME}, "SourceNotFound", ("source.path 'ccc", "too long")),
        (
            "google",
            with_file,
            {"uri": "gs://bucket/bad-input/google"},
            "CredentialsMissing",
            ("no credential profile", "this target"),
        ),
    ],
)
def test_bad_input_fails_with_a_message_that_names_the_value_and_the_way_out(
    operator: Operator, name: str, fill: Callable[[Path], None], spec: dict[str, Any], reason: str, says: tuple[str, ...]
) -> None:
    folder = operator.volume / f"bad-{name}"
    folder.mkdir()
    fill(folder)
    operator.create(name, **{"path": folder.name, **spec})
    status = operator.wait(name, "Failed")
    message = status["failure"]["message"]
    assert status["failure"]["reason"] == reason, message
    assert [word for word in says if word not in message] == [], message
    assert "\n" not in message
    assert "Traceback" not in json.dumps(status)
    assert ("Warning", reason) in {event[:2] for event in operator.events(name)}
    operator.kubectl("delete", "ckpt", name, "--wait=false")
    operator.wait_gone(name, seconds=10)
    assert operator.objects(f"bad-input/{name}") == {}


NFC, NFD = "\u00e9t\u00e9.bin", "e\u0301te\u0301.bin"


@pytest.mark.parametrize("scheme", ["s3", "file"])
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("unicode", {NFC: b"composed", NFD: b"decomposed", "重み/模型 😀.safetensors": b"w"}),
        ("long-ascii", {"n" * 251 + ".bin": b"ascii"}),
        ("long-utf8", {"\u00e9" * 127 + "x": b"255 bytes of UTF-8"}),
    ],
)
def test_unusual_names_are_stored_as_they_are(operator: Operator, scheme: str, name: str, files: dict[str, bytes]) -> None:
    name = f"{name}-{scheme}"
    operator.save(name, files)
    assert store(operator, name, name, scheme) == files


@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_a_single_file_is_stored_under_its_name(operator: Operator, scheme: str) -> None:
    operator.save(f"one-{scheme}", {"adapter.bin": b"weights", "other.bin": b"not asked for"})
    assert store(operator, f"one-{scheme}", f"one-{scheme}/adapter.bin", scheme) == {"adapter.bin": b"weights"}


def store(operator: Operator, name: str, path: str, scheme: str) -> dict[str, bytes]:
    """Have a path stored; what then lies at its place, without the manifest."""
    if scheme == "s3":
        operator.create(name, path=path)
    else:
        target = {"persistentVolumeClaim": {"claimName": "archive"}}
        operator.create(name, path=path, uri=f"file:///{name}", target=target)
    status = operator.wait(name, "Ready", "Failed")
    assert status["phase"] == "Ready", status["failure"]
    if scheme == "s3":
        found = operator.objects(f"bad-input/{name}")
    else:
        place = operator.archive / name
        found = {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}
    assert json.loads(found.pop(".metadata.json"))["state"] == "Committed"
    return found
