"""A mover starts once for each artifact: what it imports for whom is part of how fast a checkpoint is safe."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# Of aiohttp a part: -X importtime names what was refused as well.
KUBERNETES = {"kopf", "kubernetes", "aiohttp.client", "asyncio"}
S3 = {"boto3", "s3transfer", "botocore"}
GOOGLE = {"google", "google.cloud", "google_crc32c"}
AZURE = {"azure", "azure.identity", "msal"}


class _NoToEverything(BaseHTTPRequestHandler):
    """A store that refuses whatever it is asked: a mover ends at its first request."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _refuse  # noqa: N815 - the library's names

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _NoToEverything) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def imported(module: str, *arguments: str, environment: dict[str, str] | None = None) -> tuple[set[str], str]:
    """What a fresh process imports until it ends, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, *arguments],
        env={**{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20, done.stderr
    return {line.rpartition("|")[2].strip() for line in lines}, done.stdout


def upload(folder: Path, uri: str, credentials: dict[str, str], **options: object) -> set[str]:
    """What a mover imports for an upload that the store refuses at its first request (for file://: that succeeds)."""
    source, keys = folder / "source", folder / "keys"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"weights")
    keys.mkdir()
    for name, value in credentials.items():
        (keys / name).write_text(value)
    plan = {
        "operation": "Upload",
        "artifactUID": "6a5c7a1e-0f6a-4a5e-9d42-0f4a7d3b9c11",
        "source": {"root": str(folder), "path": "source"},
        "targetURI": uri,
        "options": {"credentialsDirectory": str(keys), **options},
    }
    modules, output = imported("checkpoint_operator.mover", environment={"CHECKPOINT_PLAN": json.dumps(plan)})
    result = json.loads(output.splitlines()[-1])
    if uri.startswith("file:"):
        assert result["stored"]["fileCount"] == 1
    else:
        assert result["failure"]["reason"] == "CredentialsRefused", result
    return modules


@pytest.mark.parametrize("name", ["mover", "controller"])
def test_whoever_asks_for_the_version_waits_for_nothing_else(name: str) -> None:
    modules, output = imported(f"checkpoint_operator.{name}", "--version")
    assert output.split()[1].count(".") == 2
    assert modules & {"pydantic", *KUBERNETES, *S3, *GOOGLE, *AZURE} == set()


def test_a_volume_needs_no_cloud_no_network_and_no_kubernetes(tmp_path: Path) -> None:
    modules = upload(tmp_path, f"file://{tmp_path}/target/checkpoint-1", {})
    assert modules & {*KUBERNETES, *S3, *GOOGLE, *AZURE, "awscrt", "ssl", "http.client", "requests", "urllib3"} == set()


def test_s3_with_everything_said_needs_no_boto3_and_nobody_elses_library(tmp_path: Path, store: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    modules = upload(tmp_path, "s3://bucket/a", keys, endpoint=store, region="us-east-1", forcePathStyle=True)
    assert "checkpoint_operator.storage.s3" in modules
    assert modules & {*KUBERNETES, "boto3", "s3transfer", *GOOGLE, *AZURE} == set()


def test_gcs_needs_neither_amazons_nor_microsofts_library(tmp_path: Path, store: str) -> None:
    modules = upload(tmp_path, "gs://bucket/a", {}, endpoint=store)
    assert "checkpoint_operator.storage.gcs" in modules
    assert modules & {*KUBERNETES - {"asyncio"}, *S3, "awscrt", *AZURE} == set()  # google.auth imports it for itself


def test_azure_needs_neither_amazons_nor_googles_library_and_no_identity_where_there_is_a_key(
    tmp_path: Path, store: str
) -> None:
    keys = {"AZURE_STORAGE_ACCOUNT": "account", "AZURE_STORAGE_KEY": base64.b64encode(b"secret").decode()}
    modules = upload(tmp_path, "azure://container/a", keys, endpoint=f"{store}/account")
    assert "checkpoint_operator.storage.azure" in modules
    assert modules & {*KUBERNETES - {"asyncio"}, *S3, *GOOGLE, "azure.identity", "msal"} == set()
