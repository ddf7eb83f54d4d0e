"""How fast is the transfer engine, and what does it cost, beside the clients that people use today?

Every run is a process of its own, from fork to exit, so that start-up counts; the clients take turns, round by round in
another order, so that a slow moment of the machine meets all of them. Ours is the mover with a plan (and the library's
download): it hashes, verifies and commits, and there is no other engine for benchmarks. The others verify less or nothing.
The target is on this machine and shares its cores. After each run it is checked that the bytes are where they belong;
nothing is asserted about time. `docs/benchmarks.md` says how to read it.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bars import Bar
from measure import Cost, RunFailed, measure
from peers import BENCH_VENV, CLIENTS, FLOOR, Job
from targets import TARGETS, USUAL, Target

from checkpoint_operator.api.names import MARKER_NAME

RESULTS = Path(__file__).parent / "results" / "transfer.json"
MIB = 1 << 20
SMALL = 64 << 10
NEEDED = 6 << 30
"""Bytes that must be free in the folder: a source, and what a download makes of it, and room."""


@dataclass(frozen=True)
class Work:
    """So many files of so many bytes each, and so many ``small`` ones before them, in one direction."""

    count: int
    size: int
    download: bool = False
    small: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """By name."""
        small = {f"a-small-{number:05}.bin": SMALL for number in range(self.small)}
        return small | {f"file-{number:05}.bin": self.size for number in range(self.count)}

    def make(self, folder: Path, *, sparse: bool) -> None:
        """Random content, or (``sparse``) zeros that take no room."""
        folder.mkdir()
        for name, size in self.sizes().items():
            with (folder / name).open("wb") as file:
                if sparse:
                    file.truncate(size)
                    continue
                for start in range(0, size, MIB):
                    file.write(os.urandom(min(MIB, size - start)))


WORKS = {
    "upload_1gib": Work(1, 1 << 30),
    "download_1gib": Work(1, 1 << 30, download=True),
    "upload_5000x64k": Work(5000, 64 << 10),
    "download_5000x64k": Work(5000, 64 << 10, download=True),
}
MEMORY_WORKS = {
    "memory_10gib_sparse": Work(1, 10 << 30),
    "memory_50000_files": Work(50_000, 1 << 10),
    "memory_100x32mib": Work(100, 32 << 20),
    "memory_mixed": Work(60, 12 << 20, small=3000),
}


@dataclass(frozen=True)
class Row:
    """One line of the results. ``peak_rss_mb`` is the highest of the rounds, ``cpu_s_per_gb`` their median (10^9 bytes)."""

    work: str
    target: str
    client: str
    median_s: float
    min_s: float
    max_s: float
    ratio_to_s5cmd: float | None
    cpu_s_per_gb: float
    peak_rss_mb: float

    @classmethod
    def of(cls, work: str, size: int, target: str, client: str, costs: Collection[Cost], s5cmd: Collection[Cost]) -> "Row":
        walls = [cost.wall_s for cost in costs]
        median = statistics.median(walls)
        return cls(
            work,
            target,
            client,
            round(median, 3),
            round(min(walls), 3),
            round(max(walls), 3),
            round(median / statistics.median(cost.wall_s for cost in s5cmd), 3) if s5cmd else None,
            round(statistics.median(cost.cpu_s for cost in costs) / (size / 1e9), 3),
            round(max(cost.rss_mb for cost in costs), 1),
        )

    def text(self) -> str:
        ratio = "" if self.ratio_to_s5cmd is None else f"{self.ratio_to_s5cmd:.2f}"
        return (
            f"{self.work:19} {self.target:9} {self.client:8} {self.median_s:8.2f} {self.min_s:8.2f} {self.max_s:8.2f}"
            f" {ratio:>8} {self.cpu_s_per_gb:9.2f} {self.peak_rss_mb:8.0f}"
        )


HEADER = (
    f"{'work':19} {'target':9} {'client':8} {'median s':>8} {'min s':>8} {'max s':>8}"
    f" {'/ s5cmd':>8} {'CPU s/GB':>9} {'RSS MB':>8}"
)


@dataclass(frozen=True)
class Bench:
    """One target, and a folder of which everything is removed at the end."""

    target: Target
    folder: Path
    failures: list[str]
    """One sentence for each run that failed; its client is left out of the rest of that work."""

    def compare(self, name: str, work: Work, clients: list[str], rounds: int) -> list[Row]:
        costs: dict[str, list[Cost]] = {client: [] for client in clients}
        bucket = name.replace("_", "-")
        # The sink serves zeros whatever it was sent.
        with self._source(work, sparse=work.download and self.target.ca is not None) as source:
            if work.download:
                self.target.make_bucket(bucket)
                self._run("ours", Job(self.target, False, source, bucket, "shared", self.folder), work)
            for number in range(rounds):
                turn = number % len(clients)
                for client in clients[turn:] + clients[:turn]:
                    if client not in costs:
                        continue
                    try:
                        if work.download:
                            cost = self._download(client, bucket, work)
                        else:
                            cost = self._upload(client, f"{bucket}-{client}-{number}", source, work)
                    except RunFailed as error:
                        self.failures.append(f"{name} {self.target.name} {client}: {error}")
                        del costs[client]
                        continue
                    costs[client].append(cost)
                    print(f"  {name} {self.target.name} round {number + 1} {client}: {cost.wall_s:.2f} s", flush=True)
            if work.download:
                self.target.remove_bucket(bucket)
        s5cmd = costs.get("s5cmd", [])
        return [Row.of(name, work.bytes, self.target.name, client, found, s5cmd) for client, found in costs.items()]

    def memory(self, name: str, work: Work) -> Row:
        """The mover alone, once."""
        with self._source(work, sparse=True) as source:
            cost = self._upload("ours", name.replace("_", "-"), source, work)
        return Row.of(name, work.bytes, self.target.name, "ours", [cost], [])

    @contextmanager
    def _source(self, work: Work, *, sparse: bool) -> Iterator[Path]:
        source = self.folder / "source"
        try:
            work.make(source, sparse=sparse)
            yield source
        finally:
            shutil.rmtree(source)

    def _upload(self, client: str, bucket: str, source: Path, work: Work) -> Cost:
        self.target.make_bucket(bucket)
        cost = self._run(client, Job(self.target, False, source, bucket, "checkpoint", self.folder), work)
        self.target.remove_bucket(bucket)
        return cost

    def _download(self, client: str, bucket: str, work: Work) -> Cost:
        destination = self.folder / "destination"
        destination.mkdir()
        try:
            return self._run(client, Job(self.target, True, destination, bucket, "shared", self.folder), work)
        finally:
            shutil.rmtree(destination)

    def _run(self, client: str, job: Job, work: Work) -> Cost:
        command = CLIENTS[client](job)
        cost = measure(command.argv, command.environment, self.folder / f"{client}.log")
        if job.download:
            found = {path.name: path.stat().st_size for path in job.folder.rglob("*") if path.is_file()}
        else:
            found = {key.removeprefix(f"{job.prefix}/"): size for key, size in self.target.sizes(job.bucket).items()}
        found.pop(MARKER_NAME, None)
        if found != work.sizes():
            raise RunFailed(
                f"{client} ended well, but {len(found)} files are there that are not the {work.count} of the source"
            )
        return cost


def make_room(parent: Path) -> Path:
    """A folder with the keys and an empty home, for every client."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-bench-", dir=parent))
    (folder / "home").mkdir()
    (folder / "keys").mkdir()
    return folder


def measurements(arguments: argparse.Namespace, failures: list[str]) -> Iterator[list[Row]]:
    for name in arguments.target or USUAL:
        folder = make_room(arguments.folder)
        try:
            with TARGETS[name]() as target:
                (folder / "keys" / "AWS_ACCESS_KEY_ID").write_text(target.access_key)
                (folder / "keys" / "AWS_SECRET_ACCESS_KEY").write_text(target.secret_key)
                yield from measure_target(arguments, Bench(target, folder, failures))
        finally:
            shutil.rmtree(folder)


def measure_target(arguments: argparse.Namespace, bench: Bench) -> Iterator[list[Row]]:
    works = [] if arguments.memory_only else arguments.work or list(WORKS)
    for name in works:
        has_floor = name == "download_1gib" and bench.target.ca is not None
        clients = [client for client in arguments.client or CLIENTS if client != FLOOR or has_floor]
        if not clients:
            continue
        try:
            yield bench.compare(name, WORKS[name], clients, arguments.rounds)
        except RunFailed as error:
            bench.failures.append(f"{name} {bench.target.name}: nothing to download: {error}")
    if not (arguments.memory or arguments.memory_only) or bench.target.ca is None:
        return
    for name, work in MEMORY_WORKS.items():
        try:
            yield [bench.memory(name, work)]
        except RunFailed as error:
            bench.failures.append(f"{name}: {error}")


