"""A whole Kubernetes on this machine: a control plane and one or two nodes that run pods, in namespaces of their own.

Everything lives below one process; the supervisor of the session ends it with whoever started it, and then takes away
what outlives processes: control groups, the link, the unreachable range.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .control_plane import PROGRAMS, ControlPlane, Place, api_get, check_programs, start_at
from .credentials import Account
from .errors import LocalClusterError, NodeUnavailable
from .node_agents import Agent, Agents, Timings, accounts_of, containerd_socket, load_image
from .node_build import build_node_programs, check_machine, ensure_tools, pause_archive
from .node_cgroups import make_cgroups
from .node_network import claim_network, connect, inside
from .node_world import create_world, first_process, world_path
from .paths import checked_name, new_run_dir
from .providers import NATIVE, PROVIDER_VARIABLE, Cluster, Say, chosen_provider, programs_dir, silent
from .session import Session, start_on_free_ports, sweep

KUBE_PROGRAMS = (*PROGRAMS, "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
MOST_NODES = 2
_KUBELET_CLIENT = "kube-apiserver-kubelet-client"
_SCHEDULER, _PROXY = "system:kube-scheduler", "system:kube-proxy"
_PATIENCE = 120.0


def _not_ours(_: str) -> None:
    raise LocalClusterError("another process started this cluster, and that one alone can kill and restart its kubelets.")


@dataclass(frozen=True, kw_only=True)
class NodeCluster(Cluster):
    """A cluster whose pods run."""

    host_address: str
    """What pods shall reach outside the cluster listens on this address of the machine."""
    nodes: tuple[str, ...]
    volumes: Path
    """A folder for hostPath volumes: the same path outside and on every node."""
    programs: Path
    """The folder of containerd's client and the other programs of a node."""
    _load: Callable[[Path], None] = field(repr=False, compare=False)
    _kill: Callable[[str], None] = field(default=_not_ours, repr=False, compare=False)
    _restart: Callable[[str], None] = field(default=_not_ours, repr=False, compare=False)

    def load_image(self, archive: Path) -> None:
        """Bring the images of an archive (as `docker save` or buildah write it) onto every node."""
        self._load(archive)

    def kill_kubelet(self, name: str) -> None:
        """A node that is lost without a word, at once; its pods run on."""
        self._kill(name)

    def restart_kubelet(self, name: str) -> None:
        """Start it again after :meth:`kill_kubelet`."""
        self._restart(name)


def start_node(
    nodes: int = 1,
    *,
    name: str = "test",
    images: Sequence[Path] = (),
    timings: Timings | None = None,
    say: Say = silent,
) -> NodeCluster:
    """A cluster with that many nodes, which ends with this process at the latest, even when that is killed.

    Raises:
        NodeUnavailable: this machine cannot; says why.
        LocalClusterError: something did not start.
    """
    kube, programs = prepare_node(say)
    sweep()
    return start_on_free_ports(
        lambda: new_run_dir(name),
        lambda session: start_node_in(session, kube, programs, checked_name(name), nodes, images, timings, say),
    )


def prepare_node(say: Say) -> tuple[Path, Path]:
    """The folders of the Kubernetes programs and of the node's; built or installed first where something is missing."""
    if chosen_provider() != NATIVE:
        raise NodeUnavailable(f"{PROVIDER_VARIABLE}={chosen_provider()} has its own nodes; unset it to start one here.")
    check_machine()
    ensure_tools(say)
    kube = programs_dir(say)
    check_programs(kube, KUBE_PROGRAMS)
    return kube, build_node_programs(say)


