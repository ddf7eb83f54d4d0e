"""One namespace of a user: claims, keys, trainings, artifacts, and what a user sees of them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fault_proxy import FaultProxy
from providers import Place
from watching import Body, Watch

import local_cluster as lc
from local_cluster.operator_process import kubectl

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "tests" / "checkpoints" / "dpo-lora" / "checkpoint-2"
TRAINING = Path(__file__).with_name("training.py")
BUCKET = "checkpoints"
TRAINER = 1234
"""The user of the trainings; none of ours, and not the mover's default."""
PATIENCE = 90.0
RETRY = "checkpoints.rlhf.dev/retry"
LABEL = "checkpoints.rlhf.dev/artifact-name"
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class Store:
    """The S3 of the suite. Pods reach it over a wire that can be cut, and that counts what is sent."""

    server: lc.ObjectStore
    wire: FaultProxy

    def objects(self, prefix: str) -> dict[str, bytes]:
        """What lies below a prefix, by the path below it."""
        client, found = self.server.client(), {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
            for item in page.get("Contents", []):
                content = client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()
                found[item["Key"].removeprefix(f"{prefix}/")] = content
        return found

    def uploads(self, prefix: str) -> list[str]:
        answer = self.server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=f"{prefix}/")
        return [upload["Key"] for upload in answer.get("Uploads", [])]


