"""The starter's side of a supervisor: start programs, notice at once when one ends, detach, stop."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from .errors import AddressInUse, LocalClusterError
from .leftovers import Leftover
from .paths import remove_tree, runs_dir
from .processes import Identity, boot_id, log_tail, says_in_use

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent


ATTEMPTS = 5
"""How often other ports are tried where somebody took one between the choice and its use."""

Server = TypeVar("Server")


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Running:
    """What was started: as a context manager it is stopped at the end, and what it kept is removed."""

    _stop: Callable[[], None] = field(default=_nothing, repr=False, compare=False)
    _detach: Callable[[], None] = field(default=_nothing, repr=False, compare=False)

    def stop(self) -> None:
        """Idempotent. Does nothing to what was there before."""
        self._stop()

    def detach(self) -> None:
        """Let it outlive this process; `session.stop_recorded(state_dir)` stops it then."""
        self._detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def start_on_free_ports(
    new_state_dir: Callable[[], Path], start: Callable[[Session], Server], again: Callable[[int], None] = lambda _: None
) -> Server:
    """Start something in a session of its own, with other ports where one was taken; `again` hears of each such attempt."""
    for attempt in range(1, ATTEMPTS + 1):
        session = Session(new_state_dir())
        try:
            return start(session)
        except AddressInUse as error:
            session.stop()
            if attempt == ATTEMPTS:
                raise LocalClusterError(f"no port stayed free in {ATTEMPTS} attempts. {error}") from error
            again(attempt)
        except BaseException:
            session.stop()
            raise
    raise AssertionError("unreachable")


class Session:
    """One supervisor and its state folder. Whatever goes wrong, `stop` leaves neither processes nor files."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self._events = b""
        self._exited: dict[str, str] = {}
        self._started: dict[str, int] = {}
        self._noted = 0
        self._detached = False
        with (state_dir / "supervisor.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "local_cluster.supervisor", str(state_dir)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # A session of its own: Ctrl-C in the terminal reaches the starter, which then stops in order.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(_PACKAGE_ROOT)},
            )
        self.identity = Identity.of(self._process.pid)

    def log(self, program: str) -> Path:
        return self.state_dir / f"{program}.log"

    def start(self, name: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> int:
        """Returns the pid. The environment is bare but for `env`: no proxy, no credentials of the user reach a program."""
        self._send(
            {
                "do": "start",
                "name": name,
                "argv": [str(item) for item in argv],
                "env": {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.state_dir), **(env or {})},
                "log": str(self.log(name)),
            }
        )
        self.wait_until(lambda: name in self._started, what=f"{name} to be started", seconds=20)
        return self._started[name]

    def end(self, name: str) -> None:
        """Kill one program on purpose, the others go on; it can be started again."""
        self._send({"do": "end", "name": name})
        self.wait_until(lambda: name not in self._started, what=f"{name} to be ended", seconds=20)

    def leave(self, *leftovers: Leftover) -> None:
        """What is to be removed at the end, the last first, whoever does it: recorded when this returns."""
        wanted = self._noted + 1
        self._send({"do": "leave", "leftovers": [[item.kind, item.value] for item in leftovers]})
        self.wait_until(lambda: self._noted >= wanted, what="the supervisor to take notes", seconds=20)

    def watch(self, name: str, path: Path) -> None:
        """From now on the end of this path is the end of everything, as that of a program would be."""
        self._send({"do": "watch", "name": name, "path": str(path)})

    def wait_until(self, ready: Callable[[], bool], *, what: str, seconds: float, program: str = "") -> None:
        """A program that ends while this waits is an error at once, with the end of its log."""
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            if program and says_in_use(self.log(program)):
                raise AddressInUse(f"{program} found its port taken:\n{log_tail(self.log(program), 3)}")
            if ready():
                self.check()
                return
            if time.monotonic() > deadline:
                shown = f"; the end of {program}'s log:\n{log_tail(self.log(program))}" if program else "."
                raise LocalClusterError(f"waited {seconds:.0f} s for {what}, in vain{shown}")

    def check(self, pause: float = 0.05) -> None:
        self._read(pause)
        for name, ending in self._exited.items():
            path = self.log(name)
            if says_in_use(path):
                raise AddressInUse(f"{name} found its port taken:\n{log_tail(path, 3)}")
            raise LocalClusterError(f"{name} ended ({ending}); the end of its log:\n{log_tail(path)}")
        if self._process.poll() is not None:
            text = log_tail(self.state_dir / "supervisor.log")
            raise LocalClusterError(f"the supervisor ended ({self._process.returncode}):\n{text}")

    def alive(self) -> bool:
        return self._process.poll() is None and not self._exited

    def detach(self) -> None:
        self._send({"do": "detach"})
        self.wait_until(lambda: self._detached, what="the supervisor to detach", seconds=20)
        self._close_pipes()
        # Left alone on purpose; without this the interpreter warns about a process that still runs.
        self._process.returncode = 0

    def stop(self) -> None:
        self._close_pipes()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self.state_dir.exists():
            stop_recorded(self.state_dir)

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait(timeout=5)
            self.check()

    def _read(self, pause: float) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], pause)
        if not ready:
            return
        chunk = os.read(descriptor, 65536)
        if not chunk:
            time.sleep(pause)
        *lines, self._events = (self._events + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "started":
                self._started[event["name"]] = event["pid"]
            elif event["event"] == "exited":
                code = event["code"]
                self._exited[event["name"]] = event["detail"] or (f"signal {-code}" if code < 0 else f"exit status {code}")
            elif event["event"] == "ended":
                del self._started[event["name"]]
            elif event["event"] == "noted":
                self._noted += 1
            else:
                self._detached = True

    def _close_pipes(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def recorded(state_dir: Path) -> tuple[Identity, dict[str, Identity]] | None:
    """The supervisor and the programs that a state folder names; None where there is no readable record."""
    try:
        state = json.loads((state_dir / "state.json").read_text(encoding="utf-8"))
        programs = {name: Identity(**value) for name, value in state["programs"].items()}
        return Identity(**state["supervisor"]), programs
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _recorded_leftovers(state_dir: Path) -> list[Leftover]:
    """None where the supervisor has removed them itself: somebody else may have these names by now, as after a reboot."""
    try:
        state = json.loads((state_dir / "state.json").read_text(encoding="utf-8"))
        return [Leftover(*item) for item in state["leftovers"]] if state["boot"] == boot_id() else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def stop_recorded(state_dir: Path) -> bool:
    """Stop exactly what the folder names, and remove it. True when something was still running."""
    record = recorded(state_dir)
    running = False
    if record is not None:
        supervisor, programs = record
        running = supervisor.alive() or any(item.alive() for item in programs.values())
        supervisor.signal(signal.SIGTERM)
        if not supervisor.wait_gone(10):
            supervisor.signal(signal.SIGKILL)
        for identity in programs.values():
            identity.signal(signal.SIGKILL)
        for identity in (supervisor, *programs.values()):
            if not identity.wait_gone(10):
                raise LocalClusterError(f"process {identity.pid} does not end, not even by SIGKILL; see {state_dir}.")
        for leftover in reversed(_recorded_leftovers(state_dir)):
            leftover.remove()
    if state_dir.exists():
        remove_tree(state_dir)
    return running


def sweep() -> None:
    """Remove what a supervisor that was itself killed left behind. A folder without a record may be new."""
    for state_dir in runs_dir().iterdir():
        record = recorded(state_dir)
        try:
            young = record is None and time.time() - state_dir.stat().st_mtime < 600
        except OSError:
            continue  # Its own supervisor was faster.
        if not young and (record is None or not record[0].alive()):
            stop_recorded(state_dir)
