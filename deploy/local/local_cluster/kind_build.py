"""What kind needs and no registry brings here: kind itself, kubeadm, CoreDNS, the provisioner of volumes, crictl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .build import COMMON_FLAGS, kubernetes_ldflags
from .go_build import GoSource, Say, compile_once, pinned_version

KIND_SOURCE = Path(__file__).resolve().parent.parent / "kind"
KUBEADM = "k8s.io/kubernetes/cmd/kubeadm"
_CRICTL = "sigs.k8s.io/cri-tools/cmd/crictl"
_KIND = "sigs.k8s.io/kind"
_PROVISIONER = "github.com/rancher/local-path-provisioner"


@dataclass(frozen=True)
class Programs:
    """Folders: of kind, kubeadm, crictl and coredns, and of the provisioner of volumes."""

    main: Path
    storage: Path


def build_kind_programs(say: Say) -> Programs:
    """Built once. Two builds, as Go takes no two modules together whose names differ in a capital letter alone (logrus)."""
    flags = (*COMMON_FLAGS, kubernetes_ldflags(pinned_version(KIND_SOURCE, "k8s.io/kubernetes")))
    version = pinned_version(KIND_SOURCE, _KIND)
    main = GoSource(
        KIND_SOURCE, version, flags, ("crictl", "kubeadm", "coredns", "kind"), (_KIND, KUBEADM, _CRICTL, "./coredns")
    )
    storage = GoSource(
        KIND_SOURCE, pinned_version(KIND_SOURCE, _PROVISIONER), flags, (_PROVISIONER.rpartition("/")[2],), (_PROVISIONER,)
    )
    announcement = "building kind {version}, kubeadm and CoreDNS with {go}: about three minutes the first time, kept"
    return Programs(
        compile_once(main, "kind", announcement, say),
        compile_once(
            storage, "local-path-provisioner", "building the provisioner of volumes {version} with {go}: a minute", say
        ),
    )
