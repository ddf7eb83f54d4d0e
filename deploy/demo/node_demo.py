"""The demo on a whole node: Helm installs the operator, a training Job writes and says 'saved', a mover Job stores."""

import json
import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from place import NAMESPACE, DemoError
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
)

import local_cluster as lc
from checkpoint_operator.storage import StorageError
from local_cluster.helm import ensure_helm
from local_cluster.image import TAG, ensure_image
from local_cluster.operator_process import ROOT, kubectl

RELEASE, SYSTEM = "checkpoint-operator", "checkpoint-system"
CHART = ROOT / "charts" / "checkpoint-operator"
TRAINER = 1000
"""The user of the training; whoever it is, its files are its own (mode 0600)."""


def show(stack: ExitStack) -> Shown:
    """Raises NodeUnavailable or ImageUnavailable before anything is started where this machine cannot."""
    say("the operator's image, a Kubernetes with a node, Helm (built once, which takes about fourteen minutes)")
    archive = ensure_image(detail)
    helm = ensure_helm(detail)
    cluster = stack.enter_context(lc.start_node(1, name="demo", images=[archive], say=detail))
    say("S3 (SeaweedFS)")
    store = stack.enter_context(lc.start_object_store("demo-s3", address=cluster.host_address))
    store.client().create_bucket(Bucket=BUCKET)
    # In the cluster's own folder, which goes with it, however this process ends.
    folder = cluster.volumes.parent / "demo"
    folder.mkdir()
    try:
        install(cluster, store, helm, folder)
        say(
            "the namespace 'demo' (Pod Security: restricted): a claim, the store's keys, an account that may create, no more"
        )
        prepare(cluster, store)
        say("a training Job writes a checkpoint into the claim, and says 'saved': it creates a CheckpointArtifact")
        print((HERE / "artifact.yaml").read_text())
        kubectl(cluster, "apply", "-f", str(HERE / "training.yaml"))
        kubectl(cluster, "wait", "--for=condition=Complete", "job/dpo-llama", "-n", NAMESPACE, "--timeout=120s")
        status = watch_until_ready(cluster, lambda: time.sleep(0.2))
        show_events(cluster)
        show_status(status)
        show_bucket(store)
        prove(store, status, folder, SAMPLE)
    except (DemoError, lc.LocalClusterError, StorageError, BotoCoreError, ClientError) as error:
        command = ("logs", f"deployment/{RELEASE}", "-n", SYSTEM, "--tail=15")
        tail = kubectl(cluster, *command, check=False).stdout
        shown = f"\nthe end of the operator's log:\n{tail}" if tail else ""
        raise DemoError(f"{error}{shown}") from error
    log = f"kubectl logs deployment/{RELEASE} -n {SYSTEM}"
    hint = f"More checkpoints go into {cluster.volumes / 'dpo-output'}; `{log}` shows the operator's log."
    return Shown(cluster, [store, cluster], None, hint)


def install(cluster: lc.Cluster, store: lc.ObjectStore, helm: Path, folder: Path) -> None:
    """What a platform engineer types."""
    repository, _, tag = TAG.partition(":")
    values = {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        # Else an artifact could have the store's keys sent anywhere.
        "movers": {"allowedEndpoints": [store.endpoint]},
    }
    (folder / "values.json").write_text(json.dumps(values))
    say(f"$ helm install {RELEASE} {CHART.relative_to(ROOT)} -n {SYSTEM} --create-namespace --values values.json")
    detail(f"values.json: {json.dumps(values)}")
    done = subprocess.run(
        [
            *(str(helm), "install", RELEASE, str(CHART), "-n", SYSTEM, "--create-namespace", "--wait", "--timeout=150s"),
            f"--values={folder / 'values.json'}",
        ],
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "KUBECONFIG": str(cluster.kubeconfig),
            **{name: str(folder / "helm") for name in ("HOME", "HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")},
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DemoError(f"helm install: {done.stdout}{done.stderr}")


def prepare(cluster: lc.NodeCluster, store: lc.ObjectStore) -> None:
    """What an admin gives a team (docs/install.md), and the sample that stands in for what a training computes."""
    volume = cluster.volumes / "dpo-output"
    volume.mkdir()
    os.chown(volume, TRAINER, TRAINER)
    strict = {"pod-security.kubernetes.io/enforce": "restricted"}
    size, disk = {"storage": "1Gi"}, {"accessModes": ["ReadWriteOnce"], "storageClassName": "by-hand"}
    trainer = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": f"{RELEASE}-trainer"}
    bodies: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": strict}},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "dpo-output"},
            "spec": {**disk, "capacity": size, "hostPath": {"path": str(volume)}},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "dpo-output", "namespace": NAMESPACE},
            "spec": {**disk, "resources": {"requests": size}, "volumeName": "dpo-output"},
        },
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "bucket-keys", "namespace": NAMESPACE},
            "stringData": {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "store", "namespace": NAMESPACE},
            "data": {"STORE_ENDPOINT": store.endpoint, "STORE_REGION": store.region},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trainer", "namespace": NAMESPACE}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "checkpoint-trainer", "namespace": NAMESPACE},
            "roleRef": trainer,
            "subjects": [{"kind": "ServiceAccount", "name": "trainer", "namespace": NAMESPACE}],
        },
    ]
    kubectl(cluster, "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": bodies}))
    files = (HERE / "training.py", HERE / "artifact.yaml", *(path for path in SAMPLE.iterdir() if path.is_file()))
    command = ("create", "configmap", "training", "-n", NAMESPACE)
    kubectl(cluster, *command, *(f"--from-file={path}" for path in files))
