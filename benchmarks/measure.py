"""Runs one program and says what it cost: seconds of wall, seconds of CPU, peak resident memory, of its whole process tree.

As a program of its own it is the parent of what is measured. That keeps the parent small: the kernel counts the memory
that a process shared with its parent up to exec into its peak, so that a large parent would be measured instead.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 300.0
"""Seconds after which a run is given up."""


class RunFailed(Exception):
    """A program ended with a status other than 0, or did not end; the sentence has the end of its output."""


@dataclass(frozen=True)
class Cost:
    """Of one run: ``wall_s`` from start to exit, ``cpu_s`` user and system, ``rss_mb`` (10^6) of its largest process."""

    wall_s: float
    cpu_s: float
    rss_mb: float


def measure(argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Cost:
    """Run a program with exactly this environment; what it prints goes to ``log``.

    Raises:
        RunFailed: its status is not 0, or it took longer than :data:`TIMEOUT`.
    """
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(log), *argv],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        answer, _ = launcher.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"{argv[0]} did not end within {TIMEOUT:g} s; {_tail(log)}") from error
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    if launcher.returncode:
        raise RunFailed(f"{argv[0]} could not be started")
    said = json.loads(answer)
    if said["status"]:
        raise RunFailed(f"{argv[0]} ended with status {said['status']}; {_tail(log)}")
    return Cost(said["wall"], said["cpu"], said["rss"])


def _tail(log: Path) -> str:
    return f"the end of what it printed:\n{log.read_text(errors='replace')[-2000:]}"


def launch(log: str, argv: Sequence[str]) -> None:
    """Run, wait, print one line of JSON."""
    redirect = [
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    began = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=redirect)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - began
    cost = {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * 1024 / 1e6}
    print(json.dumps({"status": os.waitstatus_to_exitcode(status), **cost}))


if __name__ == "__main__":
    launch(sys.argv[1], sys.argv[2:])
