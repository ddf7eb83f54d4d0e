"""Renders the chart with Helm, and the plain manifests in deploy/manifests/ from it, for who applies YAML with kubectl.

The hooks are left out: ``kubectl apply -f crds/`` does what the first one does, docs/upgrade.md says how to do the second.
"""

import functools
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from local_cluster.helm import ensure_helm

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "charts" / "checkpoint-operator"
FOLDER = ROOT / "deploy" / "manifests"
RELEASE, NAMESPACE = "checkpoint-operator", "checkpoint-system"
HOOK = "helm.sh/hook"

Manifest = dict[str, Any]

# kubectl applies a folder by the names of its files; what a user may want without the rest is a file of its own.
_FILES = {
    "10-rbac.yaml": ("ServiceAccount", "ClusterRole", "ClusterRoleBinding"),
    "20-operator.yaml": ("ConfigMap", "Service", "Deployment"),
}
_USER_ROLES = ("-view", "-edit", "-trainer")
_HEADER = "# Rendered from charts/checkpoint-operator by `make generate`: do not edit.\n"


class ChartError(Exception):
    """Helm did not render the chart; the message is its own."""


class Dumper(yaml.SafeDumper):
    """YAML without anchors, and long texts as they are: people read it before they apply it."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, _represent_text)


@functools.cache
def helm() -> Path:
    return ensure_helm(lambda line: print(line, flush=True))


def render(
    *arguments: str, values: Manifest | None = None, release: str = RELEASE, namespace: str = NAMESPACE
) -> list[Manifest]:
    """Every object of the chart with these values, hooks included.

    Raises:
        ChartError: Helm refuses.
    """
    text = _template((release, str(CHART), "--namespace", namespace, *arguments), yaml.safe_dump(values or {}))
    return [document for document in yaml.safe_load_all(text) if document]


@functools.cache
def _template(arguments: tuple[str, ...], values: str) -> str:
    command = [str(helm()), "template", *arguments, "--values", "-"]
    done = subprocess.run(command, input=values, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ChartError(done.stderr.strip())
    return done.stdout


def is_hook(manifest: Manifest) -> bool:
    return HOOK in manifest["metadata"].get("annotations", {})


def plain_manifests() -> Iterator[tuple[Path, str]]:
    """(path, content) of every file of deploy/manifests/."""
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    rendered = [_without_helm(manifest) for manifest in render() if not is_hook(manifest)]
    people = [manifest for manifest in rendered if manifest["metadata"]["name"].endswith(_USER_ROLES)]
    ours = [manifest for manifest in rendered if manifest not in people]
    yield FOLDER / "00-namespace.yaml", _dump([namespace])
    for name, kinds in _FILES.items():
        yield FOLDER / name, _dump([manifest for manifest in ours if manifest["kind"] in kinds])
    yield FOLDER / "30-roles-for-people.yaml", _dump(people)
    forgotten = [manifest["kind"] for manifest in ours if not any(manifest["kind"] in kinds for kinds in _FILES.values())]
    if forgotten:
        raise ChartError(f"deploy/manifests.py has no file for {', '.join(forgotten)}")


def _without_helm(manifest: Manifest) -> Manifest:
    """Without the labels that would say that Helm manages this."""
    labels = {
        name: value
        for name, value in manifest["metadata"]["labels"].items()
        if name not in ("helm.sh/chart", "app.kubernetes.io/managed-by")
    }
    return {**manifest, "metadata": {**manifest["metadata"], "labels": labels}}


def _dump(manifests: Sequence[Manifest]) -> str:
    return _HEADER + "---\n".join(
        yaml.dump(manifest, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True) for manifest in manifests
    )
