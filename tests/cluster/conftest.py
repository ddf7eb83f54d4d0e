"""A real API server, a real S3 and the operator of this checkout as a process, shared by the tests of this folder."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy

import local_cluster as lc
from local_cluster.operator_process import install, kubectl, operator_command

SAMPLE = Path(__file__).resolve().parents[1] / "checkpoints" / "dpo-lora" / "checkpoint-2"
BUCKET = "checkpoints"
FAST = ("--backoff-seconds=0.3", "--backoff-max-seconds=1", "--progress-seconds=1", "--shutdown-seconds=5")


@pytest.fixture(scope="session")
def cluster() -> Iterator[lc.Cluster]:
    with lc.start("tests", say=lambda _: None) as started:
        install(started)
        yield started


@pytest.fixture(scope="session")
def store() -> Iterator[lc.ObjectStore]:
    identities = [lc.Identity.read_only("reader")]
    with lc.start_object_store("tests-cluster", identities=identities) as started:
        started.client().create_bucket(Bucket=BUCKET)
        yield started


@pytest.fixture(scope="session")
def proxy(store: lc.ObjectStore) -> Iterator[FaultProxy]:
    """The same store behind a wire that can be cut and slowed down."""
    port = int(store.endpoint.rpartition(":")[2])
    with FaultProxy(port) as started:
        yield started


@dataclass
class Operator:
    """The operator's process, its volumes and its namespace."""

    cluster: lc.Cluster
    store: lc.ObjectStore
    namespace: str
    folder: Path
    claims: list[dict[str, Any]]
    flags: tuple[str, ...] = FAST
    process: subprocess.Popen[bytes] | None = None
    api: FaultProxy | None = None
    """A wire between the operator (not this test's kubectl) and the API server; set it before the start."""
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "operator.log"

    @property
    def volume(self) -> Path:
        return self.folder / "volume"

    @property
    def archive(self) -> Path:
        return self.folder / "archive"

    def start(self, *flags: str) -> None:
        command = operator_command(self.cluster, self.folder, self.claims, *self.flags, *flags)
        if self.api is not None:
            kubeconfig = Path(command.env["KUBECONFIG"])
            kubeconfig.write_text(kubeconfig.read_text().replace(self.cluster.server, f"https://127.0.0.1:{self.api.port}"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command.argv, env={**command.env, "PATH": os.environ["PATH"]}, stdout=log, stderr=log
            )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout=30)
        self.process = None
        return code

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        return kubectl(self.cluster, "-n", self.namespace, *arguments, stdin=stdin, check=check)

    def save(self, name: str, files: dict[str, bytes] | None = None) -> Path:
        """Write a checkpoint folder into the volume: the real sample, or these files."""
        folder = self.volume / name
        if files is None:
            shutil.copytree(SAMPLE, folder)
        else:
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
        return folder

    def create(self, name: str, *, path: str | None = None, uri: str | None = None, **spec: Any) -> None:
        target = {"uri": uri or f"s3://{BUCKET}/{self.namespace}/{name}", **spec.pop("target", {})}
        source = {"persistentVolumeClaim": {"claimName": "output"}, "path": path or name, **spec.pop("source", {})}
        body = {
            "apiVersion": "checkpoints.rlhf.dev/v1alpha1",
            "kind": "CheckpointArtifact",
            "metadata": {"name": name},
            "spec": {"source": source, "target": target, **spec},
        }
        self.kubectl("create", "-f", "-", stdin=json.dumps(body))

    def patch(self, name: str, patch: dict[str, Any]) -> None:
        self.kubectl("patch", "ckpt", name, "--type=merge", "-p", json.dumps(patch))

    def get(self, name: str) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.kubectl("get", "ckpt", name, "-o", "json").stdout)
        return body

    def status(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = self.get(name).get("status", {})
        return status

    def wait(self, name: str, *phases: str, seconds: float = 40) -> dict[str, Any]:
        """The status once the artifact is in one of these phases."""
        return self.until(name, lambda status: status.get("phase") in phases, f"phase {' or '.join(phases)}", seconds)

    def until(self, name: str, ready: Callable[[dict[str, Any]], bool], what: str, seconds: float = 40) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            status = self.status(name)
            if ready(status):
                return status
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{name}: waited {seconds} s for {what}; the status is {json.dumps(status, indent=1)}\n"
                    f"{self.log.read_text()[-3000:]}"
                )
            time.sleep(0.1)

    def wait_gone(self, name: str, seconds: float = 40) -> None:
        done = self.kubectl("wait", "--for=delete", f"ckpt/{name}", f"--timeout={seconds}s", check=False)
        assert done.returncode == 0, f"{done.stderr}\n{self.status(name)}\n{self.log.read_text()[-3000:]}"

    def objects(self, prefix: str) -> dict[str, bytes]:
        """What the store holds below a prefix, by the path below it."""
        client, found = self.store.client(), {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
            for item in page.get("Contents", []):
                found[item["Key"].removeprefix(f"{prefix}/")] = client.get_object(Bucket=BUCKET, Key=item["Key"])[
                    "Body"
                ].read()
        return found

    def uploads(self, prefix: str) -> list[str]:
        answer = self.store.client().list_multipart_uploads(Bucket=BUCKET, Prefix=f"{prefix}/")
        return [upload["Key"] for upload in answer.get("Uploads", [])]

    def events(self, name: str) -> list[tuple[str, str, str]]:
        """(type, reason, note) of every event of an artifact."""
        items = json.loads(self.kubectl("get", "events.events.k8s.io", "-o", "json").stdout)["items"]
        return [(item["type"], item["reason"], item["note"]) for item in items if item["regarding"]["name"] == name]

    def mover_pids(self) -> list[int]:
        """The movers that are children of the operator."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"checkpoint_operator.mover" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def movers(self) -> dict[int, str]:
        """The UID of the artifact that each mover of this operator works for, by the mover's process id."""
        found = {}
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
                for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    name, _, value = variable.partition(b"=")
                    if name == b"CHECKPOINT_PLAN":
                        found[int(pid)] = str(json.loads(value)["artifactUID"])
        return found


def profile(folder: Path, access_key: str, secret_key: str) -> str:
    """A credential profile: a folder with a file for each key."""
    folder.mkdir(parents=True)
    (folder / "AWS_ACCESS_KEY_ID").write_text(access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(secret_key)
    return str(folder)


@pytest.fixture(scope="session")
def make_operator(
    cluster: lc.Cluster, store: lc.ObjectStore, proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Operator]]:
    """Prepares (not starts) an operator with a namespace of its own; stops whatever is left at the end."""
    made: list[Operator] = []

    def make(namespace: str) -> Operator:
        folder = tmp_path_factory.mktemp(namespace)
        for name in ("volume", "archive"):
            (folder / name).mkdir()
        common = {"endpoint": store.endpoint, "forcePathStyle": True}
        admin = profile(folder / "keys" / "admin", store.access_key, store.secret_key)
        wrong = profile(folder / "keys" / "wrong", store.access_key, "not-the-secret")
        reader_identity = store.identities["reader"]
        reader = profile(folder / "keys" / "reader", reader_identity.access_key, reader_identity.secret_key)
        prefix = f"s3://{BUCKET}/{namespace}"
        targets = [
            {"prefix": prefix, "credentialsDirectory": admin, **common},
            {"prefix": f"{prefix}/wrong-secret", "credentialsDirectory": wrong, **common},
            {"prefix": f"{prefix}/read-only", "credentialsDirectory": reader, **common},
            {"prefix": f"{prefix}/proxied", "credentialsDirectory": admin, **common, "endpoint": proxy.endpoint},
            {"prefix": f"s3://no-such-bucket/{namespace}", "credentialsDirectory": admin, **common},
            {"prefix": "file:///", "claim": "archive"},
        ]
        claims = [
            {"namespace": namespace, "claim": "output", "directory": str(folder / "volume"), "targets": targets},
            {"namespace": namespace, "claim": "archive", "directory": str(folder / "archive")},
        ]
        kubectl(cluster, "create", "namespace", namespace)
        operator = Operator(cluster, store, namespace, folder, claims, (*FAST, f"--namespaces={namespace}"))
        made.append(operator)
        return operator

    yield make
    for operator in made:
        if operator.process is not None:
            operator.process.kill()
            operator.process.wait()
