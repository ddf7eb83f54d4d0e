"""Shows the main job, end to end, on a real Kubernetes and a real S3: what `make demo` runs."""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import local_cluster as lc
from checkpoint_operator.storage import StorageManager, TargetOptions
from local_cluster.operator_process import ROOT, install, kubectl, operator_command
from local_cluster.paths import cache_root, new_run_dir, private_file
from local_cluster.session import Session, stop_recorded

HERE = Path(__file__).resolve().parent
SAMPLE = ROOT / "tests" / "checkpoints" / "dpo-lora" / "checkpoint-2"
KEPT = "demo-kept.json"
BUCKET = "checkpoints"
NAMESPACE = "demo"
NAME = "dpo-llama-2"
PATIENCE = 120.0


class DemoError(Exception):
    """The demo did not show what it promised; the message has the evidence."""


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def shell(cluster: lc.Cluster, command: str) -> None:
    """Show a kubectl command as a person would type it, and what it prints."""
    print(f"$ kubectl {command}", flush=True)
    print(kubectl(cluster, *command.split()).stdout, flush=True)


class Table:
    """kubectl's table, live: redrawn in place on a terminal, printed again when something but the age changed elsewhere."""

    def __init__(self) -> None:
        self._shown: list[str] = []

    def show(self, text: str) -> None:
        lines = text.splitlines()
        if [line.split()[:-1] for line in lines] == [line.split()[:-1] for line in self._shown]:
            return
        if sys.stdout.isatty() and self._shown:
            print(f"\x1b[{len(self._shown)}A\x1b[J", end="")
        self._shown = lines
        print(text, end="", flush=True)


def prepare_volume(folder: Path) -> Path:
    """A folder that stands in for the mounted volume, with a checkpoint on it."""
    volume = folder / "volume"
    volume.mkdir()
    shutil.copytree(SAMPLE, volume / "checkpoint-2")
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


def remove_from(cluster: lc.Cluster) -> None:
    """Take what the demo made out of a cluster that stays, while the operator still runs and can let the object go."""
    kubectl(cluster, "delete", "ckpt", NAME, "-n", NAMESPACE, "--ignore-not-found", "--timeout=60s", check=False)
    kubectl(cluster, "delete", "namespace", NAMESPACE, "--wait=false", check=False)
    say("the namespace was removed again; the CRD and deploy/rbac.yaml stay installed")


def watch_until_ready(cluster: lc.Cluster, session: Session) -> dict[str, Any]:
    """Print the table until the artifact is Ready; its status."""
    print(f"$ kubectl get checkpointartifacts -n {NAMESPACE}", flush=True)
    table, deadline = Table(), time.monotonic() + PATIENCE
    while True:
        table.show(kubectl(cluster, "get", "checkpointartifacts", "-n", NAMESPACE).stdout)
        status = json.loads(kubectl(cluster, "get", "ckpt", NAME, "-n", NAMESPACE, "-o", "json").stdout).get("status", {})
        if status.get("phase") == "Ready":
            table.show(kubectl(cluster, "get", "checkpointartifacts", "-n", NAMESPACE).stdout)
            return dict(status)
        if status.get("phase") == "Failed" or time.monotonic() > deadline:
            log = session.log("operator").read_text(errors="replace")[-3000:]
            raise DemoError(f"the artifact did not become Ready: {json.dumps(status.get('failure', status))}\n{log}")
        session.check(pause=0.2)


def show_bucket(store: lc.ObjectStore) -> None:
    say(f"what the bucket '{BUCKET}' holds now")
    for page in store.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page.get("Contents", []):
            print(f"{item['Size']:>10}  {item['Key']}")


