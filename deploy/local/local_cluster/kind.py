"""A cluster by kind, as users have it: kubeadm, CoreDNS and volumes on demand, on a node that is a container.

Where a Docker runs on this machine, kind uses that one, with the node image and the configuration that the user names.
Elsewhere Docker lives in namespaces that end with whoever started them, and the node image is made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from string import Template

from .build import KUBE_SOURCE, build
from .errors import LocalClusterError, NodeUnavailable
from .go_build import pinned_version
from .image import install_missing
from .kind_build import build_kind_programs
from .kind_docker import Docker, ensure_docker, machines_docker, start_docker
from .kind_image import Inputs, build_node_image, load_node_image, make_rootfs
from .leftovers import NODES, Leftover
from .node_build import build_node_programs
from .paths import cache_root, checked_name, locked, new_run_dir
from .providers import Cluster, Say, silent
from .session import Session, start_on_free_ports, sweep

PROVIDER = "kind"
IMAGE_VARIABLE, CONFIG_VARIABLE = "KIND_NODE_IMAGE", "KIND_CONFIG"
_PORT = 6443
_READY = "180s"
# Neither a kernel with control groups of version 1 nor a process without all rights is what kind expects.
_CONFIG = """\
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
networking:
  apiServerAddress: "$ADDRESS"
  apiServerPort: $PORT
  ipFamily: ipv4
  disableDefaultCNI: $OWN
  kubeProxyMode: nftables
kubeadmConfigPatches:
  - |
    kind: KubeletConfiguration
    failCgroupV1: false
    oomScoreAdj: 0
nodes:
  - role: control-plane
    extraMounts:
      - hostPath: $VOLUMES
        containerPath: $VOLUMES
"""


@dataclass(frozen=True, kw_only=True)
class KindCluster(Cluster):
    """A cluster whose pods run, on nodes that are containers."""

    host_address: str
    """What pods shall reach outside the cluster listens on this address of the machine."""
    nodes: tuple[str, ...]
    volumes: Path | None
    """A folder that is at the same path here and on every node; None: the user's configuration mounts none."""
    _load: Callable[[Path], None] = field(repr=False, compare=False)

    def load_image(self, archive: Path) -> None:
        """Bring the images of an archive onto every node, by `kind load image-archive`."""
        self._load(archive)


def prepare_kind(say: Say) -> Inputs:
    """Everything that kind needs and that is not the machine's, made once and kept.

    Raises:
        NodeUnavailable: kind cannot run here; says why.
        LocalClusterError: something could not be made.
    """
    image = os.environ.get(IMAGE_VARIABLE)
    own = machines_docker() is None
    if own and image:
        raise NodeUnavailable(
            f"{IMAGE_VARIABLE}={image!r} needs a Docker that pulls it, and none runs; unset it to have one made."
        )
    unpacked = ensure_docker(say) if own else None
    version = pinned_version(KUBE_SOURCE, "k8s.io/kubernetes")
    inputs = Inputs(build(say=say), build_node_programs(say), build_kind_programs(say), version)
    if unpacked is None:
        say(f"a Docker runs here, so kind takes {image or 'the node image that it was released with'}")
        return inputs
    if inputs.archive.exists():
        return inputs
    install_missing(("debootstrap", "zstd"), "the node image of kind", say)
    with locked(cache_root() / "kind" / "node.lock", lambda: say("another process builds the node image, waiting for it")):
        if not inputs.archive.exists():
            make_rootfs(say)
            session = Session(new_run_dir("kind-node"))
            try:
                docker, _, _ = start_docker(session, unpacked, [cache_root()], say)
                build_node_image(docker, inputs, say)
            finally:
                session.stop()
            say(f"the node image is {inputs.archive.stat().st_size / 1e6:.0f} MB: {inputs.archive}")
    return inputs


def start_kind(name: str = "test", *, images: Sequence[Path] = (), say: Say = silent) -> KindCluster:
    """A cluster that ends with this process at the latest, even when that is killed.

    Raises:
        NodeUnavailable: this machine cannot; says why.
        LocalClusterError: something did not start.
    """
    inputs = prepare_kind(say)
    sweep()
    return start_on_free_ports(
        lambda: new_run_dir(name), lambda session: _start_in(session, inputs, checked_name(name), images, say)
    )


