"""Shows the main job, end to end, on a real Kubernetes and a real S3: what `make demo` runs."""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from place import NAMESPACE, DemoError, Place

import local_cluster as lc
from checkpoint_operator.storage import StorageError, StorageManager, TargetOptions
from local_cluster.detached import exports
from local_cluster.operator_process import ROOT, kubectl, operator_command
from local_cluster.paths import cache_root, new_run_dir, private_file
from local_cluster.processes import log_tail
from local_cluster.session import Session, stop_recorded

HERE = Path(__file__).resolve().parent
SAMPLE = ROOT / "tests" / "checkpoints" / "dpo-lora" / "checkpoint-2"
BUCKET = "checkpoints"
NAME = "dpo-llama-2"
PATIENCE = 120.0
INTRODUCTION = """\
A checkpoint that a real DPO training wrote goes from a volume to an S3 bucket, because a CheckpointArtifact is created.
Kubernetes, S3 and the operator are real and run on this machine, as plain processes. Ctrl-C stops them at any moment.
"""


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


def prepare_volume(folder: Path) -> Path:
    """A folder that stands in for the mounted volume, with a checkpoint on it."""
    volume = folder / "volume"
    volume.mkdir()
    shutil.copytree(SAMPLE, volume / SAMPLE.name)
    return volume


def start_operator(cluster: lc.Cluster, store: lc.ObjectStore, session: Session) -> None:
    folder = session.state_dir
    keys = folder / "credentials"
    keys.mkdir(mode=0o700)
    private_file(keys / "AWS_ACCESS_KEY_ID", store.access_key)
    private_file(keys / "AWS_SECRET_ACCESS_KEY", store.secret_key)
    claim = {
        "namespace": NAMESPACE,
        "claim": "dpo-output",
        "directory": str(folder / "volume"),
        "targets": [
            {
                "prefix": f"s3://{BUCKET}/experiments",
                "endpoint": store.endpoint,
                "region": store.region,
                "forcePathStyle": True,
                "credentialsDirectory": str(keys),
            }
        ],
    }
    command = operator_command(cluster, folder, [claim])
    session.start("operator", command.argv, env=command.env)


def watch_until_ready(cluster: lc.Cluster, session: Session) -> dict[str, Any]:
    """Print the table until the artifact is Ready; its status."""
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
        session.check(pause=0.2)


def show_events(cluster: lc.Cluster) -> None:
    command = f"events -n {NAMESPACE} --for checkpointartifact/{NAME}"
    print(f"\n$ kubectl {command}\n{kubectl(cluster, *command.split()).stdout}", flush=True)


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
        endpoint=store.endpoint, force_path_style=True, credentials_directory=str(folder / "credentials")
    )
    StorageManager(options).download(status["storageURI"], restored)
    expected, found = _contents(original), _contents(restored)
    if expected != found:
        differing = sorted(str(path) for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
        raise DemoError(f"the downloaded files differ from the training's: {', '.join(differing)}")
    size = sum(len(content) for content in found.values())
    say(f"compared {len(found)} files, {size} bytes: every byte is what the training wrote")


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(keep: bool) -> None:
    print(INTRODUCTION, flush=True)
    with ExitStack() as stack:
        try:
            _show(stack, keep)
        finally:
            # Whatever follows is cleaning up: an impatient second Ctrl-C must not cut it short.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)


def _show(stack: ExitStack, keep: bool) -> None:
    say("Kubernetes (built once, which takes about nine minutes; seconds afterwards)")
    cluster = stack.enter_context(lc.start("demo", say=detail))
    say("S3 (SeaweedFS)")
    store = stack.enter_context(lc.start_object_store("demo-s3"))
    store.client().create_bucket(Bucket=BUCKET)
    session = Session(new_run_dir("demo-operator"))
    stack.callback(session.stop)
    try:
        volume = prepare_volume(session.state_dir)
        say("the CRD, the operator's rights, and the namespace 'demo' with the claim 'dpo-output'")
        place = Place.of(cluster)
        stack.callback(place.remove)  # before the operator is stopped: its finalizers need it
        place.make(HERE / "claim.yaml", detail)
        say(f"a checkpoint that a real DPO training (TRL with LoRA) wrote lies on the volume: {SAMPLE.name}")
        detail("(no provisioner here: the claim stays Pending, and a folder stands in for the volume that would be mounted)")
        say("the operator, with the rights of its service account")
        start_operator(cluster, store, session)
        say("the training says 'saved': it creates a CheckpointArtifact")
        print((HERE / "artifact.yaml").read_text())
        kubectl(cluster, "apply", "-f", str(HERE / "artifact.yaml"))
        status = watch_until_ready(cluster, session)
        show_events(cluster)
        say("what its status says")
        for field in ("storageURI", "manifestDigest", "contentDigest"):
            print(f"{field + ':':16}{status[field]}")
        show_bucket(store)
        prove(store, status, session.state_dir, volume / SAMPLE.name)
    except (DemoError, lc.LocalClusterError, StorageError, BotoCoreError, ClientError) as error:
        # The folder with the log goes with the demo, so its end is shown now.
        tail = log_tail(session.log("operator")) if session.log("operator").exists() else ""
        shown = f"\nthe end of the operator's log:\n{tail}" if tail and tail not in str(error) else ""
        raise DemoError(f"{error}{shown}") from error
    if not keep:
        say("done; stopping everything")
        return
    for part in (session, store, cluster):
        if part.state_dir:
            part.detach()
    states = [str(part.state_dir) for part in (session, store, cluster) if part.state_dir]
    record = {"states": states, "place": place.record()}
    _kept_folder().mkdir(parents=True, exist_ok=True)
    private_file(_kept_folder() / f"{session.state_dir.name}.json", json.dumps(record))
    stack.pop_all()
    print(f"""
Everything is still running. Look around:

{exports(cluster)}

kubectl get ckpt -n {NAMESPACE} -o wide
kubectl describe ckpt {NAME} -n {NAMESPACE}
kubectl explain checkpointartifact.spec.source

More checkpoints go into {volume}, the operator's log is {session.log("operator")}.
`make demo-down` stops it all.""")


def _kept_folder() -> Path:
    return cache_root() / "demo"


def down() -> int:
    """Stop every demo that was kept; how many there were."""
    records = sorted(_kept_folder().glob("*.json"))
    for path in records:
        kept = json.loads(path.read_text())
        Place.of_record(kept["place"]).remove()
        for state in map(Path, kept["states"]):
            if state.exists():
                stop_recorded(state)
        path.unlink(missing_ok=True)
    return len(records)


def main(arguments: list[str]) -> int:
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    keep = os.environ.get("KEEP", "") not in ("", "0")
    try:
        if arguments not in ([], ["down"]):
            raise DemoError(f"{' '.join(arguments)!r} is no command of the demo; there is one, 'down'")
        if arguments or keep:
            stopped = down()
            if arguments or stopped:
                say("stopped the demo that was kept running" if stopped else "no demo was kept running")
        if not arguments:
            run(keep)
    except BrokenPipeError:
        raise
    except (DemoError, lc.LocalClusterError, StorageError, BotoCoreError, ClientError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
