"""How the tests look at a local cluster from outside: its command line and its recorded processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from local_cluster.paths import CACHE_VARIABLE
from local_cluster.processes import Identity

LOCAL = Path(__file__).resolve().parents[2] / "deploy" / "local"


class CommandLine:
    """`python -m local_cluster` with a cache of its own for clusters, and the shared one for the build."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.env = {**os.environ, "PYTHONPATH": str(LOCAL), CACHE_VARIABLE: str(cache)}

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "local_cluster", *arguments],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.popen(*arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def state(self, name: str) -> Path:
        return self.cache / "clusters" / name


def identities(state_dir: Path) -> list[Identity]:
    """The supervisor and every program that a state folder names."""
    state = json.loads((state_dir / "state.json").read_text(encoding="utf-8"))
    return [Identity(**state["supervisor"]), *(Identity(**value) for value in state["programs"].values())]


def all_gone(watched: list[Identity], seconds: float = 5) -> bool:
    return all(item.wait_gone(seconds) for item in watched)
