"""`up` and `down`: a cluster that outlives its command, recognised again, and nothing else ever touched."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from local_helpers import CommandLine, all_gone, identities

from local_cluster.processes import Identity, boot_id

pytestmark = pytest.mark.timeout(120)


def test_up_stays_twice_is_the_same_and_down_twice_is_fine(command_line: CommandLine) -> None:
    code, out, err = command_line.run("up", "--name", "t")
    assert code == 0, err
    exports = out.splitlines()
    assert [line.partition("=")[0] for line in exports] == ["export KUBECONFIG", "export PATH"]
    state = command_line.state("t")
    watched = identities(state)
    assert all(item.alive() for item in watched), "it runs on without the command that started it"
    shell = subprocess.run(
        ["bash", "-c", f"{out}\nkubectl get namespaces -o name"], capture_output=True, text=True, check=True
    )
    assert "namespace/default" in shell.stdout

    code, again, err = command_line.run("up", "--name", "t")
    assert (code, again) == (0, out)
    assert "already up" in err
    assert identities(state) == watched
    assert command_line.run("env", "--name", "t")[1] == out
    assert command_line.run("status", "--name", "t")[1].startswith("up: https://127.0.0.1:")

    # One program dies: the rest has no use, and `up` replaces it all.
    watched[1].signal(signal.SIGKILL)
    assert all_gone(watched)
    assert command_line.run("status", "--name", "t")[0] == 1
    code, _, err = command_line.run("up", "--name", "t")
    assert code == 0
    assert "starting anew" in err
    fresh = identities(state)
    assert all(item.alive() for item in fresh)

    assert "is stopped" in command_line.run("down", "--name", "t")[2]
    assert all_gone(fresh)
    assert not state.exists()
    code, _, err = command_line.run("down", "--name", "t")
    assert code == 0
    assert "is not up" in err
    assert command_line.run("env", "--name", "t")[0] == 1


def test_a_recycled_pid_is_never_killed(command_line: CommandLine) -> None:
    """After a reboot the recorded pids may belong to anybody; here they are those of a bystander."""
    with subprocess.Popen(["sleep", "60"]) as bystander:
        other = {"pid": bystander.pid, "started": "1"}
        state = command_line.state("t")
        state.mkdir(parents=True)
        record = {"supervisor": other, "programs": {"etcd": other}, "leftovers": []}
        (state / "state.json").write_text(json.dumps(record))
        assert "no longer runs" in command_line.run("status", "--name", "t")[1]
        code, _, err = command_line.run("down", "--name", "t")
        assert code == 0
        assert "was not running any more" in err
        assert not state.exists()
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize(("boot", "stays"), [(boot_id(), False), ("another", True)])
def test_what_was_left_before_a_reboot_may_be_a_strangers_by_now(
    command_line: CommandLine, tmp_path: Path, boot: str, stays: bool
) -> None:
    left = tmp_path / "left.sock"
    left.touch()
    state = command_line.state("t")
    state.mkdir(parents=True)
    supervisor = {"pid": 1, "started": "none"}
    record = {"boot": boot, "supervisor": supervisor, "programs": {}, "leftovers": [["file", str(left)]]}
    (state / "state.json").write_text(json.dumps(record))
    assert command_line.run("down", "--name", "t")[0] == 0
    assert not state.exists()
    assert left.exists() is stays


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_up_leaves_nothing(command_line: CommandLine, number: signal.Signals) -> None:
    process = command_line.popen("up", "--name", "t")
    state = command_line.state("t")
    watched: list[Identity] = []
    deadline = time.monotonic() + 30
    while len(watched) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        if (state / "state.json").exists():
            watched = identities(state)
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode in (130, -number)
    assert all_gone(watched)
    assert _gone(state)


def _gone(path: Path) -> bool:
    deadline = time.monotonic() + 5
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not path.exists()
