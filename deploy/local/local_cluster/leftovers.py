"""What outlives the programs of a run and must be taken away by name: files, children, control groups, links, routes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .processes import Identity

FILE, PROCESS, CGROUP, LINK, ROUTE, NODES = "file", "process", "cgroup", "link", "route", "kind-nodes"
ROUTE_METRIC = "4096"
"""Behind every real route, so that ours matters only where there is none."""
_PATIENCE = 10.0


@dataclass(frozen=True)
class Leftover:
    """A file or the folder of a control group by its path, a process (see :func:`process`), a network link by its name,
    an unreachable range, the nodes of a cluster of kind by its name, in the Docker that this machine has."""

    kind: str
    value: str

    def remove(self) -> None:
        """Idempotent; called after the processes were killed. Some of them may take a moment to be gone."""
        if self.kind == FILE:
            Path(self.value).unlink(missing_ok=True)
        elif self.kind == PROCESS:
            identity = Identity(*_parsed(self.value))
            identity.signal(signal.SIGKILL)
            identity.wait_gone(_PATIENCE)
        elif self.kind == CGROUP:
            _remove_cgroup(Path(self.value))
        elif self.kind == LINK:
            _ip("link", "delete", self.value)
        elif self.kind == ROUTE:
            _ip("route", "delete", "unreachable", self.value, "metric", ROUTE_METRIC)
        elif self.kind == NODES:
            _remove_containers(f"label=io.x-k8s.kind.cluster={self.value}")


def process(pid: int) -> Leftover:
    """A process that is none of the programs; of a PID namespace the first, which is gone when all others are."""
    identity = Identity.of(pid)
    return Leftover(PROCESS, f"{identity.pid} {identity.started}")


def _parsed(value: str) -> tuple[int, str]:
    pid, _, started = value.partition(" ")
    return int(pid), started


def _remove_cgroup(folder: Path) -> None:
    """The files in it are the kernel's: folders alone are removed, the deepest first, once no process is in them."""
    deadline = time.monotonic() + _PATIENCE
    while folder.is_dir():
        for inner in sorted(folder.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                inner.rmdir()
        with contextlib.suppress(OSError):
            folder.rmdir()
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _remove_containers(condition: str) -> None:
    with contextlib.suppress(OSError):
        listing = ["docker", "ps", "--all", "--quiet", "--filter", condition]
        shown = subprocess.run(listing, capture_output=True, text=True, check=False)
        if shown.stdout.split():
            subprocess.run(["docker", "rm", "--force", "--volumes", *shown.stdout.split()], capture_output=True, check=False)


def _ip(*words: str) -> None:
    # What is gone already is no error, and neither is a machine without that program: then nothing was made.
    with contextlib.suppress(OSError):
        subprocess.run(["ip", *words], capture_output=True, check=False)
