"""Clusters that outlive the command that started them: `up`, `down`, and how they recognise their own."""

from __future__ import annotations

import json
import shlex
from contextlib import AbstractContextManager
from pathlib import Path

from .control_plane import is_ready, start_control_plane
from .errors import LocalClusterError
from .paths import checked_name, clusters_dir, locked, private_file
from .providers import (
    EXISTING,
    NATIVE,
    Cluster,
    Say,
    chosen_provider,
    cluster_of,
    existing_cluster,
    has_controller_manager,
    programs_dir,
)
from .session import recorded, stop_recorded


def up(name: str, *, say: Say) -> Cluster:
    """The running cluster of that name, started where there is none."""
    if chosen_provider() == EXISTING:
        cluster = existing_cluster()
        say(f"using the cluster {cluster.name} at {cluster.server}")
        return cluster
    with _lock(name, say):
        found = running(name)
        if found is not None:
            say(f"cluster {name} is already up at {found.server}")
            return found
        state = clusters_dir() / name
        if state.exists():
            say(f"cluster {name} left files of processes that no longer run; starting anew")
            stop_recorded(state)
        bin_dir = programs_dir(say)
        say(f"starting cluster {name}: etcd first")
        plane = start_control_plane(
            bin_dir,
            name=name,
            new_state_dir=lambda: _fresh(state),
            with_manager=has_controller_manager(),
            say=say,
        )
        try:
            cluster = cluster_of(name, plane, bin_dir)
            _write(cluster, state)
            plane.session.detach()
        except BaseException:
            plane.session.stop()
            raise
        say(f"cluster {name} is up at {cluster.server}; `down` stops it")
        return cluster


def down(name: str, *, say: Say) -> None:
    """Stop exactly the cluster of that name. Not an error when there is none."""
    if chosen_provider() == EXISTING:
        say("the cluster that KUBECONFIG names was not started here and is left alone")
        return
    with _lock(name, say):
        state = clusters_dir() / name
        if not state.exists():
            say(f"cluster {name} is not up")
        elif stop_recorded(state):
            say(f"cluster {name} is stopped")
        else:
            say(f"cluster {name} was not running any more; its files are removed")


def running(name: str) -> Cluster | None:
    """None unless every process is the one that was recorded, and the API server says that it is ready."""
    state = clusters_dir() / checked_name(name)
    record = recorded(state)
    if record is None or not record[0].alive() or not all(item.alive() for item in record[1].values()):
        return None
    try:
        kept = json.loads((state / "cluster.json").read_text(encoding="utf-8"))
        token = json.loads((state / "kubeconfig").read_text(encoding="utf-8"))["users"][0]["user"]["token"]
        cluster = Cluster(
            name=name,
            kubeconfig=state / "kubeconfig",
            server=kept["server"],
            kubectl=Path(kept["kubectl"]),
            provider=NATIVE,
            has_controller_manager=kept["has_controller_manager"],
            state_dir=state,
            _stop=lambda: down(name, say=lambda _: None),
        )
    except (OSError, ValueError, KeyError):
        return None  # Stopped by somebody else just now.
    port = int(cluster.server.rpartition(":")[2])
    return cluster if is_ready(port, state / "ca.crt", token) else None


def status(name: str) -> str:
    if chosen_provider() == EXISTING:
        cluster = existing_cluster()
        return f"existing: context {cluster.name} at {cluster.server}"
    found = running(name)
    if found is not None:
        manager = "with" if found.has_controller_manager else "without"
        return f"up: {found.server}, {manager} a controller manager, state in {found.state_dir}"
    state = clusters_dir() / name
    return f"down, with files of a cluster that no longer runs in {state}" if state.exists() else "down"


def exports(cluster: Cluster) -> str:
    """For `eval`: the two lines that make kubectl and every client use this cluster."""
    path = shlex.quote(str(cluster.kubectl.parent))
    return f"export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}\nexport PATH={path}:$PATH"


def existing_or_running(name: str) -> Cluster:
    if chosen_provider() == EXISTING:
        return existing_cluster()
    found = running(name)
    if found is None:
        raise LocalClusterError(f"cluster {name} is not up; start it with `up`.")
    return found


def _write(cluster: Cluster, state: Path) -> None:
    kept = {
        "server": cluster.server,
        "kubectl": str(cluster.kubectl),
        "has_controller_manager": cluster.has_controller_manager,
    }
    private_file(state / "cluster.json", json.dumps(kept, indent=1))


def _fresh(state: Path) -> Path:
    state.mkdir(mode=0o700)
    return state


def _lock(name: str, say: Say) -> AbstractContextManager[None]:
    path = clusters_dir() / f"{checked_name(name)}.lock"
    return locked(path, lambda: say(f"another command works on cluster {name}, waiting for it"))
