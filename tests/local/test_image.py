"""The image that is shipped: what is in it, what is not, and that both commands run in it under all restrictions."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from image_container import UnpackedImage

from local_cluster import image
from local_cluster.errors import LocalClusterError
from local_cluster.image import Base, ImageUnavailable, ensure_image, image_archive

# Where there is nothing in the cache yet, the first of them builds it all.
pytestmark = pytest.mark.timeout(1500)
REPOSITORY = Path(__file__).resolve().parents[2]
UID = 65532


@pytest.fixture(scope="module")
def archive() -> Path:
    try:
        return ensure_image(print)
    except ImageUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> UnpackedImage:
    if os.geteuid() != 0 or shutil.which("runc") is None:
        pytest.skip("a container needs root and runc")
    return UnpackedImage.of(archive, tmp_path_factory.mktemp("image"))


def test_it_runs_as_nobody_in_particular_and_says_what_it_is(unpacked: UnpackedImage) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert unpacked.config["User"] == f"{UID}:{UID}"
    # Who runs it names one of the two; an entry point would come before that name.
    assert not unpacked.config.get("Entrypoint")
    assert unpacked.config["Cmd"] == ["operator"]
    labels = unpacked.config["Labels"]
    assert labels["org.opencontainers.image.title"] == project["name"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert any(name.endswith("checkpoint-operator:dev") for name in unpacked.names)


def test_there_is_no_shell_no_compiler_no_installer_and_nothing_setuid_in_it(unpacked: UnpackedImage) -> None:
    tools = {
        "sh",
        "bash",
        "dash",
        "busybox",
        "pip",
        "pip3",
        "gcc",
        "cc",
        "ld",
        "apt",
        "apt-get",
        "dpkg",
        "perl",
        "su",
        "env",
    }
    files = [path for path in unpacked.root.rglob("*") if not path.is_dir()]
    assert not [path for path in files if path.name in tools]
    assert not list(unpacked.root.rglob("site-packages/pip*"))
    assert not list(unpacked.root.rglob("site-packages/setuptools*"))
    modes = [(path, path.lstat()) for path in unpacked.root.rglob("*") if not path.is_symlink()]
    assert not [path for path, status in modes if status.st_mode & 0o6000]
    assert [path for path, status in modes if status.st_mode & 0o002] == [unpacked.root / "tmp"]
    assert {status.st_uid for _, status in modes} == {0}


def test_a_scanner_finds_every_package_of_the_lock_and_every_debian_package(unpacked: UnpackedImage) -> None:
    lock = (REPOSITORY / "requirements" / "image.txt").read_text()
    locked = {f"{name.replace('-', '_')}-{version}" for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.M)}
    installed = {path.name.removesuffix(".dist-info").lower() for path in unpacked.root.rglob("site-packages/*.dist-info")}
    assert len(locked) > 40
    assert locked - installed == set()
    assert {name.partition("-")[0] for name in installed - locked} == {"checkpoint_operator"}
    records = {path.name: path.read_text() for path in (unpacked.root / "var/lib/dpkg/status.d").iterdir()}
    assert {"libc6", "ca-certificates"} <= records.keys()
    assert all(f"Package: {name}\n" in f"{text}\n" and "\nVersion: " in text for name, text in records.items())
    assert (unpacked.root / "etc/os-release").exists()


def test_all_that_is_imported_is_compiled_so_that_a_read_only_root_starts_as_fast(unpacked: UnpackedImage) -> None:
    sources = list(unpacked.root.rglob("checkpoint_operator/**/*.py"))
    assert sources
    for source in sources:
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc")
        assert compiled.read_bytes()[4:8] == b"\x01\0\0\0"  # by hash, and the hash is not looked at


def test_both_commands_answer_under_every_restriction_of_a_pod(unpacked: UnpackedImage) -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    for command in ("mover", "operator"):
        done = unpacked.run(command, "--version")
        assert (done.returncode, done.stdout) == (0, f"{command} {version}\n"), done.stderr
    helped = unpacked.run("operator", "--help")
    assert helped.returncode == 0, helped.stderr
    assert "--max-movers" in helped.stdout


def test_every_backend_and_what_they_verify_certificates_with_is_in_it(unpacked: UnpackedImage) -> None:
    script = """
