"""Owns the programs of one cluster so that they end with whoever started them, however that one ends.

It reads one JSON command a line from its standard input, a pipe that only the starter holds: `start` a
program, `end` one, `leave` (remember what is to be removed at the end), `watch` a path that must stay there, `detach`
(stay without the starter). The end of the input before a `detach` means that the starter is gone or wants to stop:
everything is killed and the state folder removed. Each program gets a parent-death signal too, for the case that the
supervisor itself is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .leftovers import Leftover
from .processes import Identity, boot_id

_PR_SET_PDEATHSIG = 1


class Supervisor:
    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        self.identities: dict[str, Identity] = {}
        self.leftovers: list[Leftover] = []
        self.watched: dict[str, Path] = {}
        self.reported: set[str] = set()
        self.detached = False
        self.starter = os.getppid()
        self.libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self.write_state()

    def run(self) -> int:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        terminated = False

        def terminate(*_: object) -> None:
            nonlocal terminated
            terminated = True

        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        pending = b""
        while True:
            sources = [reader] if self.detached else [reader, 0]
            # The timeout is for a starter that forked (the fork keeps the pipe open, the parent changes), and to watch.
            ready, _, _ = select.select(sources, [], [], 1.0)
            if reader in ready:
                os.read(reader, 4096)
            if terminated:
                return self.stop(remove=True)
            if 0 in ready:
                chunk = os.read(0, 65536)
                if not chunk:
                    return self.stop(remove=True)
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self.obey(json.loads(line))
            if not self.detached and os.getppid() != self.starter:
                return self.stop(remove=True)
            if self.look_for_exits() and self.detached:
                # A control plane without one of its parts is of no use; the logs stay to be read.
                return self.stop(remove=False)

    def obey(self, command: dict[str, Any]) -> None:
        if command["do"] == "start":
            self.start(command)
        elif command["do"] == "end":
            self.end(command["name"])
        elif command["do"] == "leave":
            self.leftovers += [Leftover(*item) for item in command["leftovers"]]
            self.write_state()
            self.tell({"event": "noted"})
        elif command["do"] == "watch":
            self.watched[command["name"]] = Path(command["path"])
        elif command["do"] == "detach":
            self.detached = True
            self.tell({"event": "detached"})
            # Whoever waits for the starter's output to end must not wait for the supervisor.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)

    def start(self, command: dict[str, Any]) -> None:
        name = command["name"]
        with open(command["log"], "wb") as log:
            try:
                program = subprocess.Popen(
                    command["argv"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.state_dir,
                    env=command["env"],
                    preexec_fn=self.die_with_supervisor,
                )
            except OSError as error:
                self.tell({"event": "exited", "name": name, "code": 127, "detail": str(error)})
                return
        self.programs[name] = program
        self.identities[name] = Identity.of(program.pid)
        self.write_state()
        self.tell({"event": "started", "name": name, "pid": program.pid})

    def end(self, name: str) -> None:
        """One program, on purpose: the others go on, and its end is no news."""
        program = self.programs.pop(name)
        del self.identities[name]
        program.kill()
        program.wait()
        self.write_state()
        self.tell({"event": "ended", "name": name})

    def die_with_supervisor(self) -> None:
        if self.libc is not None:
            self.libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def look_for_exits(self) -> bool:
        for name, program in self.programs.items():
            code = program.poll()
            if code is not None and name not in self.reported:
                self.reported.add(name)
                print(f"{name} (pid {program.pid}) ended with {code}", file=sys.stderr, flush=True)
                self.tell({"event": "exited", "name": name, "code": code, "detail": ""})
        for name, path in self.watched.items():
            if not path.exists() and name not in self.reported:
                self.reported.add(name)
                print(f"{path} is gone", file=sys.stderr, flush=True)
                self.tell({"event": "exited", "name": name, "code": 0, "detail": f"{path} is gone"})
        return bool(self.reported)

    def stop(self, *, remove: bool) -> int:
        """Killed, not asked: the data goes with the processes, so no graceful end is worth waiting for."""
        for program in reversed(self.programs.values()):
            if program.poll() is None:
                program.kill()
        for program in self.programs.values():
            program.wait()
        while self.leftovers:
            self.leftovers[-1].remove()
            self.leftovers.pop()
        # From now on these names may be somebody else's.
        self.write_state()
        if remove:
            for _ in range(3):
                shutil.rmtree(self.state_dir, ignore_errors=True)
                if not self.state_dir.exists():
                    break
                time.sleep(0.05)
        return 0 if remove else 1

    def tell(self, event: dict[str, Any]) -> None:
        if self.detached and event["event"] != "detached":
            return
        # When the starter is gone, the end of the input says the same in a moment.
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(event).encode() + b"\n")

    def write_state(self) -> None:
        state = {
            "boot": boot_id(),
            "supervisor": asdict(Identity.of(os.getpid())),
            "programs": {name: asdict(identity) for name, identity in self.identities.items()},
            "leftovers": [[item.kind, item.value] for item in self.leftovers],
        }
        fresh = self.state_dir / "state.json.new"
        fresh.write_text(json.dumps(state, indent=1), encoding="utf-8")
        fresh.rename(self.state_dir / "state.json")


if __name__ == "__main__":
    sys.exit(Supervisor(Path(sys.argv[1])).run())
