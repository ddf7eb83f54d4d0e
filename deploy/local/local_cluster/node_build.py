"""What a node needs besides the Kubernetes programs: containerd and network plugins, Debian's tools, one image."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from .errors import NodeUnavailable
from .go_build import GoSource, Say, architecture, compile_once, pinned_version

NODE_SOURCE = Path(__file__).resolve().parent.parent / "node"
CONTAINERD_MODULE = "github.com/containerd/containerd/v2"
PROGRAMS = (
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "bridge",
    "host-local",
    "loopback",
    "portmap",
    "pause",
)
PAUSE_IMAGE = "localhost/pause:1"
"""The image of deploy/local/node/pause: it holds a pod together, and runs the steps of a test."""
_PAUSE_ARCHIVE = "pause.tar"
# Program and the Debian package that brings it.
_TOOLS = {
    "runc": "runc",
    "nft": "nftables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "iptables": "iptables",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
}
_TOOL_PATH = os.pathsep.join(["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"])
_NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")
_LAYER, _CONFIG = "layer.tar", "config.json"


def check_machine() -> None:
    """Whether a node can run here at all.

    Raises:
        NodeUnavailable: it cannot; says why, and what would be needed.
    """
    if sys.platform != "linux":
        raise NodeUnavailable(f"a node needs Linux, and this is {sys.platform}; a control plane alone runs here.")
    if os.geteuid() != 0:
        raise NodeUnavailable("a node needs root (namespaces, mounts, routes), and this is another user; try sudo.")
    if tool("unshare") is None:
        raise NodeUnavailable("a node needs unshare, from the package util-linux; there is none.")
    tried = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise NodeUnavailable(f"a node needs namespaces of its own, and they are refused here: {tried.stderr.strip()}")
    if not Path("/sys/fs/cgroup").is_dir():
        raise NodeUnavailable("a node needs control groups, and /sys/fs/cgroup is no folder here.")


def ensure_tools(say: Say) -> None:
    """Install the Debian packages that are missing, where that is possible.

    Raises:
        NodeUnavailable: names the packages that somebody has to install.
    """
    packages = missing_packages()
    if not packages:
        return
    advice = f"a node needs the programs of these Debian packages: {' '.join(packages)}; install them and try again"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NodeUnavailable(f"{advice}.")
    say(f"installing the Debian packages that a node needs: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "-o", "DPkg::Lock::Timeout=300", *command],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    if missing_packages():
        tail = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-5:])
        raise NodeUnavailable(f"{advice}. apt-get could not:\n{tail}")


def missing_packages() -> list[str]:
    return sorted({package for program, package in _TOOLS.items() if tool(program) is None})


def tool(program: str) -> str | None:
    """Its path; the folders of administrators are looked through too, which a user's PATH may lack."""
    return shutil.which(program, path=search_path())


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), _TOOL_PATH])


def build_node_programs(say: Say) -> Path:
    """The folder with containerd, its shim and client, the network plugins and `pause`; built once."""
    version = pinned_version(NODE_SOURCE, CONTAINERD_MODULE)
    flags = (
        "-trimpath",
        "-buildvcs=false",
        "-tags=no_btrfs,no_devmapper,no_zfs,no_nri",
        "-ldflags",
        f"-s -w -X {CONTAINERD_MODULE}/version.Version={version}",
    )
    # "tool" stands for every program that the go.mod names as one.
    source = GoSource(NODE_SOURCE, version, flags, PROGRAMS, ("tool", "./pause"))
    announcement = "building containerd {version} and the network plugins with {go}: about two minutes the first time, kept"
    return compile_once(source, "node", announcement, say)


def pause_archive(programs: Path) -> Path:
    """The image as `docker save` would write it, with the one program in it."""
    path = programs / _PAUSE_ARCHIVE
    if not path.exists():
        fresh = programs / f"{_PAUSE_ARCHIVE}.{os.getpid()}"
        write_image(fresh, PAUSE_IMAGE, programs / "pause")
        fresh.replace(path)
    return path


def write_image(path: Path, tag: str, program: Path) -> None:
    """An image archive without Docker: one static program in one layer, started as a user without rights."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        _add(tar, program.name, program.read_bytes(), mode=0o755)
    config = {
        "architecture": architecture(),
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"], "User": "65532:65532", "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = [{"Config": _CONFIG, "RepoTags": [tag], "Layers": [_LAYER]}]
    with tarfile.open(path, mode="w") as tar:
        _add(tar, _LAYER, layer.getvalue())
        _add(tar, _CONFIG, json.dumps(config).encode())
        _add(tar, "manifest.json", json.dumps(manifest).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes, *, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