def bars(rows: list[Row]) -> Iterator[Bar]:
    """What issue and design promise, as far as it was measured."""
    for mine in (row for row in rows if row.client == "ours"):
        others = {row.client: row for row in rows if (row.work, row.target) == (mine.work, mine.target) and row != mine}
        title = f"{mine.work}, {mine.target}: "
        floor, s5cmd = others.pop(FLOOR, None), others.get("s5cmd")
        if mine.work.startswith("memory"):
            yield Bar(title + "peak RSS", mine.peak_rss_mb, "MB", 150)
        elif mine.work == "download_1gib" and others:
            best = min(others.values(), key=lambda row: row.median_s)
            yield Bar(f"{title}to the best, {best.client}", mine.median_s / best.median_s, "x", 1.25, 1.0)
            if floor:
                yield Bar(f"{title}Python's floor to the best", floor.median_s / best.median_s, "x")
        elif s5cmd and mine.work == "upload_5000x64k":
            yield Bar(title + "to s5cmd", mine.median_s / s5cmd.median_s, "x", 1.0, 0.6)
        elif s5cmd and mine.work == "upload_1gib" and mine.target == "tls-sink":
            yield Bar(title + "to s5cmd", mine.median_s / s5cmd.median_s, "x", 1.1, 0.75)
            yield Bar(title + "CPU to s5cmd's", mine.cpu_s_per_gb / s5cmd.cpu_s_per_gb, "x", 1.0, 0.6)
        elif s5cmd:
            yield Bar(title + "to s5cmd", mine.median_s / s5cmd.median_s, "x")
        if not mine.work.startswith("memory"):
            yield Bar(title + "peak RSS", mine.peak_rss_mb, "MB", 150)


def fast_folder() -> Path:
    """Memory where there is enough, so that no disk is measured; else the temp dir."""
    memory = Path("/dev/shm")  # noqa: S108 - looked at for its room; what is made there is private
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= NEEDED:
        return memory
    return Path(tempfile.gettempdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", choices=WORKS, action="append", help="default: all of them")
    parser.add_argument("--target", choices=TARGETS, action="append", help=f"default: {' and '.join(USUAL)}")
    parser.add_argument("--client", choices=CLIENTS, action="append", help="default: all of them")
    parser.add_argument("--memory", action="store_true", help="also the mover's peak memory, against tls-sink")
    parser.add_argument("--memory-only", action="store_true", help="nothing but that")
    parser.add_argument("--folder", type=Path, default=fast_folder(), help="for sources and downloads; default: %(default)s")
    arguments = parser.parse_args()
    if not BENCH_VENV.exists():
        parser.error(f"{BENCH_VENV} is missing: `make bench-transfer` makes it")
    rows: list[Row] = []
    failures: list[str] = []
    for more in measurements(arguments, failures):
        rows += more
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"\n{os.cpu_count()} cores, {arguments.rounds} rounds, files in {arguments.folder}\n{HEADER}")
    print("\n".join(row.text() for row in rows) + "\n")
    print("\n".join(bar.row() for bar in bars(rows)))
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that targets are stopped and files removed
    sys.exit(main())
