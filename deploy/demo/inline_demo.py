"""The demo where no node can run: movers are the operator's own processes, and a folder stands in for the volume."""

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError
from place import NAMESPACE, DemoError, Place
from show import (
    BUCKET,
    HERE,
    SAMPLE,
    Shown,
    detail,
    prove,
    say,
    show_bucket,
    show_events,
    show_status,
    watch_until_ready,
    write_keys,
)

import local_cluster as lc
from checkpoint_operator.storage import StorageError
from local_cluster.operator_process import kubectl, operator_command
from local_cluster.paths import new_run_dir
from local_cluster.processes import log_tail
from local_cluster.session import Session


def prepare_volume(folder: Path) -> Path:
    """A folder that stands in for the mounted volume, with a checkpoint on it."""
    volume = folder / "volume"
    volume.mkdir()
    shutil.copytree(SAMPLE, volume / SAMPLE.name)
    return volume


def start_operator(cluster: lc.Cluster, store: lc.ObjectStore, session: Session) -> None:
    folder = session.state_dir
    target = {
        "prefix": f"s3://{BUCKET}/experiments",
        "endpoint": store.endpoint,
        "region": store.region,
        "forcePathStyle": True,
        "credentialsDirectory": str(write_keys(store, folder)),
    }
    claim = {"namespace": NAMESPACE, "claim": "dpo-output", "directory": str(folder / "volume"), "targets": [target]}
    command = operator_command(cluster, folder, [claim])
    session.start("operator", command.argv, env=command.env)


def show(stack: ExitStack) -> Shown:
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
        status = watch_until_ready(cluster, partial(session.check, pause=0.2))
        show_events(cluster)
        show_status(status)
        show_bucket(store)
        prove(store, status, session.state_dir, volume / SAMPLE.name)
    except (DemoError, lc.LocalClusterError, StorageError, BotoCoreError, ClientError) as error:
        # The folder with the log goes with the demo, so its end is shown now.
        tail = log_tail(session.log("operator")) if session.log("operator").exists() else ""
        shown = f"\nthe end of the operator's log:\n{tail}" if tail and tail not in str(error) else ""
        raise DemoError(f"{error}{shown}") from error
    hint = f"More checkpoints go into {volume}, the operator's log is {session.log('operator')}."
    return Shown(cluster, [part for part in (session, store, cluster) if part.state_dir], place, hint)
