"""Clusters that outlive the command that started them: `up`, `down`, and how they recognise their own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .control_plane import is_ready, start_control_plane
from .errors import LocalClusterError
from .node import NodeCluster, NodeOptions, loader, prepare_node, start_node_in
from .node_world import NAME as WORLD
from .paths import checked_name, clusters_dir, locked, private_file
from .processes import Identity
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
from .session import recorded, start_on_free_ports, stop_recorded, sweep


def up(name: str, *, say: Say, nodes: int = 0) -> Cluster:
    """The running cluster of that name, started where there is none. Without nodes it is a control plane alone.

    Raises:
        LocalClusterError: the one that runs has another number of nodes, or none can be started.
    """
    if chosen_provider() == EXISTING:
        cluster = existing_cluster()
        say(f"using the cluster {cluster.name} at {cluster.server}")
        return cluster
    with _lock(name, say):
        found = running(name)
        if found is not None:
            _check_nodes(found, nodes)
            say(f"cluster {name} is already up at {found.server}")
            return found
        state = clusters_dir() / name
        if state.exists():
            say(f"cluster {name} left files of processes that no longer run; starting anew")
            stop_recorded(state)
        cluster = _start_node(name, state, nodes, say) if nodes else _start_plane(name, state, say)
        try:
            _write(cluster, state)
            cluster.detach()
        except BaseException:
            cluster.stop()
            raise
        say(f"cluster {name} is up at {cluster.server}; `down` stops it")
        if isinstance(cluster, NodeCluster):
            say(_about_nodes(cluster))
        return cluster


def _start_plane(name: str, state: Path, say: Say) -> Cluster:
    bin_dir = programs_dir(say)
    say(f"starting cluster {name}: etcd first")
    plane = start_control_plane(
        bin_dir,
        name=name,
        new_state_dir=lambda: _fresh(state),
        with_manager=has_controller_manager(),
        say=say,
    )
    return cluster_of(name, plane, bin_dir)


def _start_node(name: str, state: Path, nodes: int, say: Say) -> Cluster:
    programs = prepare_node(say)
    sweep()  # what a killed one left may hold a range
    say(f"starting cluster {name} with {nodes} node{'s' if nodes > 1 else ''}")
    return start_on_free_ports(
        lambda: _fresh(state),
        lambda session: start_node_in(session, programs, name, NodeOptions(nodes), say),
    )


def _check_nodes(found: Cluster, wanted: int) -> None:
    there = len(found.nodes) if isinstance(found, NodeCluster) else 0
    if wanted not in (0, there):
        raise LocalClusterError(
            f"cluster {found.name} is up with {there} nodes, not {wanted}; stop it with `down`, or use another --name."
        )


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
        token = json.loads((state / "kubeconfig").read_text(encoding="utf-8"))["users"][0]["user"]["token"]
        cluster = _read(name, state, record[1])
    except (OSError, ValueError, KeyError):
        return None  # Stopped by somebody else just now.
    return cluster if is_ready(cluster.server, state / "ca.crt", token) else None


def load(name: str, archive: Path, *, say: Say) -> None:
    """Bring the images of an archive onto the nodes of a running cluster."""
    found = existing_or_running(name)
    if not isinstance(found, NodeCluster):
        raise LocalClusterError(f"cluster {found.name} has no node of ours to bring an image onto.")
    found.load_image(archive)
    say(f"loaded {archive} onto {', '.join(found.nodes)}")


def status(name: str) -> str:
    if chosen_provider() == EXISTING:
        cluster = existing_cluster()
        return f"existing: context {cluster.name} at {cluster.server}"
    found = running(name)
    if found is not None:
        manager = "with" if found.has_controller_manager else "without"
        text = f"up: {found.server}, {manager} a controller manager, state in {found.state_dir}"
        return f"{text}\n{_about_nodes(found)}" if isinstance(found, NodeCluster) else text
    state = clusters_dir() / name
    return f"down, with files of a cluster that no longer runs in {state}" if state.exists() else "down"


def _about_nodes(cluster: NodeCluster) -> str:
    return (
        f"{', '.join(cluster.nodes)}: pods reach what listens on {cluster.host_address} here; "
        f"hostPath volumes belong into {cluster.volumes}"
    )


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
    kept: dict[str, Any] = {
        "server": cluster.server,
        "kubectl": str(cluster.kubectl),
        "has_controller_manager": cluster.has_controller_manager,
    }
    if isinstance(cluster, NodeCluster):
        kept["node"] = {
            "host_address": cluster.host_address,
            "nodes": cluster.nodes,
            "volumes": str(cluster.volumes),
            "programs": str(cluster.programs),
        }
    private_file(state / "cluster.json", json.dumps(kept, indent=1))


def _read(name: str, state: Path, programs: Mapping[str, Identity]) -> Cluster:
    """What `_write` wrote; raises OSError, ValueError or KeyError where it is not whole."""
    kept = json.loads((state / "cluster.json").read_text(encoding="utf-8"))
    common: dict[str, Any] = {
        "name": name,
        "kubeconfig": state / "kubeconfig",
        "server": kept["server"],
        "kubectl": Path(kept["kubectl"]),
        "provider": NATIVE,
        "has_controller_manager": kept["has_controller_manager"],
        "state_dir": state,
        "_stop": lambda: down(name, say=lambda _: None),
    }
    node = kept.get("node")
    if node is None:
        return Cluster(**common)
    folder = Path(node["programs"])
    return NodeCluster(
        **common,
        host_address=node["host_address"],
        nodes=tuple(node["nodes"]),
        volumes=Path(node["volumes"]),
        programs=folder,
        _load=loader(folder, programs[WORLD].pid, len(node["nodes"])),
    )


def _fresh(state: Path) -> Path:
    state.mkdir(mode=0o700)
    return state


def _lock(name: str, say: Say) -> AbstractContextManager[None]:
    path = clusters_dir() / f"{checked_name(name)}.lock"
    return locked(path, lambda: say(f"another command works on cluster {name}, waiting for it"))
