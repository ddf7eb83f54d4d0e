"""How fast is the transfer engine, compared with the SDK's own upload of the same files in the same run?

Both write to one SeaweedFS on loopback, in turns. The peer is ``boto3``'s ``upload_file`` (s3transfer) with the same
part size and as many threads, without any of the promises: no claim, no create-only writes, no manifest, no verification.
So a ratio above 1 says what the promises cost. Times are the best of the rounds; nothing is asserted.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from boto3.s3.transfer import TransferConfig

import local_cluster as lc
from checkpoint_operator.storage import StorageManager, TargetOptions
from checkpoint_operator.storage.s3 import MIB, PART_SIZE
from checkpoint_operator.storage.transfer import DEFAULT_WORKERS

SCENARIOS: dict[str, list[int]] = {
    "one file of 256 MiB": [256 * MIB],
    "4 shards of 64 MiB and 12 small files": [64 * MIB] * 4 + [20_000] * 12,
    "200 files of 64 KiB": [64 * 1024] * 200,
}


def write_files(folder: Path, sizes: list[int]) -> None:
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"file-{number:04}.bin").write_bytes(os.urandom(size))


def best(rounds: int, *actions: Callable[[int], None]) -> list[float]:
    """The shortest time of each action, run in turns so that a slow moment of the machine meets all of them."""
    times = [float("inf")] * len(actions)
    for number in range(rounds):
        for index, action in enumerate(actions):
            started = time.perf_counter()
            action(number)
            times[index] = min(times[index], time.perf_counter() - started)
    return times


def compare(store: lc.ObjectStore, credentials: Path, folder: Path, name: str, rounds: int) -> str:
    sizes = SCENARIOS[name]
    source = folder / "source"
    write_files(source, sizes)
    slug = name.replace(" ", "-")
    ours_manager = StorageManager(
        TargetOptions(endpoint=store.endpoint, credentials_directory=str(credentials), force_path_style=True)
    )
    client = store.client()
    config = TransferConfig(
        multipart_threshold=PART_SIZE, multipart_chunksize=PART_SIZE, max_concurrency=DEFAULT_WORKERS, use_threads=True
    )

    def ours(number: int) -> None:
        ours_manager.upload(source, f"s3://bench/ours/{slug}/{number}")

    def peer(number: int) -> None:
        with ThreadPoolExecutor(DEFAULT_WORKERS) as pool:
            uploads = [
                pool.submit(
                    client.upload_file,
                    str(path),
                    "bench",
                    f"peer/{slug}/{number}/{path.name}",
                    ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                    Config=config,
                )
                for path in sorted(source.iterdir())
            ]
            for upload in uploads:
                upload.result()

    mine, theirs = best(rounds, ours, peer)
    shutil.rmtree(source)
    total = sum(sizes) / MIB
    return (
        f"{name:40} engine {mine:6.2f} s ({total / mine:5.0f} MiB/s)   boto3 {theirs:6.2f} s ({total / theirs:5.0f} MiB/s)"
        f"   ratio {mine / theirs:.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="default: all of them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, lc.start_object_store("bench") as store:
        folder = Path(name)
        credentials = folder / "keys"
        credentials.mkdir()
        (credentials / "AWS_ACCESS_KEY_ID").write_text(store.access_key)
        (credentials / "AWS_SECRET_ACCESS_KEY").write_text(store.secret_key)
        store.client().create_bucket(Bucket="bench")
        print(
            f"best of {arguments.rounds} rounds, {os.cpu_count()} cores; a ratio above 1: the engine takes longer than boto3"
        )
        for scenario in arguments.scenario or SCENARIOS:
            print(compare(store, credentials, folder, scenario, arguments.rounds), flush=True)
    return 0


if __name__ == "__main__":
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    sys.exit(main())
