"""The one process that a node lives in: with it end its namespaces, and with those every process, mount and link in them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import LocalClusterError
from .leftovers import process
from .node_build import search_path
from .session import Session

NAME = "namespaces"
# What the node's programs write to by fixed paths; folders of the cluster lie on top of the machine's there.
_HIDDEN = ("/run", "/var/log", "/var/lib")
# The first process. As it ignores the signal, the kernel buries its children, which are orphaned shims.
# A kubelet sets what is the whole kernel's; here it sets copies.
_FIRST = r"""
set -e
state=$1
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind "$state/var-log" /var/log
mount --bind "$state/var-lib" /var/lib
mkdir /run/lock /run/kernel
for name in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
  if [ -e "/proc/sys/$name" ]; then
    copy=/run/kernel/$(echo "$name" | tr / -)
    cat "/proc/sys/$name" >"$copy"
    mount --bind "$copy" "/proc/sys/$name"
  fi
done
echo 1 >/proc/sys/net/ipv4/ip_forward
: >"$state/entered"
trap '' CHLD
exec sleep infinity
"""


@dataclass(frozen=True)
class World:
    """The namespaces of one cluster. `pid` is their first process, seen from outside, and `unshare` its parent."""

    session: Session
    unshare: int
    pid: int

    @property
    def wrap(self) -> tuple[str, ...]:
        """Starts a program in there that ends with the one that is seen here."""
        return ("nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "setpriv", "--pdeathsig", "KILL", "--")

    def path(self, inner: str) -> Path:
        """A path of the world, seen from outside."""
        return world_path(self.pid, inner)

    def start(self, name: str, argv: Sequence[str | Path], *, path: Sequence[Path] = ()) -> None:
        folders = [*(str(item) for item in path), search_path()]
        self.session.start(name, [*self.wrap, *argv], env={"PATH": ":".join(folders)})


def create_world(session: Session, uses: Sequence[Path]) -> World:
    """Start the first process. `uses` are folders that must be seen from inside.

    Raises:
        LocalClusterError: one of them is where the world has something of its own, or namespaces are refused.
    """
    state = session.state_dir
    for folder in (state, *uses):
        hidden = next((top for top in _HIDDEN if folder.resolve().is_relative_to(top)), None)
        if hidden is not None:
            raise LocalClusterError(f"{folder} is below {hidden}, which a node hides: set TMPDIR or the cache elsewhere.")
    for name in ("var-log", "var-lib"):
        (state / name).mkdir()
    argv = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    pid = session.start(NAME, [*argv, "sh", "-c", _FIRST, "sh", state])
    session.wait_until((state / "entered").exists, what="the node's namespaces", seconds=60, program=NAME)
    first = first_process(pid)
    session.leave(process(first))
    return World(session, pid, first)


def world_path(first: int, inner: str) -> Path:
    """A path of the world with that first process, seen from outside."""
    return Path(f"/proc/{first}/root{inner}")


def first_process(unshare: int) -> int:
    """The child of that `unshare`."""
    text = Path(f"/proc/{unshare}/task/{unshare}/children")
    if text.exists():
        return int(text.read_text().split()[0])
    shown = subprocess.run(["ps", "--ppid", str(unshare), "-o", "pid="], capture_output=True, text=True, check=True)
    return int(shown.stdout.split()[0])
