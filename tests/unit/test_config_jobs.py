"""The admin's file for mover Jobs: what it means, and that a mistake in it refuses to start by file and key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoint_operator.controller.config import ConfigError
from checkpoint_operator.controller.config_jobs import CA_BUNDLE_MAX, load_job_rules

PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def write(folder: Path, content: Any) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump({"image": "x", **content}))
    return path


def test_an_image_is_enough_and_everything_else_is_closed(tmp_path: Path) -> None:
    rules = load_job_rules(write(tmp_path, {}))
    assert rules.image == "x"
    assert (rules.allowed_endpoints, rules.allowed_toleration_keys, rules.allowed_priority_classes) == ((), (), ())
    assert (rules.allowed_labels, rules.allowed_annotations) == ((), ())
    assert (rules.instance_metadata, rules.service_account_name) == ("Never", None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("image: [", "is no YAML"),
        ("[]", "jobs_config"),
        ("{}", "image"),
        ("", "image"),
        ({"imagePullPolice": "Always"}, "imagePullPolice"),
        ({"image": "a b"}, "image"),
        ({"allowedEndpoints": ["minio:9000"]}, "allowedEndpoints"),
        ({"allowedEndpoints": ["https://u:p@minio"]}, "allowedEndpoints"),
        ({"allowedEndpoints": ["https://*"]}, "allowedEndpoints"),
        ({"allowedSchemes": ["http"]}, "allowedSchemes"),
        ({"allowedLabels": ["*"]}, "allowedLabels"),
        ({"allowedLabels": ["checkpoints.rlhf.dev/artifact-uid"]}, "operator's own"),
        ({"allowedLabels": ["checkpoints.rlhf.dev/*"]}, "operator's own"),
        ({"allowedAnnotations": ["container.apparmor.security.beta.kubernetes.io/*"]}, "single keys"),
        ({"allowedAnnotations": ["kubernetes.io/*"]}, "single keys"),
        ({"resources": {"limits": {"memory": "5Gi"}}}, "maxResources.memory"),
        ({"resources": {"limits": {"nvidia.com/gpu": "1"}}}, "nvidia.com/gpu"),
        ({"resources": {"limits": {"memory": "lots"}}}, "resources.limits.memory"),
        ({"maxResources": {"cpu": "-1"}}, "maxResources.cpu"),
        ({"caBundle": "/etc/ca.pem"}, "PEM"),
        ({"caBundle": PEM + "-----BEGIN PRIVATE KEY-----"}, "private key"),
        ({"caBundle": PEM + "x" * CA_BUNDLE_MAX}, f"at most {CA_BUNDLE_MAX}"),
        ({"caBundleFile": "/does/not/exist.pem"}, "/does/not/exist.pem"),
        ({"proxy": {"httpsProxy": "https://proxy.example"}}, "proxy.httpsProxy"),
        ({"instanceMetadata": "Yes"}, "instanceMetadata"),
        ({"defaultUser": 0}, "defaultUser"),
        ({"serviceAccountName": "Not A Name"}, "serviceAccountName"),
        ({"tolerations": [{"key": "a", "operator": "Maybe"}]}, "tolerations.0.operator"),
        ({"nodeLostSeconds": -1}, "nodeLostSeconds"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(tmp_path: Path, content: Any, says: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_job_rules(path)
    assert "jobs_config" in str(caught.value)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_file_that_is_missing_or_not_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_job_rules(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="--jobs-config"):
        load_job_rules(None)


def test_a_bundle_in_a_file_of_its_own_is_read_at_the_start(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text(PEM)
    rules = load_job_rules(write(tmp_path, {"caBundleFile": str(bundle), "defaultUser": 7}))
    assert (rules.ca_bundle, rules.default_user) == (PEM, 7)
    with pytest.raises(ConfigError, match="not both"):
        load_job_rules(write(tmp_path, {"caBundleFile": str(bundle), "caBundle": PEM}))
    bundle.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_job_rules(write(tmp_path, {"caBundleFile": str(bundle)}))
    bundle.write_text("no certificate")
    with pytest.raises(ConfigError, match="PEM"):
        load_job_rules(write(tmp_path, {"caBundleFile": str(bundle)}))
