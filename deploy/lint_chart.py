"""Lints the chart: Helm's own linter, the schemas of every Kubernetes that we support, and checkov's rules for security.

``python deploy/lint_chart.py FOLDER``, where FOLDER has checkov and kubernetes-validate: they are in an environment of their
own, because checkov pins a hundred packages. Nothing of it asks the network.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from manifests import CHART, Manifest, helm, render

# What checkov would have us do and we do not, and why.
SKIPPED = {
    "CKV_K8S_11": "no CPU limit: a throttled operator answers its probes late; the request is what it needs",
    "CKV_K8S_38": "the operator and its hooks talk to the API server: that is what they are for",
}
_DIGEST = f"sha256:{'0' * 64}"
# What is a matter of where it is installed, and right in an installation that cares.
_CAREFUL: Manifest = {
    "image": {"digest": _DIGEST, "pullPolicy": "Always"},
    "networkPolicy": {"enabled": True},
    "reserveLabels": {"enabled": True},
}
VALUES: dict[str, Manifest] = {
    "as it comes": {},
    "careful": _CAREFUL,
    "careful, in listed namespaces": {**_CAREFUL, "watchNamespaces": ["team-a", "team-b"], "rbac": {"readNodes": True}},
    "inline": {"executor": "inline"},
}


def main(tools: Path) -> int:
    """0 where nothing was found; what was found is what the tools print."""
    failed = not _run("helm lint", [str(helm()), "lint", "--strict", "--quiet", str(CHART)])
    with tempfile.TemporaryDirectory() as scratch:
        for name, values in VALUES.items():
            (Path(scratch) / f"{name.replace(' ', '-')}.yaml").write_text(yaml.safe_dump_all(render(values=values)))
        every = [str(path) for path in sorted(Path(scratch).iterdir())]
        for version in _versions(tools):
            command = [str(tools / "kubernetes-validate"), "--strict", "--quiet", "-k", version, *every]
            failed |= not _run(f"kubernetes-validate {version}", command)
        careful = [str(path) for path in sorted(Path(scratch).glob("careful*.yaml"))]
        command = [str(tools / "checkov"), "--skip-download", "--quiet", "--compact", "--framework", "kubernetes"]
        skips = ["--skip-check", ",".join(SKIPPED)]
        failed |= not _run("checkov", [*command, *skips, *(f"--file={path}" for path in careful)])
    return int(failed)


def _versions(tools: Path) -> list[str]:
    """Every version that the tool has a schema of, from the oldest that the chart installs on."""
    [schemas] = tools.parent.glob("lib/python3*/site-packages/kubernetes_validate/kubernetes-json-schema")
    supported = str(yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"])  # >=1.32.0-0
    oldest = int(supported.split(".")[1])
    minors = {int(folder.name.split(".")[1]) for folder in schemas.glob("v1.*-local-strict")}
    return [f"1.{minor}" for minor in sorted(minors) if minor >= oldest]


def _run(what: str, command: list[str]) -> bool:
    environment = {**os.environ, "CKV_SKIP_PACKAGE_UPDATE_CHECK": "true"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        print(f"{what} failed:\n{done.stdout}{done.stderr}", file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
