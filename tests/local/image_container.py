"""The image as a container: unpacked from its archive and run by runc, as tightly as a pod of the operator is."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class UnpackedImage:
    """``config`` is the image's own; ``root`` its files."""

    config: dict[str, Any]
    root: Path
    names: tuple[str, ...]

    @classmethod
    def of(cls, archive: Path, folder: Path) -> UnpackedImage:
        with tarfile.open(archive) as outer:
            (manifest,) = json.load(_member(outer, "manifest.json"))
            config = json.load(_member(outer, manifest["Config"]))["config"]
            root = folder / "rootfs"
            for layer in manifest["Layers"]:
                with tarfile.open(fileobj=_member(outer, layer)) as inner:
                    assert not [name for name in inner.getnames() if Path(name).name.startswith(".wh.")]
                    inner.extractall(root, filter="fully_trusted")  # noqa: S202 - it is ours
        return cls(config, root, tuple(manifest["RepoTags"]))

    def run(
        self, *command: str, environment: dict[str, str] | None = None, mounts: tuple[tuple[Path, str, bool], ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end: the image's user, no capability, a read-only root, no network, /tmp in memory.

        ``mounts``: (a folder of ours, where it appears inside, whether it may be written).
        """
        bundle = self.root.parent
        variables = [*self.config["Env"], *(f"{name}={value}" for name, value in (environment or {}).items())]
        user, group = (int(part) for part in self.config["User"].split(":"))
        binds = [
            {"destination": inside, "type": "bind", "source": str(ours), "options": ["bind", "rw" if write else "ro"]}
            for ours, inside, write in mounts
        ]
        for _, inside, _ in mounts:
            (self.root / inside.removeprefix("/")).mkdir(exist_ok=True)
        spec = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": user, "gid": group},
                "args": list(command),
                "env": variables,
                "cwd": self.config.get("WorkingDir") or "/",
                "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted")},
                "noNewPrivileges": True,
            },
            "root": {"path": str(self.root), "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
                *binds,
            ],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
        }
        (bundle / "config.json").write_text(json.dumps(spec))
        state = bundle / "runc"
        return subprocess.run(
            ["runc", "--root", str(state), "run", "--bundle", str(bundle), f"image-test-{uuid.uuid4().hex[:12]}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"]},
            timeout=120,
        )


def _member(archive: tarfile.TarFile, name: str) -> Any:
    stream = archive.extractfile(name)
    assert stream is not None
    return stream
