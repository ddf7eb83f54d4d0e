"""What runs on a node: containerd, kubelet, kube-proxy; and the scheduler that sends pods there."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .control_plane import Certificates, ControlPlane, component_flags
from .credentials import Account, write_kubeconfig
from .errors import LocalClusterError
from .node_build import PAUSE_IMAGE, tool
from .node_network import Network
from .node_world import World

_PATIENCE = 120.0
_CONTAINERD = """\
version = 3
root = {root}
state = {state}
oom_score = 0

[grpc]
  address = {socket}

[plugins."io.containerd.cri.v1.images"]
  snapshotter = {snapshotter}
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = {pause}

[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [{plugins}]
    conf_dir = {network}
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = {runc}
        SystemdCgroup = false
"""


@dataclass(frozen=True)
class Timings:
    """How soon a cluster gives a node up, in whole seconds; by default as late as Kubernetes does."""

    lost_after: int = 40
    """Without a sign of life for so long, a node is not ready."""
    evicted_after: int = 300
    """Then its pods are told to end, so much later (where they say nothing of their own)."""

    @property
    def server_flags(self) -> tuple[str, ...]:
        return (
            f"--default-not-ready-toleration-seconds={self.evicted_after}",
            f"--default-unreachable-toleration-seconds={self.evicted_after}",
        )

    @property
    def manager_flags(self) -> tuple[str, ...]:
        period = max(1, min(5, self.lost_after // 4))
        return (f"--node-monitor-grace-period={self.lost_after}s", f"--node-monitor-period={period}s")

    @property
    def kubelet(self) -> dict[str, Any]:
        # A lease is renewed each quarter of its time.
        return {
            "nodeLeaseDurationSeconds": max(4, self.lost_after),
            "nodeStatusUpdateFrequency": f"{max(1, min(10, self.lost_after // 4))}s",
        }


@dataclass(frozen=True)
class Agent:
    """One node: its name, number from 1, control groups, certificate, and account at the API server."""

    name: str
    number: int
    cgroup: str
    certificate: Certificates
    account: Account

    @property
    def containerd(self) -> str:
        return f"containerd-{self.number}"

    @property
    def kubelet(self) -> str:
        return f"kubelet-{self.number}"

    @property
    def socket(self) -> str:
        return containerd_socket(self.number)


@dataclass(frozen=True)
class Agents:
    """Starts them in one world. `kube` and `programs` are the folders of the binaries."""

    world: World
    network: Network
    kube: Path
    programs: Path
    timings: Timings

    def start_containerd(self, agent: Agent) -> None:
        folder = self._folder(agent)
        plugins = folder / "cni"
        plugins.mkdir()
        (plugins / "10-node.conflist").write_text(json.dumps(self._cni(agent), indent=1))
        config = folder / "containerd.toml"
        values = {
            "root": f"/var/lib/{agent.containerd}",
            "state": f"/run/{agent.containerd}",
            "socket": agent.socket,
            "pause": PAUSE_IMAGE,
            "snapshotter": _snapshotter(self.world.session.state_dir),
            "plugins": self.programs,
            "network": plugins,
            "runc": tool("runc"),
        }
        config.write_text(_CONTAINERD.format(**{name: json.dumps(str(value)) for name, value in values.items()}))
        self.world.start(agent.containerd, [self.programs / "containerd", f"--config={config}"], path=[self.programs])

    def load(self, agent: Agent, archive: Path) -> None:
        """Bring the images of an archive (docker or OCI) onto a node.

        Raises:
            LocalClusterError: containerd's own words.
        """
        self.world.session.wait_until(
            self.world.path(agent.socket).exists, what="containerd's socket", seconds=_PATIENCE, program=agent.containerd
        )
        load_image(self.programs, self.world.path(agent.socket), archive)

    def start_kubelet(self, agent: Agent, plane: ControlPlane) -> None:
        folder = self._folder(agent)
        kubeconfig = write_kubeconfig(
            folder / "kubeconfig", name="local", server=plane.server, ca=plane.ca, account=agent.account
        )
        config = folder / "kubelet.json"
        config.write_text(json.dumps(self._kubelet(agent, folder), indent=1))
        self.world.start(
            agent.kubelet,
            [
                self.kube / "kubelet",
                f"--config={config}",
                f"--kubeconfig={kubeconfig}",
                f"--hostname-override={agent.name}",
                f"--node-ip={self.network.node(agent.number)}",
                # Sockets lie in it, and their paths are short.
                f"--root-dir=/var/lib/{agent.kubelet}",
                f"--cert-dir={folder / 'pki'}",
                # To lower it takes a capability that not every root has.
                "--oom-score-adj=0",
            ],
        )

    def start_scheduler(self, plane: ControlPlane, account: Account) -> None:
        self.world.start(
            "kube-scheduler",
            [
                self.kube / "kube-scheduler",
                *component_flags(plane, "scheduler", account),
                f"--cert-dir={self.world.session.state_dir / 'scheduler'}",
            ],
        )

    def start_proxy(self, plane: ControlPlane, account: Account, node: str) -> None:
        """One for all nodes, since they share one network namespace."""
        kubeconfig = write_kubeconfig(
            self.world.session.state_dir / "proxy.kubeconfig",
            name="local",
            server=plane.server,
            ca=plane.ca,
            account=account,
        )
        self.world.start(
            "kube-proxy",
            [
                self.kube / "kube-proxy",
                f"--kubeconfig={kubeconfig}",
                f"--hostname-override={node}",
                "--proxy-mode=nftables",
                f"--cluster-cidr={self.network.pods}",
                # Two pods on one bridge: their answers would pass by what has to translate them back.
                "--masquerade-all",
                # These are the whole kernel's.
                "--conntrack-max-per-core=0",
                "--conntrack-min=0",
                "--conntrack-tcp-timeout-established=0",
                "--conntrack-tcp-timeout-close-wait=0",
            ],
        )

    def _folder(self, agent: Agent) -> Path:
        folder = self.world.session.state_dir / agent.name
        folder.mkdir(exist_ok=True)
        return folder

    def _cni(self, agent: Agent) -> dict[str, Any]:
        bridge = {
            "type": "bridge",
            "bridge": f"cni{agent.number}",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": f"/run/cni-{agent.number}",
                "ranges": [[{"subnet": str(self.network.pods_of(agent.number))}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "1.0.0", "name": agent.name, "plugins": [bridge, portmap]}

    def _kubelet(self, agent: Agent, folder: Path) -> dict[str, Any]:
        address = self.network.node(agent.number)
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            # Two kubelets in one network namespace: each on its own address.
            "address": address,
            "healthzBindAddress": address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(agent.certificate.ca)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(agent.certificate.certificate),
            "tlsPrivateKeyFile": str(agent.certificate.key),
            "containerRuntimeEndpoint": f"unix://{agent.socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": agent.cgroup,
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "podLogsDir": f"/var/log/pods-{agent.number}",
            "volumePluginDir": str(folder / "plugins"),
            "resolvConf": "",
            # The disk is the machine's; how full it is is not this node's to judge.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {
                "memory.available": "0%",
                "nodefs.available": "0%",
                "nodefs.inodesFree": "0%",
                "imagefs.available": "0%",
                "imagefs.inodesFree": "0%",
            },
            **self.timings.kubelet,
        }


def _snapshotter(folder: Path) -> str:
    """Layers of images are laid over each other by the kernel, but not where the folder is such an overlay itself."""
    shown = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(folder)], capture_output=True, text=True, check=False
    )
    return "native" if shown.stdout.strip().startswith("overlay") else "overlayfs"


def containerd_socket(number: int) -> str:
    """Inside the world, where the path is short enough for one."""
    return f"/run/containerd-{number}.sock"


def load_image(programs: Path, socket: Path, archive: Path) -> None:
    """See :meth:`Agents.load`; for a cluster that another process started."""
    command = [str(programs / "ctr"), f"--address={socket}", "--namespace=k8s.io", "images", "import", "-"]
    with archive.open("rb") as stream:
        done = subprocess.run(command, stdin=stream, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LocalClusterError(f"containerd does not take {archive}: {(done.stderr or done.stdout).strip()}")
