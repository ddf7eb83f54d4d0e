"""Google Cloud Storage for tests: two emulators on loopback, in memory, since Google's own runs nowhere else.

They are wrong in different places. fake-gcs-server (Go) honours conditions on uploads and checks hashes, but ignores
conditions on compose and delete. gcp-storage-emulator (Python) ignores all conditions; as a store that has none it is real.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .build import build_go_program
from .errors import LocalClusterError
from .paths import new_run_dir
from .processes import free_ports, http_get
from .providers import Say, silent
from .session import Running, Session, start_on_free_ports, sweep

FAKE_GCS_SOURCE = Path(__file__).resolve().parent.parent / "fake-gcs"
_READY = "/storage/v1/b?project=test"


@dataclass(frozen=True)
class GCSEmulator(Running):
    """As a context manager it is stopped at the end, and its data is gone. ``endpoint`` is an http:// URL."""

    endpoint: str
    state_dir: Path

    def create_bucket(self, name: str) -> None:
        """Raises LocalClusterError where it is there already."""
        request = urllib.request.Request(  # noqa: S310 - http on loopback, made here
            f"{self.endpoint}/storage/v1/b?project=test",
            data=json.dumps({"name": name}).encode(),
            headers={"Content-Type": "application/json"},
        )
        straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            straight.open(request, timeout=10).close()
        except urllib.error.URLError as error:
            raise LocalClusterError(f"the bucket {name!r} was not created: {error}") from error


def build_fake_gcs(say: Say = print) -> Path:
    """The program of :func:`start_fake_gcs`."""
    return build_go_program(FAKE_GCS_SOURCE, "github.com/fsouza/fake-gcs-server", "fake-gcs-server", say)


def start_fake_gcs(name: str = "gcs", *, say: Say = silent) -> GCSEmulator:
    """fake-gcs-server; up at once, once it is built."""
    program = build_fake_gcs(say)

    def command(port: int) -> list[str | Path]:
        where = ["-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}"]
        return [program, "-backend", "memory", "-scheme", "http", "-log-level", "warn", *where]

    # It copies what is composed, again for each 32 pieces: of 3 GiB more than 18 lay about before Go's collector came.
    return _start(name, "fake-gcs-server", command, {"GOGC": "20"})


def start_gcp_storage_emulator(name: str = "gcs") -> GCSEmulator:
    """gcp-storage-emulator, of the PyPI package; up in a second."""

    def command(port: int) -> list[str | Path]:
        where = ["--host", "127.0.0.1", "--port", str(port)]
        return [sys.executable, "-m", "gcp_storage_emulator", "start", *where, "--in-memory", "--quiet"]

    return _start(name, "gcp-storage-emulator", command)


def _start(
    name: str, program: str, command: Callable[[int], list[str | Path]], env: Mapping[str, str] | None = None
) -> GCSEmulator:
    def run(session: Session) -> GCSEmulator:
        [port] = free_ports(1)
        session.start(program, command(port), env=env)
        session.wait_until(
            lambda: http_get(port, _READY)[0] == 200, what=f"{program} to list buckets", seconds=60, program=program
        )
        return GCSEmulator(f"http://127.0.0.1:{port}", session.state_dir, _stop=session.stop, _detach=session.detach)

    sweep()
    return start_on_free_ports(lambda: new_run_dir(name), run)
