"""A cluster by kind: what it is made of, what users may choose, and that nothing of it stays, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from local_helpers import LOCAL
from node_helpers import Namespace, restricted, traces_of, wait_for

import local_cluster as lc
from local_cluster import kind, kind_docker
from local_cluster.kind_build import Programs
from local_cluster.kind_image import Inputs

_STARTER = """
import sys, time
from pathlib import Path
from local_cluster.kind import start_kind
from local_cluster.node_build import build_node_programs, pause_archive
say = lambda text: print(text, file=sys.stderr, flush=True)
cluster = start_kind("k", images=[pause_archive(build_node_programs(say))], say=say)
print(cluster.state_dir, cluster.kubectl, flush=True)
time.sleep(999)
"""


def test_a_configuration_of_kind_has_our_address_and_the_folder_of_the_volumes(tmp_path: Path) -> None:
    path, mounts = kind._config(tmp_path, "198.18.0.2", 6443, tmp_path / "volumes", own=True)
    text = path.read_text()
    assert mounts
    assert 'apiServerAddress: "198.18.0.2"' in text
    assert text.count(f"{tmp_path}/volumes") == 2, "the same path here and there"
    assert "disableDefaultCNI: true" in text


def test_a_users_own_configuration_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("kind: Cluster # costs $5\nmounts: $VOLUMES\n")
    monkeypatch.setenv(kind.CONFIG_VARIABLE, str(own))
    path, mounts = kind._config(tmp_path, "127.0.0.1", 0, Path("/v"), own=False)
    assert (path.read_text(), mounts) == ("kind: Cluster # costs $5\nmounts: /v\n", True)
    own.write_text("kind: Cluster\n")
    assert not kind._config(tmp_path, "127.0.0.1", 0, Path("/v"), own=False)[1], "so claims come from the default class"


def test_a_configuration_that_is_not_there_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kind.CONFIG_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(lc.LocalClusterError, match=r"KIND_CONFIG=.*is not a file"):
        kind._config(tmp_path, "127.0.0.1", 0, tmp_path, own=True)


def test_a_node_image_is_kept_by_what_is_in_it() -> None:
    def inputs(kube: str, version: str = "v1.2.3") -> Inputs:
        return Inputs(Path(kube), Path("/node"), Programs(Path("/kind"), Path("/storage")), version)

    assert inputs("/kube-a").archive == inputs("/elsewhere/kube-a").archive
    assert len({inputs(name).tag for name in ("/kube-a", "/kube-b")}) == 2
    assert "v1.2.3-" in inputs("/kube-a").archive.name


def test_a_container_goes_without_the_capability_that_we_cannot_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind_docker, "tool", lambda _: "/bin/echo")
    (tmp_path / "bundle").mkdir()
    config, process = tmp_path / "bundle" / "config.json", tmp_path / "process"
    lists = [
        ["CAP_CHOWN", "CAP_SYS_RESOURCE", "CAP_KILL"],
        ["CAP_KILL", "CAP_SYS_RESOURCE"],
        ["CAP_SYS_RESOURCE", "CAP_KILL"],
    ]
    for path in (config, process):
        path.write_text(json.dumps(lists, separators=(",", ":")))
    flags = kind_docker._runtime(tmp_path, "CapBnd:\t000001fffeffffff\n")
    assert flags == [f"--add-runtime=bounded={tmp_path}/runc", "--default-runtime=bounded"]
    words = ["--root", "/r", "create", "--bundle", str(config.parent), "--process", str(process), "a b"]
    done = subprocess.run([str(tmp_path / "runc"), *words], capture_output=True, text=True, check=True)
    assert done.stdout == " ".join(words) + "\n"
    for path in (config, process):
        assert json.loads(path.read_text()) == [["CAP_CHOWN", "CAP_KILL"], ["CAP_KILL"], ["CAP_KILL"]]
    assert kind_docker._runtime(tmp_path, "CapBnd:\t000001ffffffffff\n") == [], "who has it gives it"


@pytest.mark.skipif(os.environ.get("CLUSTER") != "kind", reason="a cluster by kind is started where CLUSTER=kind")
@pytest.mark.timeout(900)
def test_a_cluster_by_kind_makes_volumes_and_leaves_nothing_when_its_starter_is_killed() -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", _STARTER], env={**os.environ, "PYTHONPATH": str(LOCAL)}, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    try:
        words = starter.stdout.readline().split()
        if not words and os.environ.get("E2E_OPTIONAL"):
            pytest.skip("kind makes no cluster here; it says why in what was captured")
        assert words, "it says why in what was captured"
        state_dir = Path(words[0])
        watched = traces_of(state_dir)
        assert watched.left()
        namespace = Namespace(SimpleNamespace(kubectl=words[1], kubeconfig=state_dir / "kubeconfig"), "work")  # type: ignore[arg-type]
        namespace.create()
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
        namespace.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": claim})
        spec = restricted("write", "/data/step", "1000", "read", "/data/step")
        spec["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        spec["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
        namespace.job("writer", spec)
        namespace.completed("writer")
        assert namespace.kubectl("logs", "job/writer") == "1000"
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        starter.stdout.close()
    wait_for(lambda: watched.left() == [], "the supervisor to take everything away")
