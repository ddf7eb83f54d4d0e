"""What is built here: every Kubernetes program as one binary, and the programs of other pinned Go modules."""

from __future__ import annotations

from pathlib import Path

from .go_build import GoSource, Say, compile_once, pinned_version

_LOCAL = Path(__file__).resolve().parent.parent
KUBE_SOURCE = _LOCAL / "kube"
VERSITYGW_SOURCE = _LOCAL / "versitygw"
NAMES = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)
COMMON_FLAGS = ("-trimpath", "-buildvcs=false", "-ldflags")


class Source(GoSource):
    """The source of the Kubernetes programs."""

    @classmethod
    def of(cls, folder: Path) -> Source:
        version = pinned_version(folder, "k8s.io/kubernetes")
        return cls(folder, version, (*COMMON_FLAGS, kubernetes_ldflags(version)), NAMES)


def kubernetes_ldflags(version: str) -> str:
    """What tells a Kubernetes program its version; without it they say v0.0.0 and clients complain about it."""
    major, minor, _ = version.removeprefix("v").split(".")
    variables = {
        "k8s.io/component-base/version.gitVersion": version,
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/client-go/pkg/version.gitVersion": version,
    }
    return " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in variables.items())])


def build(source: Path = KUBE_SOURCE, *, say: Say = print) -> Path:
    """The folder with the Kubernetes programs; built first where the cache does not hold this very source yet."""
    announcement = "building Kubernetes {version} with {go}: about nine minutes on two cores the first time, kept afterwards"
    return compile_once(Source.of(source), "kube", announcement, say)


def build_go_program(folder: Path, package: str, name: str, say: Say, *, module: str | None = None) -> Path:
    """The executable `name`, compiled from `package` as the go.mod and go.sum of `folder` pin it.

    `module` is the module that the package belongs to, by default the package itself without a `/cmd/…` at its end.
    """
    version = pinned_version(folder, module or package.partition("/cmd/")[0])
    source = GoSource(folder, version, (*COMMON_FLAGS, "-s -w"), (name,), (package,))
    announcement = f"building {name} {{version}} with {{go}}: a minute or two the first time, kept afterwards"
    return compile_once(source, name, announcement, say) / name


def build_versitygw(say: Say = print) -> Path:
    """The second S3 server of the tests, see :mod:`local_cluster.versitygw`."""
    return build_go_program(VERSITYGW_SOURCE, "github.com/versity/versitygw/cmd/versitygw", "versitygw", say)
