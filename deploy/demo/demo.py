"""Shows the main job, end to end, on a real Kubernetes and a real S3: what `make demo` runs."""

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import inline_demo
import node_demo
from botocore.exceptions import BotoCoreError, ClientError
from place import NAMESPACE, DemoError, Place
from show import NAME, Shown, detail, say

import local_cluster as lc
from checkpoint_operator.storage import StorageError
from local_cluster.detached import exports
from local_cluster.image import ImageUnavailable
from local_cluster.paths import cache_root, private_file
from local_cluster.session import stop_recorded

INTRODUCTION = """\
A checkpoint that a real DPO training wrote goes from a volume to an S3 bucket, because a CheckpointArtifact is created.
Kubernetes, S3 and the operator are real and run on this machine. Ctrl-C stops them at any moment.
"""


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
    shown = _on_a_node(stack) or inline_demo.show(stack)
    if not keep:
        say("done; stopping everything")
        return
    for part in shown.parts:
        part.detach()
    states = [str(part.state_dir) for part in shown.parts]
    record = {"states": states, "place": shown.place.record() if shown.place else None}
    _kept_folder().mkdir(parents=True, exist_ok=True)
    private_file(_kept_folder() / f"{Path(states[0]).name}.json", json.dumps(record))
    stack.pop_all()
    print(f"""
Everything is still running. Look around:

{exports(shown.cluster)}

kubectl get ckpt -n {NAMESPACE} -o wide
kubectl describe ckpt {NAME} -n {NAMESPACE}
kubectl explain checkpointartifact.spec.source

{shown.hint}
`make demo-down` stops it all.""")


def _on_a_node(stack: ExitStack) -> Shown | None:
    """None where there can be no node, or none is wanted (NODE=0)."""
    if os.environ.get("NODE") == "0":
        return None
    try:
        return node_demo.show(stack)
    except (lc.NodeUnavailable, ImageUnavailable) as error:
        say("no node can run here, so the operator runs movers as its own processes")
        detail(f"({error})")
        return None


def _kept_folder() -> Path:
    return cache_root() / "demo"


def down() -> int:
    """Stop every demo that was kept; how many there were."""
    records = sorted(_kept_folder().glob("*.json"))
    for path in records:
        kept = json.loads(path.read_text())
        if kept["place"]:
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