def _start_in(session: Session, inputs: Inputs, name: str, images: Sequence[Path], say: Say) -> KindCluster:
    state = session.state_dir
    volumes = state / "volumes"
    volumes.mkdir()
    docker = machines_docker()
    image = os.environ.get(IMAGE_VARIABLE)
    address, host, port = "127.0.0.1", "", 0
    own = docker is None
    if docker is None:
        docker, network, _ = start_docker(session, ensure_docker(say), [cache_root()], say)
        address, host, port = network.server, network.host, _PORT
        say("loading the node image")
        load_node_image(docker, inputs)
        image = inputs.tag
    else:
        # A Docker that others use too: the name has to be ours alone.
        name = f"{name}-{os.getpid()}"
        session.leave(Leftover(NODES, name))
    config, mounts = _config(state, address, port, volumes, own=own)
    kubeconfig = state / "kubeconfig"
    kind = _Kind(inputs.kind.main / "kind", docker, name)
    say(f"kind create cluster{f' with {image}' if image else ''}")
    create = [f"--config={config}", f"--kubeconfig={kubeconfig}", f"--wait={_READY}", "--retain"]
    kind.run("create", "cluster", *create, *([f"--image={image}"] if image else []))
    kubeconfig.chmod(0o600)
    kubectl = inputs.kube / "kubectl"
    listed = json.loads(_kubectl(kubectl, kubeconfig, "get", "nodes"))["items"]
    view = json.loads(_kubectl(kubectl, kubeconfig, "config", "view", "--minify"))
    cluster = KindCluster(
        name=name,
        kubeconfig=kubeconfig,
        server=view["clusters"][0]["cluster"]["server"],
        kubectl=kubectl,
        provider=PROVIDER,
        has_controller_manager=True,
        state_dir=state,
        host_address=host or _gateway(docker),
        nodes=tuple(node["metadata"]["name"] for node in listed),
        volumes=volumes if mounts else None,
        _stop=lambda: _stop(kind, session),
        _load=lambda archive: kind.run("load", "image-archive", archive),
    )
    for archive in images:
        say(f"kind load image-archive {archive.name}")
        cluster.load_image(archive)
    return cluster


@dataclass(frozen=True)
class _Kind:
    program: Path
    docker: Docker
    name: str

    def run(self, *words: str | Path) -> None:
        # It ends with us: what it would go on with is taken away then.
        command = ["setpriv", "--pdeathsig", "KILL", "--", str(self.program), *map(str, words), f"--name={self.name}"]
        done = subprocess.run(command, env=dict(self.docker.environment), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            tail = "\n".join(f"    {line[:300]}" for line in done.stderr.strip().splitlines()[-25:])
            raise LocalClusterError(f"`kind {' '.join(map(str, words[:2]))}` failed:\n{tail}")


def _stop(kind: _Kind, session: Session) -> None:
    # What kind does not take away, the session does.
    with contextlib.suppress(LocalClusterError):
        if session.state_dir.exists():
            kind.run("delete", "cluster", f"--kubeconfig={session.state_dir / 'kubeconfig'}")
    session.stop()


def _config(state: Path, address: str, port: int, volumes: Path, *, own: bool) -> tuple[Path, bool]:
    """The file for kind, and whether the folder of the volumes is on the nodes then.

    Raises:
        LocalClusterError: KIND_CONFIG names no file.
    """
    given = os.environ.get(CONFIG_VARIABLE)
    if given and not Path(given).is_file():
        raise LocalClusterError(f"{CONFIG_VARIABLE}={given!r} is not a file; name a configuration of kind, or unset it.")
    text = Path(given).read_text("utf-8") if given else _CONFIG
    values = {"ADDRESS": address, "PORT": port, "VOLUMES": volumes, "OWN": str(own).lower()}
    path = state / "kind.yaml"
    path.write_text(Template(text).safe_substitute(values), "utf-8")
    return path, "$VOLUMES" in text


def _gateway(docker: Docker) -> str:
    shown = docker.run("network", "inspect", "kind", "--format", "{{range .IPAM.Config}}{{.Gateway}} {{end}}").stdout
    for text in shown.split():
        if ip_address(text).version == 4:
            return text
    raise NodeUnavailable(f"the network kind of this Docker has no address of version 4: {shown.strip()}")


def _kubectl(kubectl: Path, kubeconfig: Path, *words: str) -> str:
    command = [str(kubectl), f"--kubeconfig={kubeconfig}", *words, "--output=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LocalClusterError(f"kubectl {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout
