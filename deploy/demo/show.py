"""What every form of the demo shows: the live table, the status, the bucket, and the proof that every byte came through."""

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from place import NAMESPACE, DemoError, Place

import local_cluster as lc
from checkpoint_operator.storage import StorageManager, TargetOptions
from local_cluster.operator_process import ROOT, kubectl
from local_cluster.paths import private_file

HERE = Path(__file__).resolve().parent
SAMPLE = ROOT / "tests" / "checkpoints" / "dpo-lora" / "checkpoint-2"
BUCKET = "checkpoints"
NAME = "dpo-llama-2"
PATIENCE = 120.0


@dataclass(frozen=True)
class Shown:
    """What runs when everything was shown. ``parts`` are detached when it is to be kept, in that order; ``place``: what the
    demo put into a cluster that was there before; ``hint``: where to go on."""

    cluster: lc.Cluster
    parts: Sequence[Any]
    place: Place | None
    hint: str


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def detail(text: str) -> None:
    print(f"    {text}", flush=True)


class Table:
    """kubectl's table, live: redrawn in place on a terminal, elsewhere printed again when something but the age changed."""

    def __init__(self) -> None:
        self._shown: list[str] = []

    def show(self, text: str) -> None:
        lines = text.splitlines()
        if [line.split()[:-1] for line in lines] == [line.split()[:-1] for line in self._shown]:
            return
        if sys.stdout.isatty() and self._shown:
            # A narrow terminal wraps the lines, and what is moved over are its rows.
            width = max(shutil.get_terminal_size().columns, 1)
            rows = sum(max(math.ceil(len(line) / width), 1) for line in self._shown)
            print(f"\x1b[{rows}A\x1b[J", end="")
        self._shown = lines
        print(text, end="", flush=True)


def watch_until_ready(cluster: lc.Cluster, pause: Callable[[], None]) -> dict[str, Any]:
    """Print the table until the artifact is Ready; its status. ``pause`` waits a moment, and raises if all is lost."""
    print(f"$ kubectl get checkpointartifacts -n {NAMESPACE}", flush=True)
    table, deadline = Table(), time.monotonic() + PATIENCE
    while True:
        # The status first: what the table shows then is at least as new.
        status = json.loads(kubectl(cluster, "get", "ckpt", NAME, "-n", NAMESPACE, "-o", "json").stdout).get("status", {})
        table.show(kubectl(cluster, "get", "checkpointartifacts", "-n", NAMESPACE).stdout)
        if status.get("phase") == "Ready":
            return dict(status)
        if status.get("phase") == "Failed":
            failure = status.get("failure", {})
            raise DemoError(f"the artifact failed: {failure.get('reason')}: {failure.get('message')}")
        if time.monotonic() > deadline:
            raise DemoError(f"the artifact is not Ready after {PATIENCE:.0f} s; its status: {json.dumps(status)}")
        pause()


def show_events(cluster: lc.Cluster) -> None:
    command = f"events -n {NAMESPACE} --for checkpointartifact/{NAME}"
    print(f"\n$ kubectl {command}\n{kubectl(cluster, *command.split()).stdout}", flush=True)


def show_status(status: dict[str, Any]) -> None:
    say("what its status says")
    for field in ("storageURI", "manifestDigest", "contentDigest"):
        print(f"{field + ':':16}{status[field]}")


def show_bucket(store: lc.ObjectStore) -> None:
    say(f"what the bucket '{BUCKET}' holds now (size, key)")
    for page in store.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page.get("Contents", []):
            print(f"{item['Size']:>10}  {item['Key']}")


def prove(store: lc.ObjectStore, status: dict[str, Any], folder: Path, original: Path) -> None:
    """Download through the library, to a new folder, and compare every byte with what the training wrote."""
    bucket, _, prefix = status["storageURI"].removeprefix("s3://").partition("/")
    manifest = store.client().get_object(Bucket=bucket, Key=f"{prefix}/.metadata.json")["Body"].read()
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    if digest != status["manifestDigest"]:
        raise DemoError(f"the manifest in the bucket has the digest {digest}, the status says {status['manifestDigest']}")
    say("the manifest in the bucket has the digest that the status names")

    say("downloading through the library to a new folder")
    restored = folder / "restored"
    options = TargetOptions(
        endpoint=store.endpoint, force_path_style=True, credentials_directory=str(write_keys(store, folder))
    )
    StorageManager(options).download(status["storageURI"], restored)
    expected, found = _contents(original), _contents(restored)
    if expected != found:
        differing = sorted(str(path) for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
        raise DemoError(f"the downloaded files differ from the training's: {', '.join(differing)}")
    size = sum(len(content) for content in found.values())
    say(f"compared {len(found)} files, {size} bytes: every byte is what the training wrote")


def write_keys(store: lc.ObjectStore, folder: Path) -> Path:
    """The store's keys as a credential profile."""
    keys = folder / "credentials"
    keys.mkdir(mode=0o700, exist_ok=True)
    private_file(keys / "AWS_ACCESS_KEY_ID", store.access_key)
    private_file(keys / "AWS_SECRET_ACCESS_KEY", store.secret_key)
    return keys


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
