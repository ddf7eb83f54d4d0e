"""A pid alone names nobody for long, and a free port is free only for a moment: both are dealt with here."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
_IN_USE = ("address already in use", "Only one usage of each socket address")


@dataclass(frozen=True)
class Identity:
    """A pid with the start time of its process, so that a recycled pid is never signalled."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Identity:
        return cls(pid, _start_time(pid) or "")

    def alive(self) -> bool:
        return bool(self.started) and _start_time(self.pid) == self.started

    def signal(self, number: signal.Signals) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait_gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _start_time(pid: int) -> str | None:
    """None for a process that is gone, and for a zombie, which runs nothing any more."""
    if not Path("/proc/self/stat").exists():
        shown = subprocess.run(
            ["ps", "-p", str(pid), "-o", "stat=,lstart="], capture_output=True, text=True, check=False
        ).stdout.strip()
        state, _, started = shown.partition(" ")
        return None if not started or state.startswith("Z") else started.strip()
    try:
        # The program's name is in parentheses and may hold anything, so count from its last one.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def boot_id() -> str:
    """Changes when the machine is started anew: names that were recorded before that are nobody's, or a stranger's."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def free_ports(count: int) -> list[int]:
    """Held all at once while choosing, so that they differ. Somebody may still take one: callers retry."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind((LOOPBACK, 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def log_tail(path: Path, lines: int = 15) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    shown = [line[:400] for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(f"    {line}" for line in shown) or "    (the log is empty)"


def says_in_use(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(mark in text for mark in _IN_USE)


def http_get(
    port: int, path: str, *, ca: Path | None = None, token: str | None = None, host: str = LOOPBACK
) -> tuple[int, str]:
    """Straight to that address: urllib would ask the environment for a proxy first. Status 0 means no answer."""
    connection: http.client.HTTPConnection
    try:
        if ca is None:
            connection = http.client.HTTPConnection(host, port, timeout=5)
        else:
            context = ssl.create_default_context(cafile=str(ca))
            connection = http.client.HTTPSConnection(host, port, timeout=5, context=context)
    except (OSError, ssl.SSLError) as error:
        return 0, str(error)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error)
    finally:
        connection.close()
