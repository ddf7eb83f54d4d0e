"""Control groups of a node's own: a kubelet removes the pod groups that it does not know, so no two may share a root."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .leftovers import CGROUP, Leftover
from .session import Session

_ROOT = Path("/sys/fs/cgroup")


def make_cgroups(session: Session, name: str) -> str:
    """The root group for a kubelet, in every hierarchy, removed with the session; returns its path for the kubelet."""
    folders = [hierarchy / name for hierarchy in _hierarchies()]
    session.leave(*(Leftover(CGROUP, str(folder)) for folder in folders))
    for folder in folders:
        folder.mkdir(exist_ok=True)
        # A new cpuset of version 1 is empty, and nothing can run in it.
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (folder / file).exists() and not (folder / file).read_text().strip():
                with contextlib.suppress(OSError):
                    (folder / file).write_text((folder.parent / file).read_text())
        _hand_down(folder)
    return f"/{name}"


def _hierarchies() -> list[Path]:
    """Each controller's of version 1 (some share one, by links), the one of version 2, or both."""
    if (_ROOT / "cgroup.procs").exists():
        return [_ROOT]
    return sorted({Path(os.path.realpath(path)) for path in _ROOT.iterdir() if (path / "cgroup.procs").exists()})


def _hand_down(folder: Path) -> None:
    """Version 2 alone: a group has the controllers that its parent hands down."""
    for group in (folder.parent, folder):
        if not (group / "cgroup.controllers").exists():
            continue
        for controller in (group / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (group / "cgroup.subtree_control").write_text(f"+{controller}")