def start_node_in(
    session: Session,
    kube: Path,
    programs: Path,
    name: str,
    count: int,
    images: Sequence[Path],
    timings: Timings | None,
    say: Say,
) -> NodeCluster:
    """Start it all in a session that is there already."""
    from .node_certificates import Authority  # who wants no node needs no library for certificates

    if not 1 <= count <= MOST_NODES:
        raise LocalClusterError(f"{count} nodes cannot be started here, only 1 to {MOST_NODES}.")
    names = tuple(f"node-{number}" for number in range(1, count + 1))
    timings = timings or Timings()
    state = session.state_dir
    volumes = state / "volumes"
    volumes.mkdir()

    network = claim_network(session)
    say(f"the node's namespaces: {network.range}, with this machine at {network.host}")
    world = create_world(session, [kube, programs])
    connect(network, session, world.wrap, world.pid, count)
    authority = Authority(state / "pki", state / "ca.crt")
    accounts = accounts_of(names)
    agents = Agents(world, network, kube, programs, timings)
    made = [
        Agent(
            node,
            number,
            make_cgroups(session, f"checkpoint-node-{network.slot}-{number}"),
            authority.server(node, [network.node(number)], [node]),
            accounts[node],
        )
        for number, node in enumerate(names, 1)
    ]
    for agent in made:
        agents.start_containerd(agent)

    scheduler, proxy = Account(_SCHEDULER), Account(_PROXY)
    client = authority.client(_KUBELET_CLIENT, "system:masters")
    place = Place(
        address=network.server,
        services=str(network.services),
        wrap=world.wrap,
        enter=lambda: inside(world.pid),
        certificates=authority.server(
            "kube-apiserver",
            [network.server, network.service(1), "127.0.0.1"],
            ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"],
        ),
        accounts=(scheduler, proxy, *accounts.values()),
        server_flags=(
            f"--client-ca-file={authority.ca}",
            f"--kubelet-certificate-authority={authority.ca}",
            f"--kubelet-client-certificate={client.certificate}",
            f"--kubelet-client-key={client.key}",
            # Else `kubectl logs` looks the node's name up in the DNS.
            "--kubelet-preferred-address-types=InternalIP",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            *timings.server_flags,
        ),
        manager_flags=timings.manager_flags,
    )
    plane = start_at(place, session, kube, name, with_manager=True, say=say)
    agents.start_scheduler(plane, scheduler)
    for agent in made:
        agents.load(agent, pause_archive(programs))
        agents.start_kubelet(agent, plane)
    agents.start_proxy(plane, proxy, names[0])
    say(f"starting the kubelet of {', '.join(names)}")
    load = loader(programs, world.unshare, count)
    for archive in images:
        load(archive)
    _wait_ready(plane, made)
    by_name = {agent.name: agent for agent in made}
    return NodeCluster(
        name=name,
        kubeconfig=plane.kubeconfig,
        server=plane.server,
        kubectl=kube / "kubectl",
        provider=NATIVE,
        has_controller_manager=True,
        state_dir=state,
        host_address=network.host,
        nodes=names,
        volumes=volumes,
        programs=programs,
        _stop=session.stop,
        _detach=session.detach,
        _load=load,
        _kill=lambda node: session.end(by_name[node].kubelet),
        _restart=lambda node: agents.start_kubelet(by_name[node], plane),
    )


def loader(programs: Path, unshare: int, nodes: int) -> Callable[[Path], None]:
    """What brings an archive onto each node of the world below the process `unshare`."""

    def load(archive: Path) -> None:
        for number in range(1, nodes + 1):
            load_image(programs, world_path(first_process(unshare), containerd_socket(number)), archive)

    return load


def _wait_ready(plane: ControlPlane, agents: Sequence[Agent]) -> None:
    """Each kubelet in turn, so that one that ends or hangs is named, with the end of its log."""
    for agent in agents:

        def ready(name: str = agent.name) -> bool:
            status, text = api_get(plane.server, f"/api/v1/nodes/{name}", plane.ca, plane.admin.token)
            if status != 200:
                return False
            conditions = json.loads(text)["status"].get("conditions", [])
            return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)

        plane.session.wait_until(ready, what=f"{agent.name} to be Ready", seconds=_PATIENCE, program=agent.kubelet)
