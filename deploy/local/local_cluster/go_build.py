"""Compiles a pinned Go module into the cache, once for each version of its source, and says what to do where it cannot."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import LocalClusterError
from .go_toolchain import SETTINGS, find_go
from .paths import cache_root, locked

_REPORT_SECONDS = 5.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class GoSource:
    """A folder with go.mod and go.sum, and what is made of it.

    One package becomes one binary under each of `names`; several become a binary each, and `names` is what Go calls
    them. `version` is the pinned version of the module that matters; `flags` go to `go build`.
    """

    folder: Path
    version: str
    flags: tuple[str, ...]
    names: tuple[str, ...]
    packages: tuple[str, ...] = (".",)

    def key(self, architecture: str) -> str:
        digest = hashlib.sha256()
        for name in ("go.mod", "go.sum", "main.go"):
            path = self.folder / name
            digest.update(path.read_bytes() if path.exists() else b"")
            digest.update(b"\0")
        for path in sorted(self.folder.glob("*/*.go")):
            digest.update(path.read_bytes() + b"\0")
        packages = () if self.packages == (".",) else self.packages
        digest.update("\0".join([*self.flags, *packages, *self.names, architecture]).encode())
        return f"{self.version}-{digest.hexdigest()[:16]}"


def pinned_version(folder: Path, module: str) -> str:
    """The released version of `module` that the go.mod of `folder` requires.

    Raises:
        LocalClusterError: there is no go.mod, or it requires no release of that module.
    """
    go_mod = folder / "go.mod"
    if not go_mod.is_file():
        raise LocalClusterError(f"there is no go.mod in {folder}, so there is nothing to build.")
    line = rf"^\s*(?:require )?{re.escape(module)} (v\d+\.\d+\.\d+)\s*(?:// indirect)?$"
    found = re.search(line, go_mod.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise LocalClusterError(f"{go_mod} requires no released version of {module}; add that line.")
    return found[1]


def compile_once(source: GoSource, cache_name: str, announcement: str, say: Say) -> Path:
    """The folder with the programs; built first where the cache does not hold this very source yet.

    `announcement` says what is built and how long it takes; the path of the Go that does it comes after "with".
    """
    root = cache_root() / cache_name
    target = root / source.key(architecture())
    last = target / source.names[-1]
    if last.exists():
        return target
    with locked(root / f"{target.name}.lock", lambda: say("another process builds the same programs, waiting for it")):
        if last.exists():
            return target
        go = find_go(source.folder / "go.mod", say)
        say(announcement.format(version=source.version, go=go))
        _build_into(target, source, cache_name, go, say)
    return target


def _build_into(target: Path, source: GoSource, binary: str, go: Path, say: Say) -> None:
    log = target.parent / f"{target.name}.log"
    # Its name is the build's own, so that the next try removes what a killed one left.
    fresh = target.parent / f".building-{target.name}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        # A folder at the end of -o takes one binary of each package.
        output = str(fresh / binary) if len(source.packages) == 1 else f"{fresh}/"
        command = [str(go), "build", "-v", *source.flags, "-o", output, *source.packages]
        began = time.monotonic()
        _run(command, source.folder, log, _count_packages(go, source, log, say), say)
        _name_programs(fresh, source, binary)
        if target.exists():
            shutil.rmtree(target)  # Something without the last name in it: no whole build.
        fresh.rename(target)
        say(f"built in {_clock(time.monotonic() - began)}: {target}")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _name_programs(folder: Path, source: GoSource, binary: str) -> None:
    if len(source.packages) == 1:
        for name in source.names:
            if name != binary:
                (folder / name).symlink_to(binary)
        return
    absent = [name for name in source.names if not (folder / name).exists()]
    if absent:
        raise LocalClusterError(f"the packages of {source.folder} make no {', '.join(absent)}; names and go.mod do not fit.")


def _count_packages(go: Path, source: GoSource, log: Path, say: Say) -> int:
    say("reading the module graph (this fetches the modules where they are missing)")
    with log.open("w", encoding="utf-8") as stream:
        listed = subprocess.run(
            [str(go), "list", "-deps", *source.packages],
            cwd=source.folder,
            env={**os.environ, **SETTINGS},
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            check=False,
        )
    if listed.returncode != 0:
        raise _failure("go list", listed.returncode, log)
    return len(listed.stdout.splitlines())


def _run(command: list[str], folder: Path, log: Path, total: int, say: Say) -> None:
    """`go build -v` names a package when its compilation starts; those from Go's own cache stay unnamed."""
    began = time.monotonic()
    compiled = 0

    def follow() -> None:
        nonlocal compiled
        assert process.stderr is not None
        with log.open("a", encoding="utf-8") as stream:
            for line in process.stderr:
                stream.write(line)
                stream.flush()
                if re.fullmatch(r"[\w.~/-]+\s*", line):
                    compiled += 1

    # A process group of its own, so that an interrupt ends the compilers too.
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **SETTINGS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        while True:
            try:
                code = process.wait(timeout=_REPORT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                elapsed = _clock(time.monotonic() - began)
                say(f"{elapsed}: {compiled} of {total} packages compiled (not counting cached ones)")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        reader.join(timeout=10)
        if process.stderr is not None:
            process.stderr.close()
    if code != 0:
        raise _failure("go build", code, log)


def _failure(what: str, code: int, log: Path) -> LocalClusterError:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    tail = "\n".join(f"    {line[:300]}" for line in lines[-15:]) or "    (it said nothing)"
    text = "\n".join(lines[-200:]).lower()
    advice = "read the whole log; if it is a compile error, go.mod, go.sum and main.go do not fit together."
    if "no space left" in text:
        advice = "free about 4 GB for Go's build cache (GOCACHE) and the temp dir, then try again."
    elif code < 0 or "signal: killed" in text:
        advice = "it was killed, most likely for want of memory: about 3 GB are needed; free some and try again."
    elif any(mark in text for mark in ("dial tcp", "i/o timeout", "proxyconnect", "no such host", "tls:")):
        advice = "modules could not be fetched: check the network and GOPROXY, then try again."
    elif "requires go >=" in text or "go.mod requires" in text:
        advice = "install the Go version that go.mod names and put it first on PATH."
    elif "missing go.sum entry" in text or "updates to go.mod" in text:
        advice = "go.mod and go.sum do not fit together; run `go mod tidy` in that folder once and commit both."
    return LocalClusterError(f"{what} failed (status {code}). Its last words:\n{tail}\nFull log: {log}\nTo do: {advice}")


def architecture() -> str:
    machine = os.uname().machine
    return os.environ.get("GOARCH") or {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
