"""A cluster of the test's own: real, alone, and gone afterwards, even when its starter is killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from local_helpers import LOCAL, all_gone, identities

import local_cluster
from local_cluster import Cluster, LocalClusterError

pytestmark = pytest.mark.timeout(120)


def kubectl(cluster: Cluster, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(cluster.kubectl), f"--kubeconfig={cluster.kubeconfig}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=30)


def test_two_at_once_are_strangers_and_both_end(programs: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda name: local_cluster.start(name), ["one", "two"])
    try:
        assert first.server != second.server
        kubectl(first, "create", "namespace", "only-in-one")
        assert kubectl(second, "get", "namespace", "only-in-one", check=False).returncode != 0

        # What the operator's tests build on: a controller manager that works, RBAC, tokens.
        assert first.has_controller_manager
        kubectl(first, "create", "job", "sleeper", "--image=none")
        deadline = time.monotonic() + 20
        while not kubectl(first, "get", "pods", "-o", "name").stdout.strip():
            assert time.monotonic() < deadline, "no pod was made for the Job"
            time.sleep(0.2)
        token = kubectl(first, "create", "token", "default").stdout.strip()
        assert token.count(".") == 2
        kubectl(first, "create", "serviceaccount", "nobody")
        refused = kubectl(first, "get", "secrets", "--as=system:serviceaccount:default:nobody", check=False)
        assert "forbidden" in refused.stderr

        assert first.state_dir is not None
        assert second.state_dir is not None
        for secret in ("kubeconfig", "tokens.csv", "service-account.key", "controller-manager.kubeconfig"):
            assert stat.S_IMODE((first.state_dir / secret).stat().st_mode) == 0o600
        watched = [*identities(first.state_dir), *identities(second.state_dir)]
        assert len(watched) == 8
        admin = (first.state_dir / "tokens.csv").read_text().partition(",")[0]
        for item in watched:
            assert admin.encode() not in Path(f"/proc/{item.pid}/cmdline").read_bytes()
    finally:
        first.stop()
        second.stop()
    assert all_gone(watched)
    assert not first.state_dir.exists()
    assert not second.state_dir.exists()
    first.stop()  # Once more does nothing.


def test_nothing_is_left_when_the_starter_is_killed(programs: Path) -> None:
    code = (
        "import local_cluster, time; cluster = local_cluster.start('k'); "
        "print(cluster.state_dir, flush=True); time.sleep(99)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(LOCAL)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    state_dir = Path(starter.stdout.readline().strip())
    watched = identities(state_dir)
    assert all(item.alive() for item in watched)
    assert len(watched) == 4
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert all_gone(watched)
    assert not state_dir.exists()


def test_assets_of_the_user_are_used_and_have_no_controller_manager(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(programs))
    with local_cluster.start("assets") as cluster:
        assert not cluster.has_controller_manager
        assert cluster.kubectl.parent == programs
        assert cluster.state_dir is not None
        watched = identities(cluster.state_dir)
        assert len(watched) == 3, "supervisor, etcd and kube-apiserver"
        assert "default" in kubectl(cluster, "get", "namespaces", "-o", "name").stdout
        # Nobody makes the `default` account here, and yet pods can be created.
        kubectl(cluster, "run", "pod", "--image=none")

        # The same cluster, seen as one that was there already: it is not stopped.
        monkeypatch.setenv("CLUSTER_PROVIDER", "existing")
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        with local_cluster.start("ignored") as found:
            assert (found.server, found.provider) == (cluster.server, "existing")
        assert all(item.alive() for item in watched)

        # When the supervisor itself is killed, its programs still end.
        watched[0].signal(signal.SIGKILL)
        assert all_gone(watched)


def test_a_program_that_ends_is_an_error_at_once_with_its_last_words(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("etcd", "kubectl"):
        (tmp_path / name).symlink_to(programs / name)
    broken = tmp_path / "kube-apiserver"
    broken.write_text("#!/bin/sh\necho the flux is off; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(LocalClusterError, match=r"(?s)kube-apiserver ended \(exit status 3\).*the flux is off"):
        local_cluster.start("broken")
    assert time.monotonic() - began < 10


def test_a_taken_port_is_tried_elsewhere(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from local_cluster import control_plane
    from local_cluster.processes import free_ports

    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(programs))
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    calls = 0

    def first_time_taken(count: int) -> list[int]:
        nonlocal calls
        calls += 1
        ports = free_ports(count)
        return [ports[0], ports[1], taken.getsockname()[1], ports[3]] if calls == 1 else ports

    monkeypatch.setattr(control_plane, "free_ports", first_time_taken)
    said: list[str] = []
    with taken, local_cluster.start("ports", say=said.append) as cluster:
        assert calls == 2
        assert str(taken.getsockname()[1]) not in cluster.server
    assert any("trying others" in line for line in said)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (
            "CLUSTER_PROVIDER",
            "kindd",
            "CLUSTER_PROVIDER='kindd' names no provider; use one of: native, existing",
        ),
        ("KUBEBUILDER_ASSETS", "/nonexistent", "holds no etcd, kube-apiserver, kubectl"),
    ],
)
def test_a_wrong_choice_names_the_variable_and_the_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(LocalClusterError, match=says) as caught:
        local_cluster.start("x")
    assert variable in str(caught.value)
    assert value in str(caught.value)


def test_existing_without_a_kubeconfig_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLUSTER_PROVIDER", "existing")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(LocalClusterError, match="set KUBECONFIG to the file of a running cluster"):
        local_cluster.start("x")
