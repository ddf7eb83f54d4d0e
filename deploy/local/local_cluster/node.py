"""A whole Kubernetes on this machine: a control plane and one or two nodes that run pods, in namespaces of their own.

Everything lives below one process; the supervisor of the session ends it with whoever started it, and then takes away
what outlives processes: control groups, the link, the unreachable range.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .control_plane import PROGRAMS, ControlPlane, Place, api_get, check_programs, start_at
from .credentials import Account
from .errors import LocalClusterError, NodeUnavailable
from .node_agents import Agent, Agents, Timings, containerd_socket, load_image
from .node_build import build_node_programs, check_machine, ensure_tools, pause_archive
from .node_cgroups import make_cgroups
from .node_network import Network, claim_network, connect, inside
from .node_world import World, create_world, first_process, world_path
from .paths import checked_name, new_run_dir
from .processes import LOOPBACK
from .providers import NATIVE, PROVIDER_VARIABLE, Cluster, Say, chosen_provider, programs_dir, silent
from .session import Session, start_on_free_ports, sweep

if TYPE_CHECKING:
    from .node_certificates import Authority

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


@dataclass(frozen=True)
class NodePrograms:
    """The folders of the Kubernetes programs, and of containerd and its company."""

    kube: Path
    node: Path


@dataclass(frozen=True)
class NodeOptions:
    nodes: int = 1
    images: Sequence[Path] = ()
    timings: Timings = field(default_factory=Timings)
    server_flags: Sequence[str] = ()


def start_node(
    nodes: int = 1,
    *,
    name: str = "test",
    images: Sequence[Path] = (),
    timings: Timings | None = None,
    server_flags: Sequence[str] = (),
    say: Say = silent,
) -> NodeCluster:
    """A cluster with that many nodes, which ends with this process at the latest, even when that is killed.

    `images` are archives to be brought onto every node, `server_flags` go to the API server besides its usual ones.

    Raises:
        NodeUnavailable: this machine cannot; says why.
        LocalClusterError: something did not start.
    """
    programs = prepare_node(say)
    sweep()
    options = NodeOptions(nodes, images, timings or Timings(), server_flags)
    return start_on_free_ports(
        lambda: new_run_dir(name),
        lambda session: start_node_in(session, programs, checked_name(name), options, say),
    )


def prepare_node(say: Say) -> NodePrograms:
    """What a node consists of; built or installed first where something is missing.

    Raises:
        NodeUnavailable: this machine can run no node; says why.
    """
    if chosen_provider() != NATIVE:
        raise NodeUnavailable(f"{PROVIDER_VARIABLE}={chosen_provider()} has its own nodes; unset it to start one here.")
    check_machine()
    ensure_tools(say)
    kube = programs_dir(say)
    check_programs(kube, KUBE_PROGRAMS)
    return NodePrograms(kube, build_node_programs(say))


def start_node_in(session: Session, programs: NodePrograms, name: str, options: NodeOptions, say: Say) -> NodeCluster:
    """Start it all in a session that is there already."""
    from .node_certificates import Authority  # who wants no node needs no library for certificates

    if not 1 <= options.nodes <= MOST_NODES:
        raise LocalClusterError(f"{options.nodes} nodes cannot be started here, only 1 to {MOST_NODES}.")
    state = session.state_dir
    volumes = state / "volumes"
    volumes.mkdir()

    network = claim_network(session)
    say(f"the node's namespaces: {network.range}, with this machine at {network.host}")
    world = create_world(session, [programs.kube, programs.node])
    connect(network, session, world.wrap, world.pid, options.nodes)
    authority = Authority(state / "pki", state / "ca.crt")
    starter = Agents(world, network, programs.kube, programs.node, options.timings)
    agents = {agent.name: agent for agent in _agents(session, network, authority, options.nodes)}
    for agent in agents.values():
        starter.start_containerd(agent)

    scheduler, proxy = Account(_SCHEDULER), Account(_PROXY)
    accounts = (scheduler, proxy, *(agent.account for agent in agents.values()))
    place = _place(world, network, authority, accounts, options)
    plane = start_at(place, session, programs.kube, name, with_manager=True, say=say)
    starter.start_scheduler(plane, scheduler)
    say(f"starting the kubelet of {', '.join(agents)}")
    for agent in agents.values():
        starter.load(agent, pause_archive(programs.node))
        starter.start_kubelet(agent, plane)
    starter.start_proxy(plane, proxy, next(iter(agents)))
    load = loader(programs.node, world.unshare, options.nodes)
    for archive in options.images:
        load(archive)
    for agent in agents.values():
        _wait_ready(plane, agent)
    return NodeCluster(
        name=name,
        kubeconfig=plane.kubeconfig,
        server=plane.server,
        kubectl=programs.kube / "kubectl",
        provider=NATIVE,
        has_controller_manager=True,
        state_dir=state,
        host_address=network.host,
        nodes=tuple(agents),
        volumes=volumes,
        programs=programs.node,
        _stop=session.stop,
        _detach=session.detach,
        _load=load,
        _kill=lambda node: session.end(agents[node].kubelet),
        _restart=lambda node: starter.start_kubelet(agents[node], plane),
    )


def _agents(session: Session, network: Network, authority: Authority, count: int) -> list[Agent]:
    made = []
    for number in range(1, count + 1):
        name = f"node-{number}"
        made.append(
            Agent(
                name,
                number,
                make_cgroups(session, f"checkpoint-node-{network.slot}-{number}"),
                authority.server(name, [network.node(number)], [name]),
                Account(f"system:node:{name}", "system:nodes"),
            )
        )
    return made


def _place(
    world: World, network: Network, authority: Authority, accounts: tuple[Account, ...], options: NodeOptions
) -> Place:
    """Where the control plane runs, so that it knows its nodes and they know it."""
    client = authority.client(_KUBELET_CLIENT, "system:masters")
    service = "kubernetes.default.svc"
    return Place(
        address=network.server,
        services=str(network.services),
        wrap=world.wrap,
        enter=lambda: inside(world.pid),
        certificates=authority.server(
            "kube-apiserver",
            [network.server, network.service(1), LOOPBACK],
            ["kubernetes", "kubernetes.default", service, f"{service}.cluster.local"],
        ),
        accounts=accounts,
        server_flags=(
            f"--client-ca-file={authority.ca}",
            f"--kubelet-certificate-authority={authority.ca}",
            f"--kubelet-client-certificate={client.certificate}",
            f"--kubelet-client-key={client.key}",
            # Else `kubectl logs` looks the node's name up in the DNS.
            "--kubelet-preferred-address-types=InternalIP",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            *options.timings.server_flags,
            *options.server_flags,
        ),
        manager_flags=options.timings.manager_flags,
    )


def loader(programs: Path, unshare: int, nodes: int) -> Callable[[Path], None]:
    """What brings an archive onto each node of the world below the process `unshare`."""

    def load(archive: Path) -> None:
        for number in range(1, nodes + 1):
            load_image(programs, world_path(first_process(unshare), containerd_socket(number)), archive)

    return load


def _wait_ready(plane: ControlPlane, agent: Agent) -> None:
    def ready() -> bool:
        status, text = api_get(plane.server, f"/api/v1/nodes/{agent.name}", plane.ca, plane.admin.token)
        if status != 200:
            return False
        conditions = json.loads(text)["status"].get("conditions", [])
        return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)

    # By name, so that a kubelet that ends or hangs is the one whose log is shown.
    plane.session.wait_until(ready, what=f"{agent.name} to be Ready", seconds=_PATIENCE, program=agent.kubelet)