def prove(store: lc.ObjectStore, status: dict[str, Any], folder: Path, original: Path) -> None:
    """Download through the library, to a new folder, and compare every byte with what the training wrote."""
    restored = folder / "restored"
    options = TargetOptions(
        endpoint=store.endpoint, force_path_style=True, credentials_directory=str(folder / "credentials")
    )
    StorageManager(options).download(status["storageURI"], restored)
    expected = {path.relative_to(original): path.read_bytes() for path in original.rglob("*") if path.is_file()}
    found = {path.relative_to(restored): path.read_bytes() for path in restored.rglob("*") if path.is_file()}
    if expected != found:
        differing = sorted(str(path) for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
        raise DemoError(f"the downloaded files differ from the training's: {', '.join(differing)}")
    size = sum(len(content) for content in found.values())
    say(f"compared {len(found)} files, {size} bytes: every byte is what the training wrote")


def run(keep: bool) -> None:
    with ExitStack() as stack:
        say("Kubernetes (built once, which takes about nine minutes; seconds afterwards)")
        cluster = stack.enter_context(lc.start("demo", say=lambda text: print(f"    {text}", flush=True)))
        say("S3 (SeaweedFS)")
        store = stack.enter_context(lc.start_object_store("demo-s3"))
        store.client().create_bucket(Bucket=BUCKET)
        say("the CRD, the operator's rights, and a namespace with a claim (the folder below stands in for its volume)")
        install(cluster)
        kubectl(cluster, "create", "namespace", NAMESPACE)
        kubectl(cluster, "apply", "-f", str(HERE / "claim.yaml"))
        session = Session(new_run_dir("demo-operator"))
        stack.callback(session.stop)
        volume = prepare_volume(session.state_dir)
        say("a checkpoint that a real DPO training (TRL with LoRA) wrote lies on the volume: checkpoint-2")
        say("the operator, with the rights of its service account")
        start_operator(cluster, store, session)
        if cluster.provider == "existing":
            stack.callback(remove_from, cluster)
        say("the training says 'saved': it creates a CheckpointArtifact")
        print((HERE / "artifact.yaml").read_text())
        kubectl(cluster, "apply", "-f", str(HERE / "artifact.yaml"))
        status = watch_until_ready(cluster, session)
        print()
        say("what its status says")
        for field in ("storageURI", "manifestDigest", "contentDigest"):
            print(f"{field + ':':16}{status[field]}")
        show_bucket(store)
        prove(store, status, session.state_dir, volume / "checkpoint-2")
        if not keep:
            say("done; stopping everything")
            return
        for part in (cluster, store, session):
            part.detach()
        states = [str(part.state_dir) for part in (session, store, cluster) if part.state_dir]
        private_file(cache_root() / KEPT, json.dumps(states))
        stack.pop_all()
    print(f"""
Everything is still running. Look around:

export KUBECONFIG={cluster.kubeconfig}
export PATH={cluster.kubectl.parent}:$PATH

kubectl get ckpt -n {NAMESPACE} -o wide
kubectl describe ckpt {NAME} -n {NAMESPACE}
kubectl explain checkpointartifact.spec.source

More checkpoints go into {volume}, the operator's log is {session.log("operator")}.
`make demo-down` stops it all.""")


def down() -> bool:
    """Stop a demo that was kept; whether there was one."""
    kept = cache_root() / KEPT
    if not kept.exists():
        return False
    for state in json.loads(kept.read_text()):
        if Path(state).exists():
            stop_recorded(Path(state))
    kept.unlink()
    return True


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    # SIGINT too: whoever starts us in the background of a script has it ignored, and then Ctrl-C would leave things running.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    keep = os.environ.get("KEEP", "") not in ("", "0")
    try:
        if sys.argv[1:] == ["down"]:
            say("stopped the demo" if down() else "no demo was kept running")
            return 0
        if keep and down():
            say("stopped the demo that was kept earlier")
        run(keep)
    except KeyboardInterrupt:
        say("interrupted; everything was stopped")
        return 130
    except BrokenPipeError:
        # Nobody reads any more (`make demo | head`); everything was stopped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DemoError, lc.LocalClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
