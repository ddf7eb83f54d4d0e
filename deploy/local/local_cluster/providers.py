"""One way to get a cluster for a test or a shell, whoever provides it: started here, or there already."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .build import build
from .control_plane import PROGRAMS, ControlPlane, start_control_plane
from .errors import LocalClusterError
from .paths import checked_name, new_run_dir
from .session import Running, sweep

PROVIDER_VARIABLE = "CLUSTER_PROVIDER"
ASSETS_VARIABLE = "KUBEBUILDER_ASSETS"
NATIVE, EXISTING = "native", "existing"
# A provider that runs a whole node becomes a third entry here and a third branch in `start`.
PROVIDERS = (NATIVE, EXISTING)

Say = Callable[[str], None]


def silent(_: str) -> None:
    """The default listener: tests do not narrate."""


@dataclass(frozen=True)
class Cluster(Running):
    """Where the cluster is and what it can do. As a context manager it is stopped at the end."""

    name: str
    kubeconfig: Path
    server: str
    kubectl: Path
    provider: str
    has_controller_manager: bool
    state_dir: Path | None = None


def start(name: str = "test", *, say: Say = silent) -> Cluster:
    """A cluster that ends with this process at the latest, even when that is killed."""
    provider = chosen_provider()
    if provider == EXISTING:
        return existing_cluster()
    sweep()
    bin_dir = programs_dir(say)
    plane = start_control_plane(
        bin_dir,
        name=checked_name(name),
        new_state_dir=lambda: new_run_dir(name),
        with_manager=has_controller_manager(),
        say=say,
    )
    return cluster_of(name, plane, bin_dir)


def cluster_of(name: str, plane: ControlPlane, bin_dir: Path) -> Cluster:
    return Cluster(
        name=name,
        kubeconfig=plane.kubeconfig,
        server=plane.server,
        kubectl=bin_dir / "kubectl",
        provider=NATIVE,
        has_controller_manager=plane.has_controller_manager,
        state_dir=plane.session.state_dir,
        _stop=plane.session.stop,
        _detach=plane.session.detach,
    )


def chosen_provider() -> str:
    value = os.environ.get(PROVIDER_VARIABLE) or NATIVE
    if value not in PROVIDERS:
        raise LocalClusterError(
            f"{PROVIDER_VARIABLE}={value!r} names no provider; use one of: {', '.join(PROVIDERS)} (unset means {NATIVE})."
        )
    return value


def programs_dir(say: Say) -> Path:
    """The folder with the programs: the user's, where the variable names one, else our build."""
    assets = os.environ.get(ASSETS_VARIABLE)
    if not assets:
        return build(say=say)
    # Not resolved: the programs may be symlinks to one binary that looks at the name it is started under.
    folder = Path(assets).expanduser().absolute()
    missing = [name for name in PROGRAMS if not os.access(folder / name, os.X_OK)]
    if missing:
        raise LocalClusterError(
            f"{ASSETS_VARIABLE}={assets!r} holds no {', '.join(missing)}; "
            f"name a folder with {', '.join(PROGRAMS)}, or unset it to have them built."
        )
    return folder


def has_controller_manager() -> bool:
    """The variable promises three programs; what else lies beside them is not relied upon."""
    return not os.environ.get(ASSETS_VARIABLE)


def existing_cluster() -> Cluster:
    """Whatever KUBECONFIG names. Never started and never stopped by us."""
    named = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    kubeconfig = Path(named).expanduser()
    if not kubeconfig.is_file():
        raise LocalClusterError(
            f"{PROVIDER_VARIABLE}={EXISTING} uses the cluster that KUBECONFIG names, "
            f"and {named!r} is not one file; set KUBECONFIG to the file of a running cluster."
        )
    kubectl = _existing_kubectl()
    command = [str(kubectl), f"--kubeconfig={kubeconfig}", "config", "view", "--minify", "-o", "json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    if shown.returncode != 0:
        raise LocalClusterError(f"kubectl cannot read {kubeconfig}: {shown.stderr.strip()}")
    view = json.loads(shown.stdout)
    return Cluster(
        name=view["current-context"],
        kubeconfig=kubeconfig,
        server=view["clusters"][0]["cluster"]["server"],
        kubectl=kubectl,
        provider=EXISTING,
        has_controller_manager=True,
    )


def _existing_kubectl() -> Path:
    assets = os.environ.get(ASSETS_VARIABLE)
    if assets and os.access(Path(assets) / "kubectl", os.X_OK):
        return Path(assets).absolute() / "kubectl"
    found = shutil.which("kubectl")
    if found is None:
        raise LocalClusterError(
            f"{PROVIDER_VARIABLE}={EXISTING} needs kubectl on PATH or in {ASSETS_VARIABLE}; there is none."
        )
    return Path(found)
