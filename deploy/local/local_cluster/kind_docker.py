"""Docker for kind: the machine's own where one runs, else Debian's in namespaces, which ends with them and is nobody else's.

It is unpacked into the cache and not installed, so no service of the machine starts and a Docker that is there already is
not touched: data, socket, control groups and network are this one's alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import LocalClusterError, NodeUnavailable
from .node_build import check_machine, ensure_tools, search_path, tool
from .node_cgroups import make_cgroups
from .node_network import Network, claim_network, connect
from .node_world import World, create_world
from .paths import cache_root, locked, remove_tree
from .providers import Say
from .session import Session

_PACKAGES = ("docker.io", "containerd", "libdevmapper1.02.1")
_DAEMON = "dockerd"
_PATIENCE = 120.0
_SYS_RESOURCE = 24
# Who runs without this capability cannot give it to a privileged container, and runc says so instead of going without.
_RUNC = r"""#!/bin/sh
for word in "$@"; do
  case "$before" in
    --bundle) file=$word/config.json ;;
    --process) file=$word ;;
    *) file= ;;
  esac
  if [ -n "$file" ]; then
    sed -i -e 's/"CAP_SYS_RESOURCE",//g' -e 's/,"CAP_SYS_RESOURCE"//g' "$file"
  fi
  before=$word
done
exec {runc} "$@"
"""


@dataclass(frozen=True)
class Docker:
    """A daemon and how to speak to it."""

    client: Path
    environment: Mapping[str, str]

    def run(self, *words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        """Raises LocalClusterError with the client's own words."""
        command = [str(self.client), *map(str, words)]
        done = subprocess.run(command, env=dict(self.environment), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
        if done.returncode != 0:
            raise LocalClusterError(f"`docker {' '.join(map(str, words))}` failed: {done.stderr.strip()}")
        return done  # type: ignore[no-any-return]


def machines_docker() -> Docker | None:
    """The one that runs on this machine without us."""
    client = shutil.which("docker")
    if client is None or subprocess.run([client, "version"], capture_output=True, check=False).returncode != 0:
        return None
    return Docker(Path(client), os.environ)


def ensure_docker(say: Say) -> Path:
    """The folder that Debian's Docker is unpacked in.

    Raises:
        NodeUnavailable: this machine is none of Debian's kind, or is not root's.
    """
    check_machine()
    ensure_tools(say)
    target = cache_root() / "kind" / "docker"
    if target.exists():
        return target
    if shutil.which("apt-get") is None:
        raise NodeUnavailable("kind needs a Docker: none runs here, and without apt-get none can be had.")
    with locked(target.parent / "docker.lock", lambda: say("another process fetches Docker, waiting for it")):
        if target.exists():
            return target
        say("fetching Debian's Docker, for kind alone: it is unpacked and not installed")
        fresh = target.parent / ".docker"
        if fresh.exists():
            remove_tree(fresh)
        fresh.mkdir(parents=True)
        _apt(fresh, "update")
        _apt(fresh, "download", *_PACKAGES)
        for package in fresh.glob("*.deb"):
            subprocess.run(["dpkg", "--extract", package.name, "."], cwd=fresh, check=True, capture_output=True)
            package.unlink()
        fresh.rename(target)
    return target


def start_docker(session: Session, unpacked: Path, uses: list[Path], say: Say) -> tuple[Docker, Network, World]:
    """A daemon in namespaces of its own, which ends with the session."""
    network = claim_network(session)
    say(f"Docker's namespaces: {network.range}, with this machine at {network.host}")
    world = create_world(session, [unpacked, *uses])
    connect(network, session, world.wrap, world.pid, 1)
    state = session.state_dir
    _give_modules(world, state)
    group = make_cgroups(session, f"checkpoint-kind-{network.slot}")
    socket = state / "docker.sock"
    binaries = [unpacked / "usr" / "sbin", unpacked / "usr" / "bin"]
    flags = [
        f"--host=unix://{socket}",
        f"--data-root={state / 'docker'}",
        "--exec-root=/run/docker",
        "--pidfile=/run/docker.pid",
        f"--cgroup-parent={group}",
        "--storage-driver=overlay2",
        # A node asks for names when it starts and waits five seconds for the answer; this one refuses at once.
        f"--dns={network.host}",
        "--userland-proxy=false",
        *_runtime(state, Path("/proc/self/status").read_text("ascii")),
    ]
    libraries = ":".join(
        str(path) for path in sorted([*unpacked.glob("lib/*-linux-gnu*"), *unpacked.glob("usr/lib/*-linux-gnu*")])
    )
    session.start(
        _DAEMON,
        [*world.wrap, unpacked / "usr" / "sbin" / _DAEMON, *flags],
        env={"PATH": ":".join([*map(str, binaries), search_path()]), "LD_LIBRARY_PATH": libraries},
    )
    docker = Docker(
        unpacked / "usr" / "bin" / "docker",
        {
            "DOCKER_HOST": f"unix://{socket}",
            "PATH": ":".join([str(binaries[1]), os.environ.get("PATH", os.defpath)]),
            "HOME": str(state),
            "LD_LIBRARY_PATH": libraries,
        },
    )

    def answers() -> bool:
        command = [str(docker.client), "version"]
        return not subprocess.run(command, env=dict(docker.environment), capture_output=True, check=False).returncode

    session.wait_until(answers, what="Docker to answer", seconds=_PATIENCE, program=_DAEMON)
    return docker, network, world


def _give_modules(world: World, state: Path) -> None:
    """A node of kind mounts /lib/modules; where the machine has none, the world gets an empty one."""
    if Path("/lib/modules").is_dir():
        return
    extra = state / "lib"
    (extra / "modules").mkdir(parents=True)
    target = Path("/lib").resolve()
    command = [*world.wrap, "mount", "-t", "overlay", "-o", f"lowerdir={extra}:{target}", "overlay", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LocalClusterError(f"kind needs a folder /lib/modules, and none could be made: {done.stderr.strip()}")


def _runtime(state: Path, status: str) -> list[str]:
    """Flags for the daemon of a process with that status."""
    found = re.search(r"^CapBnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if found is None or int(found[1], 16) >> _SYS_RESOURCE & 1:
        return []
    wrapper = state / "runc"
    wrapper.write_text(_RUNC.replace("{runc}", str(tool("runc"))), "utf-8")
    wrapper.chmod(0o755)
    return [f"--add-runtime=bounded={wrapper}", "--default-runtime=bounded"]


def _apt(folder: Path, *words: str) -> None:
    command = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "--quiet", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-5:])
        raise LocalClusterError(f"`apt-get {' '.join(words)}` failed:\n{tail}")
