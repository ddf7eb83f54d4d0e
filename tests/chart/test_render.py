"""What Helm makes of the chart, with the values of many installations; no cluster is needed."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_world import INSTALLATIONS, one, pods, rights
from manifests import CHART, ROOT, ChartError, Manifest, is_hook, plain_manifests, render
from pydantic.alias_generators import to_snake

import checkpoint_operator
from checkpoint_operator.controller import commands
from checkpoint_operator.controller.config import ENV_PREFIX, Settings
from checkpoint_operator.controller.config_jobs import JobRules, load_job_rules

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())

every_installation = pytest.mark.parametrize("values", INSTALLATIONS.values(), ids=INSTALLATIONS)


@pytest.mark.parametrize("path", dict(plain_manifests()), ids=lambda path: path.name)
def test_the_plain_manifests_are_what_the_chart_renders(path: Path) -> None:
    assert path.read_text() == dict(plain_manifests())[path], "run `make generate` and commit the outcome"


def test_no_plain_manifest_is_left_over() -> None:
    assert set((ROOT / "deploy" / "manifests").iterdir()) == set(dict(plain_manifests()))


def test_chart_image_and_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"] == checkpoint_operator.__version__
    assert one(render(), "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"].endswith(
        f":{project['version']}"
    )


def test_every_value_says_what_it_is() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    undocumented = []
    for number, line in enumerate(lines):
        found = re.match(r"( *)([A-Za-z]+):(.*)", line)
        if found and not line.lstrip().startswith("#"):
            opens_a_group = not found[3].strip() and found[2] not in ("resources", "hookResources")
            inside_resources = found[2] in ("requests", "limits") and len(found[1]) > 0
            if not opens_a_group and not inside_resources and "#" not in lines[number - 1]:
                undocumented.append(found[2])
    assert not undocumented


def keys(values: Any, schema: Any, path: str = "") -> set[str]:
    """Where values and schema do not name the same keys."""
    if "additionalProperties" not in schema or schema["additionalProperties"] is not False or "properties" not in schema:
        return set()
    # What must not be said in `settings` is listed there, as false.
    known = {name for name, inner in schema["properties"].items() if inner is not False and (path or name != "global")}
    differ = {f"{path}{name}" for name in known ^ set(values)}
    for name in known & set(values):
        differ |= keys(values[name], schema["properties"][name], f"{path}{name}.")
    return differ


def test_the_schema_knows_exactly_the_values_that_there_are() -> None:
    assert not keys(VALUES, SCHEMA)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"imag": {"tag": "1"}}, "additional properties 'imag' not allowed"),
        ({"limits": {"maxMover": 3}}, "additional properties 'maxMover' not allowed"),
        ({"limits": {"maxMovers": 0}}, "at '/limits/maxMovers': minimum: got 0, want 1"),
        ({"limits": {"maxMovers": "many"}}, "at '/limits/maxMovers': got string, want integer"),
        ({"executor": "jobs"}, "at '/executor': value must be one of 'job', 'inline'"),
        ({"watchNamespaces": ["Team_A"]}, "at '/watchNamespaces/0'"),
        ({"image": {"digest": "sha256:abc"}}, "at '/image/digest'"),
        ({"movers": {"allowedEndpoints": ["minio.example"]}}, "at '/movers/allowedEndpoints/0'"),
        ({"movers": {"allowedEndpoint": ["https://minio.example"]}}, "additional properties 'allowedEndpoint' not allowed"),
        ({"settings": {"max_movers": 3}}, "at '/settings/max_movers'"),
        ({"settings": {"maxAttempts": 3}}, "additional properties 'maxAttempts' not allowed"),
        ({"caBundle": {"pem": "/etc/ca.pem"}}, "at '/caBundle/pem'"),
        ({"resources": {"limit": {"cpu": 1}}}, "additional properties 'limit' not allowed"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: Manifest, said: str) -> None:
    with pytest.raises(ChartError, match=re.escape(said)):
        render(values=values)


def test_an_account_that_is_not_created_needs_a_name() -> None:
    with pytest.raises(ChartError, match=re.escape("serviceAccount.name is needed")):
        render(values={"serviceAccount": {"create": False}})


def test_two_bundles_are_one_too_many() -> None:
    with pytest.raises(ChartError, match=re.escape("set pem or configMap.name, not both")):
        render(values={"caBundle": {"pem": "-----BEGIN CERTIFICATE-----", "configMap": {"name": "ca"}}})


def test_a_kubernetes_that_is_too_old_is_refused() -> None:
    with pytest.raises(ChartError, match=re.escape("incompatible with Kubernetes v1.31.0")):
        render("--kube-version", "1.31.0")


@every_installation
def test_every_pod_is_restricted(values: Manifest) -> None:
    for name, pod in pods(render(values=values)):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] == security["runAsGroup"] == 65532, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"]), name
        for container in pod["containers"]:
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False, name
            assert inner["readOnlyRootFilesystem"] is True, name
            assert inner["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["requests"], name
            assert container["resources"]["limits"]["memory"], name


@every_installation
def test_every_pod_runs_our_image_and_nothing_else(values: Manifest) -> None:
    for name, pod in pods(render(values=values)):
        [container] = pod["containers"]
        assert container["command"] == ["operator"], name
        assert "initContainers" not in pod, name
        wanted = INSTALLATIONS["private registry"]["image"]
        if values.get("image"):
            assert container["image"] == f"{wanted['repository']}@{wanted['digest']}", name
            assert pod["imagePullSecrets"] == [{"name": "regcred"}], name


@every_installation
def test_no_role_of_the_chart_names_secrets_or_a_wildcard(values: Manifest) -> None:
    for manifest in render(values=values):
        assert manifest["kind"] != "Secret"
        for rule in manifest.get("rules", []) if manifest["kind"] in ("Role", "ClusterRole") else []:
            assert not any("secret" in resource for resource in rule["resources"]), manifest["metadata"]["name"]
            assert "*" not in rule["resources"] + rule["verbs"] + rule["apiGroups"], manifest["metadata"]["name"]


@every_installation
def test_no_crd_is_a_part_of_the_release(values: Manifest) -> None:
    assert all(manifest["kind"] != "CustomResourceDefinition" for manifest in render("--include-crds", values=values))


@every_installation
def test_the_operator_understands_the_file_for_its_jobs(values: Manifest, tmp_path: Path) -> None:
    (tmp_path / "bundle.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    text = one(render(values=values), "ConfigMap")["data"]["jobs.yaml"]
    path = tmp_path / "jobs.yaml"
    path.write_text(text.replace("/etc/checkpoint-operator-ca", str(tmp_path)))
    rules = load_job_rules(path)
    assert rules.progress_from_logs is values.get("progress", {}).get("fromLogs", True)
    if values.get("caBundle"):
        assert rules.ca_bundle is not None
        assert "BEGIN CERTIFICATE" in rules.ca_bundle


def test_the_chart_offers_every_rule_of_the_jobs() -> None:
    by_the_chart = {"image", "imagePullPolicy", "progressFromLogs", "caBundle", "caBundleFile"}
    offered = set(VALUES["movers"]) | by_the_chart
    assert {field.alias for field in JobRules.model_fields.values()} <= offered


def test_the_charts_defaults_are_the_operators_own(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(one(render(), "ConfigMap")["data"]["jobs.yaml"])
    rules = load_job_rules(path)
    assert rules == JobRules(image=rules.image)
    for name, value in VALUES["limits"].items():
        assert Settings.model_fields[to_snake(name)].default == value


@every_installation
def test_every_variable_is_a_setting_of_the_operator(values: Manifest) -> None:
    [container] = one(render(values=values), "Deployment")["spec"]["template"]["spec"]["containers"]
    given = {entry["name"].removeprefix(ENV_PREFIX).lower() for entry in container["env"] if ENV_PREFIX in entry["name"]}
    assert given <= set(Settings.model_fields)


def test_new_rules_start_the_operator_anew_and_new_limits_do_not() -> None:
    def checksum(values: Manifest) -> str:
        return str(one(render(values=values), "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/jobs"])

    assert checksum({"limits": {"maxMovers": 99}}) == checksum({})
    for values in ({"movers": {"allowedEndpoints": ["*"]}}, {"caBundle": {"pem": "-----BEGIN CERTIFICATE-----\n"}}):
        assert checksum(values) != checksum({})


def test_the_limits_are_a_file_of_their_own() -> None:
    data = one(render(values={"limits": {"maxMovers": 99}}), "ConfigMap")["data"]
    assert yaml.safe_load(data["limits.yaml"]) == {"maxMovers": 99, "maxMoversPerNamespace": 4, "maxMoversPerBucket": 1000}


def test_there_is_one_operator_and_never_two_at_once() -> None:
    spec = one(render(), "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_limited_to_namespaces_it_has_roles_there_and_none_for_the_cluster() -> None:
    manifests = [manifest for manifest in render(values=INSTALLATIONS["two namespaces"]) if not is_hook(manifest)]
    names = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "ClusterRole"}
    assert names == {"checkpoint-operator-view", "checkpoint-operator-edit", "checkpoint-operator-trainer"}
    assert not [manifest for manifest in manifests if manifest["kind"] == "ClusterRoleBinding"]
    roles = [manifest for manifest in manifests if manifest["kind"] == "Role"]
    assert [role["metadata"]["namespace"] for role in roles] == ["team-a", "team-b"]
    everywhere = rights(one([m for m in render() if not is_hook(m)], "ClusterRole", "checkpoint-operator"))
    assert all(rights(role) == {what: verbs for what, verbs in everywhere.items() if what != "nodes"} for role in roles)


def test_without_progress_from_logs_there_is_no_right_on_logs() -> None:
    role = one(render(values=INSTALLATIONS["no logs"]), "ClusterRole", "checkpoint-operator")
    assert not any(resource.startswith("pods/log") for resource in rights(role))


def test_inline_needs_nothing_about_jobs_and_pods() -> None:
    role = one(render(values=INSTALLATIONS["inline"]), "ClusterRole", "checkpoint-operator")
    assert {resource.rpartition(".checkpoints.rlhf.dev")[0] or resource for resource in rights(role)} == {
        "checkpointartifacts",
        "checkpointartifacts/status",
        "checkpointartifacts/finalizers",
        "events.events.k8s.io",
    }


def test_the_hooks_have_accounts_of_their_own_that_go_with_them() -> None:
    hooks = [manifest for manifest in render() if is_hook(manifest)]
    for manifest in hooks:
        annotations = manifest["metadata"]["annotations"]
        assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded", manifest["metadata"][
            "name"
        ]
    accounts = {manifest["metadata"]["name"] for manifest in hooks if manifest["kind"] == "ServiceAccount"}
    assert {pod["serviceAccountName"] for _, pod in pods(hooks)} == accounts
    assert "checkpoint-operator" not in accounts


def test_a_hook_that_can_never_succeed_is_not_tried_again() -> None:
    for name in ("crds", "finalizers", "test"):
        spec = one(render(), "Job", f"checkpoint-operator-{name}")["spec"]
        [rule] = spec["podFailurePolicy"]["rules"]
        assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, commands.OLDER]}}


def test_finalizers_come_off_after_the_operator_lost_its_rights() -> None:
    job = one(render(), "Job", "checkpoint-operator-finalizers")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-delete"


def test_two_releases_in_one_namespace_have_different_names() -> None:
    first, second = render(), render(release="other")
    assert not {(m["kind"], m["metadata"]["name"]) for m in first} & {(m["kind"], m["metadata"]["name"]) for m in second}


def test_long_names_stay_within_what_kubernetes_takes() -> None:
    for manifest in render(values={"fullnameOverride": "a" * 80}):
        assert len(manifest["metadata"]["name"]) <= 63


def test_helms_test_asks_the_service_by_its_own_variable() -> None:
    manifests = render(values={"fullnameOverride": "my-operator"})
    service = one(manifests, "Service")["metadata"]["name"]
    [container] = one(manifests, "Job", "my-operator-test")["spec"]["template"]["spec"]["containers"]
    assert f"--host=$({service.upper().replace('-', '_')}_SERVICE_HOST)" in container["args"]


def test_the_alerts_are_a_list_of_rules() -> None:
    rule = one(render(values={"prometheusRule": {"enabled": True}}), "PrometheusRule")
    assert rule["spec"]["groups"]
    for group in rule["spec"]["groups"]:
        assert all(entry["alert"] and entry["expr"] for entry in group["rules"])
