"""The API as users meet it on a real API server: what it accepts, what it says no to and how, what kubectl shows."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from uri_cases import BAD, GOOD

import local_cluster as lc
from local_cluster.operator_process import ROOT, kubectl

NAMESPACE = "crd"


@pytest.fixture(scope="module")
def api(cluster: lc.Cluster) -> Iterator[Callable[..., Any]]:
    kubectl(cluster, "create", "namespace", NAMESPACE)

    def run(*arguments: str, body: dict[str, Any] | None = None, check: bool = False) -> Any:
        stdin = json.dumps(body) if body else None
        return kubectl(cluster, "-n", NAMESPACE, *arguments, stdin=stdin, check=check)

    yield run
    run("delete", "ckpt", "--all")


def body_of(name: str, **spec: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "source": {"persistentVolumeClaim": {"claimName": "output"}, "path": "checkpoint-2"},
        "target": {"uri": "s3://bucket/runs/checkpoint-2"},
    }
    for key, value in spec.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            base[key] = {**base[key], **value}
        else:
            base[key] = value
    return {
        "apiVersion": "checkpoints.rlhf.dev/v1alpha1",
        "kind": "CheckpointArtifact",
        "metadata": {"name": name},
        "spec": base,
    }


FULL: dict[str, Any] = {
    "artifactType": "model",
    "source": {
        "include": ["*.safetensors"],
        "exclude": ["optimizer.pt"],
        "readiness": {"timeoutSeconds": 60, "stableSeconds": 0},
    },
    "target": {
        "layout": "Unique",
        "credentialsSecretRef": {"name": "keys"},
        "endpoint": "https://minio.example:9000",
        "region": "us-east-1",
        "s3": {"forcePathStyle": True, "storageClass": "STANDARD_IA", "sseKMSKeyID": "alias/k"},
    },
    "training": {
        "jobName": "dpo-llama",
        "algorithm": "dpo",
        "baseModel": "meta-llama/Llama-2-7b-hf",
        "peftMethod": "lora",
        "step": 1000,
        "totalSteps": 3000,
        "finalLoss": "0.31",
        "stage": "Intermediate",
    },
    "metrics": [{"name": "eval_loss", "value": "0.42"}],
    "version": "3",
    "parentRef": {"name": "dpo-llama-step-500"},
    "tags": {"experiment": "production"},
    "deletionPolicy": "Delete",
    "mover": {
        "resources": {"requests": {"cpu": 1, "memory": "256Mi"}},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "low",
        "serviceAccountName": "mover",
        "runAsUser": 1000,
        "maxBytesPerSecond": 1000000,
        "labels": {"a": "b"},
        "annotations": {"a": "b"},
    },
    "suspend": True,
}


def test_applying_the_crd_gives_no_warning(api: Callable[..., Any]) -> None:
    done = api("apply", "-f", str(ROOT / "crds"))
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_crd_is_in_good_standing(api: Callable[..., Any]) -> None:
    crd = json.loads(api("get", "crd", "checkpointartifacts.checkpoints.rlhf.dev", "-o", "json").stdout)
    conditions = {condition["type"]: condition["status"] for condition in crd["status"]["conditions"]}
    assert conditions["Established"] == "True"
    assert conditions["NamesAccepted"] == "True"
    assert "NonStructuralSchema" not in conditions


def test_every_field_of_the_spec_is_accepted_and_kept(api: Callable[..., Any]) -> None:
    body = body_of("full", **FULL)
    done = api("create", "--validate=strict", "-f", "-", body=body)
    assert done.returncode == 0, done.stderr
    assert json.loads(api("get", "ckpt", "full", "-o", "json").stdout)["spec"] == body["spec"]


def test_what_is_left_out_gets_its_default(api: Callable[..., Any]) -> None:
    assert api("create", "-f", "-", body=body_of("defaults")).returncode == 0
    spec = json.loads(api("get", "ckpt", "defaults", "-o", "json").stdout)["spec"]
    assert (spec["artifactType"], spec["target"]["layout"], spec["deletionPolicy"], spec["suspend"]) == (
        "checkpoint",
        "Plain",
        "Retain",
        False,
    )


def test_an_unknown_field_is_named(api: Callable[..., Any]) -> None:
    done = api("create", "-f", "-", body=body_of("unknown", source={"pth": "x"}))
    assert done.returncode != 0
    assert 'unknown field "spec.source.pth"' in done.stderr


@pytest.mark.parametrize("uri", GOOD)
def test_the_api_server_accepts_the_uris_that_the_library_accepts(api: Callable[..., Any], uri: str) -> None:
    target: dict[str, Any] = {"uri": uri}
    if uri.startswith("file:"):
        target["persistentVolumeClaim"] = {"claimName": "archive"}
    done = api("create", "--dry-run=server", "-f", "-", body=body_of("good-uri", target=target))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("uri", BAD)
def test_the_api_server_refuses_the_uris_that_the_library_refuses(api: Callable[..., Any], uri: str) -> None:
    target: dict[str, Any] = {"uri": uri}
    if uri.startswith("file:"):
        target["persistentVolumeClaim"] = {"claimName": "archive"}
    done = api("create", "--dry-run=server", "-f", "-", body=body_of("bad-uri", target=target))
    assert done.returncode != 0
    assert "spec.target.uri" in done.stderr


@pytest.mark.parametrize(
    "uri",
    ["s3://me:hunter2@bucket/x", "https://me:hunter2@bucket/x", "s3://bucket/x?sig=hunter2", "s3://BUCKET/x?sig=hunter2"],
)
def test_a_secret_in_a_uri_is_refused_and_our_message_does_not_repeat_it(api: Callable[..., Any], uri: str) -> None:
    done = api("create", "--dry-run=server", "-f", "-", body=body_of("secret", target={"uri": uri}))
    assert done.returncode != 0
    assert "spec.target.uri" in done.stderr
    # The API server itself quotes the value, to whoever sent it.
    assert "hunter2" not in done.stderr.replace(f'Invalid value: "{uri}"', "")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a path that leaves the claim": ({"source": {"path": "../other"}}, "spec.source.path '../other' must be relative"),
    "an absolute path": ({"source": {"path": "/etc"}}, "spec.source.path '/etc' must be relative"),
    "a path with an empty segment": ({"source": {"path": "a//b"}}, "spec.source.path 'a//b' must be relative"),
    "a path with a newline": ({"source": {"path": "a\nb"}}, "must be relative"),
    "a file target without its claim": (
        {"target": {"uri": "file:///x"}},
        "spec.target.persistentVolumeClaim is required for file://",
    ),
    "a claim for a target that is no file": (
        {"target": {"persistentVolumeClaim": {"claimName": "archive"}}},
        "must be left out for every other scheme",
    ),
    "S3 options for another store": (
        {"target": {"uri": "gs://bucket/x", "s3": {}}},
        "spec.target.s3 is for s3:// URIs only",
    ),
    "Azure options for another store": (
        {"target": {"azure": {"account": "abc"}}},
        "spec.target.azure is for azure:// URIs only",
    ),
    "an endpoint that holds a password": (
        {"target": {"endpoint": "https://me:pw@minio.example"}},
        "spec.target.endpoint",
    ),
    "a loss that is no decimal": ({"training": {"finalLoss": "low"}}, "spec.training.finalLoss"),
    "a loss that is a number": ({"training": {"finalLoss": 0.31}}, "spec.training.finalLoss"),
    "a step beyond the last one": ({"training": {"step": 2, "totalSteps": 1}}, "step must not be above"),
    "a negative step": ({"training": {"step": -1}}, "spec.training.step"),
    "an unknown type": ({"artifactType": "weights"}, '"checkpoint", "model", "dataset", "config"'),
    "an unknown layout": ({"target": {"layout": "Flat"}}, '"Plain", "Unique"'),
    "an unknown policy": ({"deletionPolicy": "Keep"}, '"Retain", "Delete"'),
    "a metric twice": ({"metrics": [{"name": "a", "value": "1"}, {"name": "a", "value": "2"}]}, "Duplicate value"),
    "root as the mover's user": ({"mover": {"runAsUser": 0}}, "spec.mover.runAsUser"),
    "itself as its parent": ({"parentRef": {"name": "refused"}}, "an artifact cannot continue itself"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_by_name(api: Callable[..., Any], case: tuple[dict[str, Any], str]) -> None:
    spec, says = case
    done = api("create", "--dry-run=server", "-f", "-", body=body_of("refused", **spec))
    assert done.returncode != 0
    assert says in done.stderr


@pytest.mark.parametrize("field", ["tags", "mover.labels", "mover.annotations", "mover.nodeSelector"])
def test_a_key_of_any_length_is_refused_so_that_no_object_is_a_megabyte(api: Callable[..., Any], field: str) -> None:
    def create(length: int) -> Any:
        free: Any = {"k" * length: "v"}
        for name in reversed(field.split(".")):
            free = {name: free}
        return api("create", "--dry-run=server", "-f", "-", body=body_of("long-keys", **free))

    assert create(317).returncode == 0
    refused = create(318)
    assert refused.returncode != 0
    assert f"spec.{field}" in refused.stderr
    assert "keys have at most 317 characters" in refused.stderr


def test_a_name_that_cannot_become_a_label_is_refused(api: Callable[..., Any]) -> None:
    done = api("create", "--dry-run=server", "-f", "-", body=body_of("n" * 64))
    assert "metadata.name must be at most 63 characters" in done.stderr


def test_a_source_and_a_target_are_required(api: Callable[..., Any]) -> None:
    body = body_of("empty")
    body["spec"] = {}
    done = api("create", "--dry-run=server", "-f", "-", body=body)
    assert "spec.source: Required value" in done.stderr
    assert "spec.target: Required value" in done.stderr


# Field → (a first value, another one). Each is tried as set → other, set → unset, unset → set.
IMMUTABLE: dict[str, tuple[Any, Any]] = {
    "artifactType": ("model", "config"),
    "source.persistentVolumeClaim": ({"claimName": "a"}, {"claimName": "b"}),
    "source.path": ("a", "b"),
    "source.include": (["a"], ["b"]),
    "source.exclude": (["a"], ["b"]),
    "target.uri": ("s3://bucket/a", "s3://bucket/b"),
    "target.layout": ("Plain", "Unique"),
    "target.endpoint": ("https://a", "https://b"),
    "target.region": ("a", "b"),
    "target.s3": ({"forcePathStyle": True}, {"forcePathStyle": False}),
    "training": ({"step": 1}, {"step": 2}),
    "version": ("1", "2"),
    "parentRef": ({"name": "a"}, {"name": "b"}),
}
REQUIRED = {"source.persistentVolumeClaim", "source.path", "target.uri"}
DEFAULTED = {"artifactType", "target.layout"}


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


def patch(api: Callable[..., Any], name: str, path: str, value: Any) -> Any:
    # A merge patch: null takes the field away.
    return api("patch", "ckpt", name, "--type=merge", "-p", json.dumps({"spec": nested(path, value)}))


@pytest.mark.parametrize("path", IMMUTABLE)
def test_what_describes_the_stored_data_is_immutable(api: Callable[..., Any], path: str) -> None:
    first, other = IMMUTABLE[path]
    name = f"immutable-{path.lower().replace('.', '-')}"
    assert api("create", "-f", "-", body=body_of(name, **nested(path, first))).returncode == 0
    refused = f"spec.{path} is immutable"
    assert refused in patch(api, name, path, other).stderr
    if path not in REQUIRED | DEFAULTED:
        assert refused in patch(api, name, path, None).stderr
        assert api("create", "-f", "-", body=body_of(f"{name}-unset")).returncode == 0
        assert refused in patch(api, f"{name}-unset", path, first).stderr
        assert patch(api, f"{name}-unset", "tags", {"a": "b"}).returncode == 0
    assert patch(api, name, path, first).returncode == 0, "the same value again must be fine"


MUTABLE: dict[str, tuple[Any, Any]] = {
    "tags": ({"a": "b"}, {"a": "c"}),
    "metrics": ([{"name": "a", "value": "1"}], [{"name": "b", "value": "2"}]),
    "suspend": (True, False),
    "deletionPolicy": ("Delete", "Retain"),
    "mover": ({"runAsUser": 1}, {"runAsUser": 2}),
    "source.readiness": ({"timeoutSeconds": 1}, {"timeoutSeconds": 2}),
    "target.credentialsSecretRef": ({"name": "a"}, {"name": "b"}),
}


@pytest.mark.parametrize("path", MUTABLE)
def test_what_may_have_to_be_cured_later_is_mutable(api: Callable[..., Any], path: str) -> None:
    name = f"mutable-{path.lower().replace('.', '-')}"
    assert api("create", "-f", "-", body=body_of(name)).returncode == 0
    for value in (*MUTABLE[path], None, MUTABLE[path][0]):
        done = patch(api, name, path, value)
        assert done.returncode == 0, done.stderr


def test_kubectl_explain_reads_like_documentation(api: Callable[..., Any]) -> None:
    text = api("explain", "checkpointartifact.spec.source").stdout
    assert "What to store." in text
    for field, says in {
        "persistentVolumeClaim": "The volume that the training wrote to.",
        "path": "relative to the root of the claim",
        "include": "Globs of what to store",
        "exclude": "Globs of what to leave out",
        "readiness": "When the source may be read",
    }.items():
        assert field in text
        assert says in " ".join(text.split())


def test_every_field_has_a_description(api: Callable[..., Any]) -> None:
    crd = json.loads(api("get", "crd", "checkpointartifacts.checkpoints.rlhf.dev", "-o", "json").stdout)
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]

    def silent(node: dict[str, Any], path: str) -> Iterator[str]:
        for name, child in node.get("properties", {}).items():
            if "description" not in child:
                yield f"{path}.{name}"
            yield from silent(child, f"{path}.{name}")
        if isinstance(node.get("items"), dict):
            yield from silent(node["items"], f"{path}[]")

    assert [*silent(schema["spec"], "spec"), *silent(schema["status"], "status")] == []


def test_the_short_name_and_the_category_work(api: Callable[..., Any]) -> None:
    for resource in ("ckpt", "checkpointartifact", "checkpointartifacts", "checkpoints"):
        assert "defaults" in api("get", resource, "-o", "name").stdout


def write_status(api: Callable[..., Any], name: str, status: dict[str, Any]) -> None:
    done = api("patch", "ckpt", name, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    assert done.returncode == 0, done.stderr


def test_status_is_a_subresource(api: Callable[..., Any]) -> None:
    api("patch", "ckpt", "defaults", "--type=merge", "-p", json.dumps({"status": {"phase": "Ready"}}))
    assert "status" not in json.loads(api("get", "ckpt", "defaults", "-o", "json").stdout)


def test_selectable_fields_select_and_columns_sort_as_numbers(api: Callable[..., Any]) -> None:
    for name, loss, size in (("sort-a", "0.5", "900Ki"), ("sort-b", "1", "2Mi"), ("sort-c", "0.31", "1.5Gi")):
        assert api("create", "-f", "-", body=body_of(name, version=name, parentRef={"name": "root"})).returncode == 0
        summary = {"jobName": f"job-{name}", "algorithm": "dpo", "baseModel": "b/m", "peftMethod": "lora", "loss": loss}
        write_status(api, name, {"phase": "Ready", "size": size, "summary": summary})

    def names(*arguments: str) -> list[str]:
        done = api("get", "ckpt", "-o", "name", *arguments)
        assert done.returncode == 0, done.stderr
        return [line.partition("/")[2] for line in done.stdout.split()]

    everyone = {"sort-a", "sort-b", "sort-c"}
    for selector, expected in {
        "status.phase=Ready": everyone,
        "status.summary.jobName=job-sort-b": {"sort-b"},
        "status.summary.algorithm=dpo": everyone,
        "status.summary.baseModel=b/m": everyone,
        "status.summary.peftMethod=lora": everyone,
        "spec.version=sort-c": {"sort-c"},
        "spec.parentRef.name=root": everyone,
        "spec.artifactType=checkpoint,status.phase=Ready": everyone,
    }.items():
        assert set(names(f"--field-selector={selector}")) == expected, selector
    ready = "--field-selector=status.phase=Ready"
    assert names(ready, "--sort-by=.status.summary.loss") == ["sort-c", "sort-a", "sort-b"]
    assert names(ready, "--sort-by=.status.size") == ["sort-a", "sort-b", "sort-c"]
