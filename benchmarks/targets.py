"""The places that the clients move bytes to: a null S3 over TLS, near or far, so that the client is measured; a real S3."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

import local_cluster as lc
from local_cluster.go_toolchain import SETTINGS, find_go
from local_cluster.paths import cache_root, locked

SINK_SOURCE = Path(__file__).parent / "sink"
REGION = "us-east-1"


@dataclass(frozen=True)
class Target:
    """One running S3. ``ca`` is the certificate that its clients have to trust, None for plain http."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str
    ca: Path | None = None

    def make_bucket(self, bucket: str) -> None:
        """A bucket that is ready to be written to: a real store makes room at its first object."""
        self._client().create_bucket(Bucket=bucket)
        self._client().put_object(Bucket=bucket, Key="warm", Body=b"1")
        self._client().delete_object(Bucket=bucket, Key="warm")

    def remove_bucket(self, bucket: str) -> None:
        """With everything in it: both targets do that."""
        self._client().delete_bucket(Bucket=bucket)

    def sizes(self, bucket: str) -> dict[str, int]:
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def _client(self) -> Any:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            verify=str(self.ca) if self.ca else None,
            config=Config(s3={"addressing_style": "path"}, proxies={}, request_checksum_calculation="when_required"),
        )


@contextmanager
def tls_sink(name: str = "tls-sink", *settings: str) -> Iterator[Target]:
    program = build_sink()
    with tempfile.TemporaryDirectory() as folder:
        ca = Path(folder) / "ca.pem"
        sink = subprocess.Popen([program, "-ca", ca, *settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert sink.stdin is not None
        assert sink.stdout is not None
        try:
            endpoint = sink.stdout.readline().strip()
            yield Target(name, endpoint, "nobody", "checks-this", ca)
        finally:
            sink.stdin.close()
            sink.wait()


@contextmanager
def seaweedfs() -> Iterator[Target]:
    with lc.start_object_store("bench") as store:
        yield Target("seaweedfs", store.endpoint, store.access_key, store.secret_key)


TARGETS: dict[str, Callable[[], AbstractContextManager[Target]]] = {
    "tls-sink": tls_sink,
    "seaweedfs": seaweedfs,
    "far-sink": lambda: tls_sink("far-sink", "-delay", "20ms"),
}
USUAL = ("tls-sink", "seaweedfs")
"""Measured unless others are asked for. The far one shows what waiting costs: a cloud's answer to a request takes 20 ms."""


def build_sink() -> Path:
    """The sink's program, built once for each version of its source and kept in the cache."""
    go = find_go(SINK_SOURCE / "go.mod", print)
    digest = hashlib.sha256()
    for path in sorted(SINK_SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    program = cache_root() / "sink" / digest.hexdigest()[:16]
    with locked(program.with_suffix(".lock"), lambda: print("another process builds the sink, waiting for it")):
        if not program.exists():
            fresh = program.with_suffix(".building")
            built = subprocess.run(
                [go, "build", "-trimpath", "-buildvcs=false", "-o", fresh, "."],
                cwd=SINK_SOURCE,
                env={**os.environ, **SETTINGS},
                capture_output=True,
                text=True,
                check=False,
            )
            if built.returncode:
                raise lc.LocalClusterError(f"the sink could not be built: {built.stderr[-2000:]}")
            shutil.move(fresh, program)
    return program
