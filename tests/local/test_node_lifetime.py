"""What a node leaves on the machine: nothing, whoever ends it and however; and where none can be, why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from local_helpers import LOCAL, CommandLine
from node_helpers import Namespace, restricted, traces_of, wait_for

import local_cluster as lc
from local_cluster import node_build
from local_cluster.node import prepare_node
from local_cluster.node_build import write_image
from local_cluster.session import recorded, sweep

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def node_programs() -> Path:
    """Where the programs of a node are; the test is skipped on a machine that can have none."""
    try:
        return prepare_node(lambda _: None).node
    except lc.NodeUnavailable as error:
        pytest.skip(str(error))


def test_two_at_once_are_strangers_and_leave_nothing(node_programs: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda name: lc.start_node(name=name), ["one", "two"])
    with first, second:
        assert first.host_address != second.host_address
        for cluster in (first, second):
            namespace = Namespace(cluster, "work")
            namespace.create()
            namespace.job("says", restricted("print", cluster.name))
            namespace.completed("says")
            assert namespace.kubectl("logs", "job/says") == f"{cluster.name}\n"
        watched = [traces_of(first.state_dir), traces_of(second.state_dir)]
        assert all(len(item.left()) > 20 for item in watched), "there is much to see of a node that runs"
    for item in watched:
        assert item.left() == []


def test_nothing_is_left_when_the_starter_is_killed(node_programs: Path) -> None:
    code = (
        "import local_cluster as lc, time; cluster = lc.start_node(name='k'); "
        "print(cluster.state_dir, flush=True); time.sleep(999)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(LOCAL)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    state_dir = Path(starter.stdout.readline().strip())
    watched = traces_of(state_dir)
    namespaces = watched.processes[1]
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert namespaces.wait_gone(30)
    wait_for(lambda: watched.left() == [], "the supervisor to take everything away")


def test_a_node_for_the_shell_stays_takes_images_and_ends_as_a_whole(node_programs: Path, command_line: CommandLine) -> None:
    (command_line.cache / "node").mkdir()
    (command_line.cache / "node" / node_programs.name).symlink_to(node_programs)
    code, out, err = command_line.run("up", "--name", "t", "--nodes", "1")
    assert code == 0, err
    assert [line.partition("=")[0] for line in out.splitlines()] == ["export KUBECONFIG", "export PATH"]
    assert "node-1: pods reach what listens on 198.1" in command_line.run("status", "--name", "t")[1]
    code, again, err = command_line.run("up", "--name", "t", "--nodes", "1")
    assert (code, again) == (0, out)
    code, _, err = command_line.run("up", "--name", "t", "--nodes", "2")
    assert code == 1
    assert "is up with 1 nodes, not 2" in err
    archive = command_line.cache / "other.tar"
    write_image(archive, "localhost/other:1", node_programs / "pause")
    code, _, err = command_line.run("load", str(archive), "--name", "t")
    assert code == 0, err
    shell = f"{out}\nkubectl run other --image=localhost/other:1 --restart=Never -- print loaded"
    wait = "kubectl wait --for=jsonpath={.status.phase}=Succeeded pod/other --timeout=60s && kubectl logs other"
    shown = subprocess.run(["bash", "-c", f"{shell}\n{wait}"], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("\nloaded\n")

    # The link is gone: everything is of no use then, and ends by itself. Its logs stay to be read.
    watched = traces_of(command_line.state("t"))
    subprocess.run(["ip", "link", "delete", watched.link], check=True)
    wait_for(lambda: watched.left() == [str(watched.state_dir)], "the rest to follow the link")
    assert command_line.run("down", "--name", "t")[0] == 0
    assert watched.left() == []


@pytest.fixture
def own_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for clusters that nobody else sweeps: other tests start some at the same time."""
    with tempfile.TemporaryDirectory(prefix="own-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.mark.usefixtures("own_runs")
def test_what_a_killed_supervisor_leaves_is_swept_by_the_next_start(node_programs: Path) -> None:
    cluster = lc.start_node(name="k")
    watched = traces_of(cluster.state_dir)
    assert cluster.state_dir is not None
    record = recorded(cluster.state_dir)
    assert record is not None
    record[0].signal(signal.SIGKILL)
    assert record[0].wait_gone(10)
    wait_for(lambda: not any(item.alive() for item in watched.processes), "every process to follow it")
    assert watched.left(), "nobody was there to take away the route"
    sweep()
    assert watched.left() == []
    cluster.stop()  # Once more does nothing.


def test_a_machine_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(lc.NodeUnavailable, match="needs root"):
        lc.start_node()
    monkeypatch.setenv("CLUSTER_PROVIDER", "existing")
    with pytest.raises(lc.NodeUnavailable, match="has its own nodes"):
        lc.start_node()


def test_missing_packages_are_named_where_they_cannot_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(node_build, "_TOOL_PATH", str(tmp_path))
    with pytest.raises(lc.NodeUnavailable, match="conntrack iproute2 iptables mount nftables runc util-linux"):
        node_build.ensure_tools(lambda _: None)