@dataclass
class Space:
    """``log`` gives the operator's last words, for messages of failed tests."""

    place: Place
    store: Store
    name: str
    log: Callable[[], str]
    _watches: dict[str, Watch] = field(default_factory=dict)
    _volumes: list[str] = field(default_factory=list)

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        return kubectl(self.place.cluster, "--namespace", self.name, *arguments, stdin=stdin, check=check)

    def apply(self, *bodies: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": bodies}))

    def create(self) -> None:
        """The namespace admits pods of the restricted profile; its trainings may create artifacts, and nothing else."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name, "labels": labels}})
        sample = {path.name: base64.b64encode(path.read_bytes()).decode() for path in SAMPLE.iterdir()}
        keys = {"AWS_ACCESS_KEY_ID": self.store.server.access_key, "AWS_SECRET_ACCESS_KEY": self.store.server.secret_key}
        account = {"kind": "ServiceAccount", "name": "trainer", "namespace": self.name}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "checkpoint-operator-trainer"}
        self.apply(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trainer"}},
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "sample"}, "binaryData": sample},
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket-keys"}, "stringData": keys},
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "RoleBinding",
                "metadata": {"name": "trainer"},
                "roleRef": role,
                "subjects": [account],
            },
        )
        self.watch("pods")  # so that :meth:`movers` knows them all
        self.until("serviceaccounts", lambda found: "default" in found, "the account of pods that name none")

    def close(self) -> None:
        for watch in self._watches.values():
            watch.stop()
        if not self.place.is_ours:
            self.kubectl("delete", "namespace", self.name, "--wait=false", check=False)
            if self._volumes:
                self.kubectl("delete", "pv", *self._volumes, "--wait=false", check=False)

    # Claims and trainings

    def claim(self, name: str, *, node: str | None = None, mode: str = "ReadWriteOnce") -> None:
        """A claim that the trainings' user may write to. ``node``: its volume is there alone."""
        size = {"storage": "1Gi"}
        spec: Body = {"accessModes": [mode], "resources": {"requests": size}}
        bodies: list[Body] = []
        if self.place.volumes is not None:
            folder = self.place.volumes / f"{self.name}-{name}"
            folder.mkdir()
            os.chown(folder, TRAINER, TRAINER)
            self._volumes.append(folder.name)
            volume: Body = {
                "accessModes": [mode],
                "storageClassName": "by-hand",
                "capacity": size,
                "hostPath": {"path": str(folder)},
                "claimRef": {"namespace": self.name, "name": name},
                "persistentVolumeReclaimPolicy": "Retain",
            }
            if node:
                here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
                volume["nodeAffinity"] = {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}}
            bodies.append(
                {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": folder.name}, "spec": volume}
            )
            spec |= {"storageClassName": "by-hand", "volumeName": folder.name}
        bodies.append({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec})
        self.apply(*bodies)

    def artifact(self, name: str, path: str, *, claim: str = "output", **spec: Any) -> Body:
        """The object that a training creates: into the bucket under our name, unless ``target`` says otherwise."""
        bucket = {
            "uri": f"s3://{BUCKET}/{self.name}/{name}",
            "endpoint": self.store.wire.endpoint,
            "region": lc.seaweedfs.REGION,
            "credentialsSecretRef": {"name": "bucket-keys"},
            "s3": {"forcePathStyle": True},
        }
        source = {
            "persistentVolumeClaim": {"claimName": claim},
            "path": path,
            # It has saved before it creates the object, so nobody need look twice.
            "readiness": {"stableSeconds": 0},
        }
        return {
            "apiVersion": "checkpoints.rlhf.dev/v1alpha1",
            "kind": "CheckpointArtifact",
            "metadata": {"name": name, "namespace": self.name},
            "spec": {"source": source, "target": spec.pop("target", bucket), **spec},
        }

    def train(
        self,
        saves: Mapping[str, str | Mapping[str, int]],
        *artifacts: Body,
        claim: str = "output",
        node: str | None = None,
        hold: bool = False,
        name: str = "training",
    ) -> None:
        """A Job writes these checkpoints as its own user, mode 0600, and creates the artifacts with its own account.

        Returns when it has ended, or with ``hold`` when it has done all that and goes on holding the volume.
        """
        task = {"saves": dict(saves), "artifacts": artifacts, "hold": hold}
        mounts = [{"name": "data", "mountPath": "/data"}, {"name": "sample", "mountPath": "/sample"}]
        volumes = [
            {"name": "data", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "sample", "configMap": {"name": "sample"}},
        ]
        self.job(name, [TRAINING.read_text(), json.dumps(task)], mounts, volumes, account="trainer", node=node)
        if hold:
            created = {body["metadata"]["name"] for body in artifacts}
            self.until("checkpointartifacts", lambda found: created <= found.keys(), "the training to create its artifacts")
        else:
            self.until("jobs", lambda found: _has(found.get(name), "Complete"), "the training to end")

    def job(
        self,
        name: str,
        program: Sequence[str],
        mounts: Sequence[Body],
        volumes: Sequence[Body],
        *,
        account: str = "default",
        node: str | None = None,
    ) -> None:
        """Run a Python program in our own image, as the trainings' user."""
        pod: Body = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 2,
            "serviceAccountName": account,
            "automountServiceAccountToken": account != "default",
            "securityContext": {"runAsUser": TRAINER, "runAsGroup": TRAINER},
            "containers": [
                {
                    "name": "main",
                    "image": self.place.image,
                    "imagePullPolicy": self.place.pull_policy,
                    "command": ["python3", "-c", *program],
                    "securityContext": RESTRICTED,
                    "volumeMounts": mounts,
                    "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"cpu": "2", "memory": "256Mi"}},
                }
            ],
            "volumes": volumes,
        }
        if node:
            pod["nodeSelector"] = {"kubernetes.io/hostname": node}
        spec = {"backoffLimit": 0, "template": {"spec": pod}}
        self.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec})

    def submit(self, *artifacts: Body) -> None:
        """Create them as a person does, long after the training."""
        self.kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": artifacts}))

    def end_training(self, name: str = "training") -> None:
        """One that held on ends well; its pod stays, as that of a Job does."""
        end = "import os, signal; os.kill(1, signal.SIGTERM)"
        self.kubectl("exec", f"job/{name}", "--", "python3", "-c", end)
        self.until("jobs", lambda found: _has(found.get(name), "Complete"), "the training to end")

    def forget_training(self, name: str = "training") -> None:
        """Its pod is gone afterwards, so that nobody tells any more whose the files are, and nobody holds the volume."""
        self.kubectl("delete", "job", name, "--cascade=foreground", "--timeout=60s")

    def digests(self, claim: str) -> dict[str, str]:
        """The SHA-256 of every file of a claim, by path, as a pod reads them."""
        program = (
            "import hashlib, json, pathlib; root = pathlib.Path('/data'); print(json.dumps({str(p.relative_to(root)): "
            "hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob('*') if p.is_file()}))"
        )
        mounts = [{"name": "data", "mountPath": "/data", "readOnly": True}]
        self.job("reader", [program], mounts, [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}])
        self.until("jobs", lambda found: _has(found.get("reader"), "Complete"), "the files to be read")
        digests: dict[str, str] = json.loads(self.kubectl("logs", "job/reader").stdout)
        return digests

    # What is seen

    def watch(self, kind: str) -> Watch:
        """Everything of that kind in this namespace, from the first call on."""
        if kind not in self._watches:
            cluster = self.place.cluster
            command = [str(cluster.kubectl), f"--kubeconfig={cluster.kubeconfig}", f"--namespace={self.name}", "get", kind]
            self._watches[kind] = Watch(command)
        return self._watches[kind]

    def until(self, kind: str, found: Callable[[dict[str, Body]], T | None], what: str, seconds: float = PATIENCE) -> T:
        """The first answer to a question about the objects of a kind; the assertion says what did not come."""
        answer = self.watch(kind).until(found, seconds)
        assert answer is not None, f"waited {seconds:.0f} s for {what}, in vain\n{self.report()}"
        return answer

    def status(self, name: str, ready: Callable[[Body], Any], what: str, seconds: float = PATIENCE) -> Body:
        """The status of an artifact once it is so."""

        def found(bodies: dict[str, Body]) -> Body | None:
            status: Body = bodies.get(name, {}).get("status", {})
            return status if ready(status) else None

        return self.until("checkpointartifacts", found, f"{name}: {what}", seconds)

    def phase(self, name: str, *phases: str, seconds: float = PATIENCE) -> Body:
        return self.status(name, lambda status: status.get("phase") in phases, f"phase {' or '.join(phases)}", seconds)

    def ready(self, *names: str, seconds: float = PATIENCE) -> Body:
        """The status of the last one, once all are Ready."""
        return [self.phase(name, "Ready", seconds=seconds) for name in names][-1]

    def waits(self, name: str, reason: str, *, phase: str = "Waiting", seconds: float = PATIENCE) -> str:
        """The message of the Ready condition, once it has that reason and the phase is so."""
        status = self.status(
            name,
            lambda status: status.get("phase") == phase and condition(status, "Ready").get("reason") == reason,
            f"phase {phase} with reason {reason}",
            seconds,
        )
        return str(condition(status, "Ready")["message"])

    def sends(self, name: str, at_least: int = 1) -> Body:
        """The status once the mover has said that so many bytes are stored, and that there are more."""
        return self.status(
            name,
            lambda status: at_least <= status.get("progress", {}).get("bytesDone", 0) < status["progress"]["bytesTotal"],
            f"{at_least} bytes of more on their way",
        )

    def gone(self, name: str, seconds: float = PATIENCE) -> None:
        self.until("checkpointartifacts", lambda found: name not in found, f"{name} to be gone", seconds)

    def movers(self, name: str) -> list[Body]:
        """Every mover's pod that an artifact ever had, as it was told last."""
        last = {body["metadata"]["uid"]: body for body in self.watch("pods").history if _label(body) == name}
        return list(last.values())

    def mover(self, name: str, ready: Callable[[Body], Any] = lambda pod: True, what: str = "a mover") -> Body:
        """The artifact's mover that is there now, once its pod is so."""

        def found(bodies: dict[str, Body]) -> Body | None:
            return next((body for body in bodies.values() if _label(body) == name and ready(body)), None)

        return self.until("pods", found, f"{name}: {what}")

    def without_jobs(self, *names: str) -> None:
        """Returns when no Job of these artifacts is left."""
        self.until("jobs", lambda found: not any(_label(body) in names for body in found.values()), "their Jobs to go")

    def patch(self, name: str, **spec: Any) -> None:
        self.kubectl("patch", "ckpt", name, "--type=merge", "--patch", json.dumps({"spec": spec}))

    def retry(self, *names: str) -> None:
        """As docs/failures.md says."""
        self.kubectl("annotate", "--overwrite", "ckpt", *names, f"{RETRY}=now-{os.urandom(4).hex()}")

    def objects(self, name: str) -> dict[str, bytes]:
        return self.store.objects(f"{self.name}/{name}")

    def uploads(self, name: str) -> list[str]:
        return self.store.uploads(f"{self.name}/{name}")

    def report(self) -> str:
        """What somebody who looks for the reason would ask for."""
        asked = (
            ("get", "ckpt,jobs,pods", "-o", "wide"),
            ("get", "ckpt", "-o", "jsonpath={range .items[*]}{.metadata.name}: {.status}{'\\n'}{end}"),
            ("get", "events", "--sort-by=.lastTimestamp"),
            ("logs", f"--selector={LABEL}", "--tail=15", "--prefix"),
        )
        said = [self.kubectl(*arguments, check=False) for arguments in asked]
        return "\n\n".join(one.stdout + one.stderr for one in said) + f"\n\nthe operator:\n{self.log()}"


def condition(status: Body, kind: str) -> Body:
    """A condition of a status; empty where there is none."""
    return next((item for item in status.get("conditions", []) if item["type"] == kind), {})


def sample_digests() -> dict[str, str]:
    return digests({path.name: path.read_bytes() for path in SAMPLE.iterdir()})


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _has(body: Body | None, kind: str) -> bool:
    return body is not None and condition(body.get("status", {}), kind).get("status") == "True"


def _label(body: Body) -> str | None:
    label: str | None = body["metadata"].get("labels", {}).get(LABEL)
    return label
