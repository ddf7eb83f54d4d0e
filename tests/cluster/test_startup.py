"""An operator that cannot work says so at once, instead of looking as if it were waiting."""

import json
import os
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import local_cluster as lc
from local_cluster.operator_process import kubectl, operator_command


def run(env: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "checkpoint_operator.controller", *flags]
    return subprocess.run(
        command, env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True, timeout=60, check=False
    )


def test_without_a_cluster_it_says_what_to_set(tmp_path: Path) -> None:
    done = run({"KUBECONFIG": str(tmp_path / "missing")})
    assert done.returncode == 1
    assert "set KUBECONFIG" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_an_api_server_it_says_so(cluster: lc.Cluster, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(cluster.kubeconfig.read_text().replace(cluster.server, "https://127.0.0.1:1"))
    done = run({"KUBECONFIG": str(config)})
    assert done.returncode == 1
    assert "the API server cannot be reached" in done.stderr


def test_without_the_crd_it_says_how_to_install_it(tmp_path: Path) -> None:
    with lc.start("bare", say=lambda _: None) as bare:
        done = run({"KUBECONFIG": str(bare.kubeconfig)})
    assert done.returncode == 1
    assert "kubectl apply -f crds/" in done.stderr


def test_without_its_rights_it_names_them(cluster: lc.Cluster, tmp_path: Path) -> None:
    kubectl(cluster, "create", "serviceaccount", "nobody", "-n", "default")
    token = kubectl(cluster, "create", "token", "nobody", "-n", "default").stdout.strip()
    command = operator_command(cluster, tmp_path, [])
    config = Path(command.env["KUBECONFIG"])
    text = config.read_text()
    before = text.partition('"token": "')[2].partition('"')[0]
    config.write_text(text.replace(before, token))
    done = run(dict(command.env))
    assert done.returncode == 1
    assert "kubectl apply -f deploy/manifests/" in done.stderr
    assert token not in done.stderr


def test_a_wrong_setting_refuses_to_start_by_name() -> None:
    done = run({"CHECKPOINT_OPERATOR_RESYNC_SECONDS": "never"})
    assert done.returncode == 2
    assert "CHECKPOINT_OPERATOR_RESYNC_SECONDS" in done.stderr
    assert "'never'" in done.stderr


def read(address: str, path: str) -> str:
    connection = HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        if answer.status != 200:
            raise OSError(f"{path}: {answer.status} {text}")
        return text
    finally:
        connection.close()


def test_health_and_metrics_are_served_on_one_port(cluster: lc.Cluster, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = operator_command(cluster, tmp_path, [], f"--listen-address={address}", "--log-format=json")
    env = {**command.env, "PATH": os.environ["PATH"]}
    process = subprocess.Popen(command.argv, env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                assert read(address, "/readyz") == "ok\n"
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert read(address, "/healthz") == "ok\n"
        numbers = read(address, "/metrics")
        assert 'checkpoint_operator_artifacts{phase="Ready"}' in numbers
        assert 'checkpoint_operator_api_requests_total{code="200",resource="checkpointartifacts",verb="list"}' in numbers
        assert "process_resident_memory_bytes" in numbers
    finally:
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
