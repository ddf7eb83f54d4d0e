"""The node image of kind where no registry brings one: kind builds it itself, from Debian's packages and our programs.

It is not the official one (another Debian, a bridge instead of kindnet, one node), but the same kind, kubeadm, systemd and
containerd. What takes time is kept: the image as one compressed archive, by the content of everything that is in it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import LocalClusterError
from .go_build import Say, architecture
from .go_toolchain import SETTINGS, find_go
from .kind_build import KIND_SOURCE, Programs
from .kind_docker import Docker
from .paths import cache_root, remove_tree

_SUITE = "bookworm"
_PACKAGES = (
    *("systemd", "conntrack", "iptables", "nftables", "iproute2", "ethtool", "util-linux", "mount", "kmod", "libseccomp2"),
    *("pigz", "e2fsprogs", "ca-certificates", "curl", "jq", "procps", "runc", "busybox-static"),
)
_FILES = KIND_SOURCE / "node"
_ARCHIVES_KEPT = 2
_BASE = "checkpoint-operator-kind-base:1"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PLUGINS = ("bridge", "host-local", "loopback", "portmap")
_KUBE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy")
_INSTALLED = ("kubelet", "kubectl")


@dataclass(frozen=True)
class Inputs:
    """Folders of programs that a node image is made of: Kubernetes, what a node needs, what kind needs."""

    kube: Path
    node: Path
    kind: Programs
    version: str

    @property
    def tag(self) -> str:
        return f"kindest/node:{self.version}-{self._key}"

    @property
    def archive(self) -> Path:
        return cache_root() / "kind" / f"node-{self.version}-{self._key}.tar.zst"

    @property
    def _key(self) -> str:
        digest = hashlib.sha256("\0".join([_SUITE, *_PACKAGES, architecture()]).encode())
        for folder in (self.kube, self.node, self.kind.main, self.kind.storage):
            digest.update(folder.name.encode() + b"\0")
        for path in [Path(__file__), *sorted(_FILES.iterdir())]:
            digest.update(path.read_bytes() + b"\0")
        return digest.hexdigest()[:12]


def make_rootfs(say: Say) -> Path:
    """A Debian with the packages of a node; the slow part that needs neither Docker nor our programs.

    Raises:
        LocalClusterError: debootstrap's last words.
    """
    key = hashlib.sha256("\0".join([_SUITE, *_PACKAGES]).encode()).hexdigest()[:12]
    target = _work() / f"rootfs-{key}"
    if target.exists():
        return target
    say(f"making a Debian {_SUITE} with the packages of a node (about a minute)")
    fresh = _work() / "rootfs"
    if fresh.exists():
        remove_tree(fresh)
    # What it mounts in there, an interrupted one would leave.
    alone = ("unshare", "--mount", "--propagation", "private", "--kill-child", "--fork")
    _run([*alone, "debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", _SUITE, str(fresh)])
    fresh.rename(target)
    return target


def build_node_image(docker: Docker, inputs: Inputs, say: Say) -> None:
    """Build it in that Docker and keep it as an archive."""
    debian, sources = make_rootfs(say), _kind_sources(say)
    say("building the base of the node image")
    root = _work() / "node"
    if root.exists():
        remove_tree(root)
    _run(["cp", "--archive", "--reflink=auto", str(debian), str(root)])
    _configure(root, sources, inputs)
    without = [f"--exclude=./{path}" for path in ("dev/*", "var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*")]
    base = _work() / "base.tar"
    _run(["tar", "--create", "--file", str(base), *without, "--directory", str(root), "."])
    changes = [f"ENV {_PATH}", "ENV container=docker"]
    changes.append('ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]')
    docker.run("import", *(word for change in changes for word in ("--change", change)), base, _BASE)
    base.unlink()

    say("packing the programs of Kubernetes as its release does")
    release = _work() / "kubernetes.tar.gz"
    _pack_release(release, inputs, sources, root)
    remove_tree(root)
    say("kind build node-image")
    scratch = _work() / "tmp"
    if scratch.exists():
        remove_tree(scratch)
    scratch.mkdir()
    _run(
        [
            *(str(inputs.kind.main / "kind"), "build", "node-image", "--type", "file", "--arch", architecture()),
            *("--base-image", _BASE, "--image", inputs.tag, str(release)),
        ],
        {**docker.environment, "TMPDIR": str(scratch)},
    )
    release.unlink()
    remove_tree(scratch)
    say("keeping the node image")
    fresh = inputs.archive.with_suffix(".new")
    _pipe([str(docker.client), "save", inputs.tag], ["zstd", "-T0", "-3", "--long=27", "-q", "-f", "-o", str(fresh)], docker)
    fresh.rename(inputs.archive)
    for old in sorted(inputs.archive.parent.glob("node-*.tar.zst"), key=lambda path: path.stat().st_mtime)[:-_ARCHIVES_KEPT]:
        old.unlink()
    remove_tree(debian)


def load_node_image(docker: Docker, inputs: Inputs) -> None:
    _pipe(["zstd", "--decompress", "--long=27", "--stdout", str(inputs.archive)], [str(docker.client), "load"], docker)


def _configure(root: Path, sources: Path, inputs: Inputs) -> None:
    files = sources / "images" / "base" / "files"
    for path in sorted(files.rglob("*")):
        if path.is_file():
            # The sources of a module are read-only.
            _copy(path, root / path.relative_to(files), 0o644)
    for name in ("containerd", "containerd-shim-runc-v2", "ctr"):
        _copy(inputs.node / name, root / "usr/local/bin" / name, 0o755)
    _copy(inputs.kind.main / "crictl", root / "usr/local/bin/crictl", 0o755)
    for name in _PLUGINS:
        _copy(inputs.node / name, root / "opt/cni/bin" / name, 0o755)
    _copy(_FILES / "keep-kernel-settings.sh", root / "kind/bin/keep-kernel-settings.sh", 0o755)
    _copy(_FILES / "10-bridge.conflist", root / "etc/cni/net.d/10-bridge.conflist", 0o644)
    script = root / "configure.sh"
    _copy(_FILES / "configure.sh", script, 0o755)
    _run(["chroot", str(root), "/configure.sh"])
    script.unlink()


def _pack_release(target: Path, inputs: Inputs, sources: Path, root: Path) -> None:
    """What a release of Kubernetes has in its server archive: programs, and four images.

    kind pulls what these lack and looks at the first image of each alone, so four images have all tags that it wants.
    """
    listed = _output([str(inputs.kind.main / "kubeadm"), "config", "images", "list", "--kubernetes-version", inputs.version])
    wanted = listed.split()
    dns = [tag for tag in wanted if "coredns" in tag]
    control = [tag for tag in wanted if "coredns" not in tag and "pause" not in tag]
    network, storage = _kindest(sources, "const_cni.go"), _kindest(sources, "const_storage.go")
    sandbox = re.findall(r'sandbox_image = "([^"]+)"', (root / "etc/containerd/config.toml").read_text("utf-8"))

    kube = (inputs.kube / "kubelet").resolve()
    busybox = root / "bin/busybox"
    libraries = _libraries(root, "usr/sbin/nft")
    control_files = [(kube, f"usr/local/bin/{kube.name}"), *((root / path, path) for path in ("usr/sbin/nft", *libraries))]
    control_links = {f"usr/local/bin/{name}": kube.name for name in (*_KUBE, "etcd")}
    provisioner = (inputs.kind.storage / "local-path-provisioner").resolve()
    storage_files = [(provisioner, "usr/local/bin/local-path-provisioner"), (busybox, "bin/busybox")]
    storage_links = {f"bin/{name}": "busybox" for name in ("sh", "mkdir", "rm")}
    images = [
        _image("kube-apiserver", control, control_files, control_links),
        _image("kube-controller-manager", dns, [(inputs.kind.main / "coredns", "coredns")], {}, ["/coredns"]),
        _image("kube-scheduler", [*sandbox, *network], [(inputs.node / "pause", "pause")], {}, ["/pause"]),
        _image("kube-proxy", storage, storage_files, storage_links),
    ]
    programs = [(inputs.kind.main / "kubeadm", "kubeadm"), *((inputs.kube / name, name) for name in _INSTALLED)]
    with gzip.open(target, "wb", compresslevel=1) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        _add(tar, "kubernetes/version", f"{inputs.version}\n".encode())
        for path, name in [*programs, *((image, image.name) for image in images)]:
            tar.add(path.resolve(), f"kubernetes/server/bin/{name}")
    for image in images:
        image.unlink()


def _image(
    name: str,
    tags: Sequence[str],
    files: Sequence[tuple[Path, str]],
    links: dict[str, str],
    entrypoint: Sequence[str] = (),
) -> Path:
    """An archive as `docker save` writes it, of one layer with these files (from, to) and symbolic links."""
    layer = _work() / f"{name}.layer"
    with tarfile.open(layer, "w") as tar:
        for source, path in files:
            entry = tar.gettarinfo(source.resolve(), path)
            entry.type, entry.mode, entry.uid, entry.gid, entry.mtime = tarfile.REGTYPE, 0o755, 0, 0, 0
            entry.size = source.stat().st_size
            with source.open("rb") as stream:
                tar.addfile(entry, stream)
        for path, target in links.items():
            link = tarfile.TarInfo(path)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        folder = tarfile.TarInfo("tmp")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(folder)
    with layer.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    config = {
        "architecture": architecture(),
        "os": "linux",
        "config": {"Env": [_PATH], "Entrypoint": list(entrypoint), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    archive = _work() / f"{name}.tar"
    with tarfile.open(archive, "w") as tar:
        _add(
            tar,
            "manifest.json",
            json.dumps([{"Config": "config.json", "RepoTags": list(tags), "Layers": ["layer.tar"]}]).encode(),
        )
        _add(tar, "config.json", json.dumps(config).encode())
        tar.add(layer, "layer.tar")
    layer.unlink()
    return archive


def _libraries(root: Path, program: str) -> list[str]:
    """The shared libraries of a program in that Debian, and what links them, relative to it."""
    shown = _output(["chroot", str(root), "ldd", f"/{program}"])
    found = [path.lstrip("/") for path in re.findall(r"(/[^ ]+) \(0x", shown)]
    return sorted(set(found))


def _kind_sources(say: Say) -> Path:
    """The folder of kind's module, with the files of its base image."""
    go = find_go(KIND_SOURCE / "go.mod", say)
    environment = {**os.environ, **SETTINGS}
    command = [str(go), "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kind"]
    shown = subprocess.run(command, cwd=KIND_SOURCE, env=environment, capture_output=True, text=True, check=False)
    if shown.returncode != 0 or not shown.stdout.strip():
        raise LocalClusterError(f"the sources of kind are missing: {shown.stderr.strip()}")
    return Path(shown.stdout.strip())


def _kindest(sources: Path, name: str) -> list[str]:
    text = (sources / "pkg" / "build" / "nodeimage" / name).read_text("utf-8")
    return re.findall(r'= "(docker\.io/kindest/[^"]+)"', text)


def _copy(source: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))


def _work() -> Path:
    folder = cache_root() / "kind" / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Its output goes into a log. Raises LocalClusterError with the log's end."""
    log = cache_root() / "kind" / "node-image.log"
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode != 0:
        tail = "\n".join(f"    {line[:300]}" for line in log.read_text("utf-8", "replace").splitlines()[-15:])
        raise LocalClusterError(f"{command[0]} failed (status {done.returncode}):\n{tail}\nFull log: {log}")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LocalClusterError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _pipe(first: list[str], second: list[str], docker: Docker) -> None:
    environment = dict(docker.environment)
    with subprocess.Popen(first, stdout=subprocess.PIPE, env=environment) as source:
        done = subprocess.run(second, stdin=source.stdout, env=environment, capture_output=True, text=True, check=False)
    if source.returncode != 0 or done.returncode != 0:
        raise LocalClusterError(f"{first[0]} | {second[0]} failed: {done.stderr.strip()}")