import operator, os, ssl
import azure.identity, awscrt.checksums, botocore.session, google_crc32c, kubernetes.aio
import checkpoint_operator.storage.azure, checkpoint_operator.storage.gcs, checkpoint_operator.storage.s3

session = botocore.session.get_session()
services = [session.get_service_model(name).service_name for name in ("s3", "sts", "sso", "sso-oidc")]
authorities = ssl.create_default_context().get_ca_certs()
print(len(services), google_crc32c.implementation, len(authorities) > 50, os.getuid(), os.path.basename(operator.__file__))
"""
    done = unpacked.run("python", "-c", script)
    assert (done.returncode, done.stdout) == (0, f"4 c True {UID} operator.py\n"), done.stderr


def test_a_mover_in_it_copies_a_checkpoint_from_one_volume_to_another(unpacked: UnpackedImage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "checkpoint-1").mkdir(parents=True)
    (source / "checkpoint-1" / "model.safetensors").write_bytes(b"weights" * 1000)
    (source / "checkpoint-1" / "config.json").write_text("{}")
    target.mkdir()
    os.chown(target, UID, UID)
    plan = {
        "operation": "Upload",
        "artifactUID": "6a5c7a1e-0f6a-4a5e-9d42-0f4a7d3b9c11",
        "source": {"root": "/source", "path": "checkpoint-1"},
        "targetURI": "file:///target/kept/checkpoint-1",
    }
    done = unpacked.run(
        "mover",
        environment={"CHECKPOINT_PLAN": json.dumps(plan)},
        mounts=((source, "/source", False), (target, "/target", True)),
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout.splitlines()[-1])["stored"]
    assert (stored["fileCount"], stored["sizeBytes"]) == (2, 7002)
    kept = target / "kept" / "checkpoint-1"
    assert (kept / "model.safetensors").read_bytes() == b"weights" * 1000
    assert (kept / ".metadata.json").stat().st_uid == UID


def test_the_image_is_built_once_for_one_content_and_anew_for_another(tmp_path: Path) -> None:
    for name in ("Dockerfile", "pyproject.toml", "README.md", "requirements/build.txt", "requirements/image.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "operator" / "__pycache__").mkdir(parents=True)
    (tmp_path / "deploy" / "image").mkdir(parents=True)
    (tmp_path / "operator" / "a.py").write_text("a = 1\n")
    first = image_archive(tmp_path)
    (tmp_path / "operator" / "__pycache__" / "a.cpython-313.pyc").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("not in the image")
    assert image_archive(tmp_path) == first
    (tmp_path / "operator" / "a.py").write_text("a = 2\n")
    assert image_archive(tmp_path) != first


def test_the_stand_in_has_the_python_and_the_debian_of_the_base_that_it_stands_for(tmp_path: Path) -> None:
    base = Base.of(REPOSITORY / "Dockerfile")
    assert base.python in base.image
    assert base.suite in base.image
    other = tmp_path / "Dockerfile"
    other.write_text("ARG PYTHON_IMAGE=alpine:3\nFROM ${PYTHON_IMAGE}\n")
    with pytest.raises(LocalClusterError, match="ARG PYTHON_IMAGE"):
        Base.of(other)


def test_a_machine_that_cannot_build_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHECKPOINT_OPERATOR_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(image.os, "geteuid", lambda: 0)
    with pytest.raises(ImageUnavailable, match="buildah and debootstrap"):
        ensure_image(print)
    assert not list(tmp_path.rglob("*.tar"))


def test_the_version_stands_the_same_wherever_it_stands() -> None:
    from checkpoint_operator import __version__

    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"] == __version__
    assert f"ARG VERSION={__version__}\n" in (REPOSITORY / "Dockerfile").read_text()
