"""The real mover, mostly as a process: what it prints, how it ends, and that it never outlives whoever started it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoint_operator.api.errors import ExitCode, Reason
from checkpoint_operator.api.names import ENV_EXIT_WITH_PARENT, ENV_PLAN, ENV_TERMINATION_MESSAGE
from checkpoint_operator.api.protocol import RESULT_MAX_BYTES, Progress, Result, parse_line
from checkpoint_operator.mover.main import Mover

MIB = 1 << 20
MOVER = [sys.executable, "-m", "checkpoint_operator.mover"]


class Workshop:
    """A source volume, a target volume, and plans between them."""

    def __init__(self, root: Path) -> None:
        self.root, self.volume, self.target = root, root / "volume", root / "target"
        self.source = self.volume / "checkpoint"
        self.source.mkdir(parents=True)
        self.target.mkdir()
        (self.source / "config.json").write_bytes(b"{}")
        self.lock, self.message = root / "locks" / "uid", root / "termination-message"

    def plan(self, **changes: Any) -> dict[str, Any]:
        plan = {
            "operation": "Upload",
            "artifactUID": "uid",
            "targetURI": "file:///run",
            "options": {"fileRoot": str(self.target)},
            "source": {"root": str(self.volume), "path": "checkpoint"},
            "lockFile": str(self.lock),
        }
        return {key: value for key, value in (plan | changes).items() if value is not None}

    def start(
        self,
        plan: dict[str, Any] | str | None,
        *,
        command: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        variables = {**os.environ, ENV_TERMINATION_MESSAGE: str(self.message), **(environment or {})}
        if plan is not None:
            variables[ENV_PLAN] = plan if isinstance(plan, str) else json.dumps(plan)
        return subprocess.Popen(
            command or MOVER, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, plan: dict[str, Any] | str | None, **more: Any) -> tuple[int, Result, str]:
        """Exit code, result and log of a process that ends by itself; its termination message says the same."""
        process = self.start(plan, **more)
        out, err = process.communicate(timeout=60)
        return process.returncode, self._result(out), err.decode()

    def run_here(self, plan: dict[str, Any] | str) -> tuple[int, Result]:
        """The same in this process: quicker, where only what it says is of interest."""
        variables = {
            ENV_PLAN: plan if isinstance(plan, str) else json.dumps(plan),
            ENV_TERMINATION_MESSAGE: str(self.message),
        }
        output = io.StringIO()
        code = Mover(variables, output).run()
        return code, self._result(output.getvalue().encode())

    def _result(self, out: bytes) -> Result:
        lines = [parse_line(line) for line in out.splitlines()]
        assert all(isinstance(line, Progress) for line in lines[:-1]), out
        result = lines[-1]
        assert isinstance(result, Result), out
        assert parse_line(self.message.read_bytes()) == result
        assert len(self.message.read_bytes()) <= RESULT_MAX_BYTES
        return result

    def big(self, size: int = 1024 * MIB) -> None:
        """A sparse file that takes a while to copy; it comes first."""
        with (self.source / "0-big").open("wb") as file:
            file.truncate(size)

    def lock_is_free(self) -> bool:
        try:
            descriptor = os.open(self.lock, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def wait_for_progress(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert isinstance(parse_line(line), Progress), line


def test_an_upload_ends_with_its_result_and_a_deletion_too(workshop: Workshop) -> None:
    code, result, _ = workshop.run(workshop.plan())
    assert (code, result.failure) == (ExitCode.DONE, None)
    assert result.stored is not None
    assert (result.stored.storage_uri, result.stored.file_count) == ("file:///run", 1)
    assert (workshop.target / "run" / "config.json").read_bytes() == b"{}"
    assert workshop.lock_is_free()
    code, result, _ = workshop.run(workshop.plan(operation="Delete", source=None, keepCommitted=False))
    assert (code, result.deleted) == (ExitCode.DONE, "nothing is left there")
    assert list(workshop.target.iterdir()) == []


def test_a_mover_without_a_plan_says_who_starts_it(workshop: Workshop) -> None:
    code, result, _ = workshop.run(None)
    assert result.failure is not None
    assert (code, result.failure.reason) == (ExitCode.CONFIGURATION, Reason.INVALID_SPEC)
    assert ENV_PLAN in result.failure.message


BROKEN_PLANS: dict[str, tuple[str | dict[str, Any], Reason, str]] = {
    "no JSON": ("{", Reason.INVALID_SPEC, "not valid"),
    "a field is missing": ('{"operation": "Upload", "artifactUID": "u"}', Reason.INVALID_SPEC, "targetURI"),
    "another protocol": (
        '{"protocolVersion": 2, "operation": "Upload", "artifactUID": "u", "targetURI": "file:///x"}',
        Reason.INVALID_SPEC,
        "protocolVersion",
    ),
    "no source": ({"source": None}, Reason.INVALID_SPEC, "source"),
    "a hostile URI": ({"targetURI": "file:///../x"}, Reason.UNSUPPORTED_URI, "'..'"),
    "a scheme that nobody serves": ({"targetURI": "ftp://bucket/x"}, Reason.UNSUPPORTED_URI, "ftp://"),
    "a source outside of its volume": (
        {"source": {"root": "/tmp", "path": "../etc"}},
        Reason.INVALID_SPEC,
        "source.path",
    ),
}


@pytest.mark.parametrize(("plan", "reason", "said"), BROKEN_PLANS.values(), ids=BROKEN_PLANS)
def test_a_plan_that_cannot_be_carried_out_is_a_verdict(
    workshop: Workshop, plan: str | dict[str, Any], reason: Reason, said: str
) -> None:
    code, result = workshop.run_here(workshop.plan(**plan) if isinstance(plan, dict) else plan)
    assert result.failure is not None
    assert (code, result.failure.reason) == (ExitCode.CONFIGURATION, reason)
    assert said in result.failure.message


def test_missing_credentials_are_a_verdict(workshop: Workshop) -> None:
    code, result, _ = workshop.run(workshop.plan(targetURI="s3://bucket/run", options={"endpoint": "http://127.0.0.1:9"}))
    assert result.failure is not None
    assert (code, result.failure.reason) == (ExitCode.CREDENTIALS, Reason.CREDENTIALS_MISSING)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("notes.txt", Reason.TARGET_NOT_EMPTY), (".metadata.json", Reason.TARGET_NOT_EMPTY)],
    ids=["a file", "a foreign marker"],
)
def test_a_place_that_is_taken_is_a_verdict(workshop: Workshop, name: str, reason: Reason) -> None:
    (workshop.target / "run").mkdir()
    (workshop.target / "run" / name).write_bytes(b"mine")
    code, result, _ = workshop.run(workshop.plan())
    assert result.failure is not None
    assert (code, result.failure.reason) == (ExitCode.TARGET_CONFLICT, reason)


def test_a_place_with_another_checkpoint_is_a_verdict(workshop: Workshop) -> None:
    workshop.run_here(workshop.plan(artifactUID="first"))
    (workshop.source / "config.json").write_bytes(b"[]")
    code, result = workshop.run_here(workshop.plan())
    assert result.failure is not None
    assert (code, result.failure.reason) == (ExitCode.TARGET_CONFLICT, Reason.TARGET_EXISTS)


@pytest.mark.parametrize("what", ["missing", "empty", "link", "name", "odd neighbour"])
def test_a_source_that_cannot_be_stored_is_a_verdict(workshop: Workshop, what: str) -> None:
    plan = workshop.plan()
    match what:
        case "missing":
            plan["source"]["path"] = "other"
        case "empty":
            plan["source"]["include"] = ["*.bin"]
        case "link":
            (workshop.source / "l").symlink_to("/etc")
        case "name":
            (workshop.source / os.fsdecode(b"\xff")).write_bytes(b"")
        case "odd neighbour":  # it is listed in the message
            (workshop.volume / os.fsdecode(b"\xff")).write_bytes(b"")
            plan["source"]["path"] = "other"
    code, result = workshop.run_here(plan)
    assert result.failure is not None
    assert code == ExitCode.SOURCE_UNREADABLE
    assert result.failure.wrote is False
    assert list(workshop.target.iterdir()) == []


def test_a_source_that_changes_is_no_verdict(workshop: Workshop) -> None:
    workshop.big(128 * MIB)
    process = workshop.start(workshop.plan())
    wait_for_progress(process)
    with (workshop.source / "config.json").open("ab") as file:  # read after the big one
        file.write(b" ")
    out, err = process.communicate(timeout=60)
    result = parse_line(out.splitlines()[-1])
    assert isinstance(result, Result), err
    assert result.failure is not None
    assert (process.returncode, result.failure.reason) == (ExitCode.SOURCE_CHANGED, Reason.SOURCE_CHANGED)
    assert not (workshop.target / "run").exists()


def test_a_mover_that_finds_another_one_running_leaves_at_once(workshop: Workshop) -> None:
    workshop.lock.parent.mkdir()
    with workshop.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, result, _ = workshop.run(workshop.plan(earlierMoverGone=True))
    assert result.failure is not None
    assert (code, result.failure.reason) == (ExitCode.TARGET_BUSY, Reason.EARLIER_MOVER_NOT_GONE)
    assert list(workshop.target.iterdir()) == []
    assert workshop.run(workshop.plan())[0] == ExitCode.DONE


def test_an_unknown_exception_tells_its_type_alone(workshop: Workshop) -> None:
    script = (
        "import sys\n"
        "from checkpoint_operator.mover import main\n"
        "def broken(*_): raise KeyError('SECRET')\n"
        "main.StorageManager = broken\n"
        "sys.exit(main.main())\n"
    )
    code, result, log = workshop.run(workshop.plan(), command=[sys.executable, "-c", script])
    assert result.failure is not None
    assert (code, result.failure.reason) == (ExitCode.BUG, Reason.INTERNAL)
    assert "KeyError" in result.failure.message
    assert "SECRET" not in result.failure.message
    assert "Traceback" in log


def test_what_a_library_prints_does_not_get_between_the_lines(workshop: Workshop) -> None:
    script = (
        "import os, sys\n"
        "from checkpoint_operator.mover import main\n"
        "manager = main.StorageManager\n"
        "def noisy(options):\n"
        "    print('noise without an end', end='', flush=True)\n"
        "    os.write(1, b'noise from C')\n"
        "    return manager(options)\n"
        "main.StorageManager = noisy\n"
        "sys.exit(main.main())\n"
    )
    code, result, log = workshop.run(workshop.plan(), command=[sys.executable, "-c", script])
    assert code == ExitCode.DONE
    assert result.stored is not None
    assert "noise without an end" in log
    assert "noise from C" in log


def test_the_lines_are_utf8_whatever_the_terminal_speaks(workshop: Workshop) -> None:
    plan = workshop.plan(targetURI="file:///grün/🔥")
    code, result, _ = workshop.run(plan, environment={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert code == ExitCode.DONE
    assert result.stored is not None
    assert result.stored.storage_uri == "file:///grün/🔥"


def test_a_termination_message_that_cannot_be_written_does_not_fail_the_run(workshop: Workshop) -> None:
    process = workshop.start(workshop.plan(), environment={ENV_TERMINATION_MESSAGE: str(workshop.root / "gone" / "message")})
    out, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.DONE
    assert isinstance(parse_line(out.splitlines()[-1]), Result)
    assert b"termination message" in err


def test_a_mover_with_a_limit_is_still_at_it_when_one_without_would_be_done(workshop: Workshop) -> None:
    for name in ("a.bin", "b.bin"):
        (workshop.source / name).write_bytes(bytes(10_000))
    options = {"fileRoot": str(workshop.target), "maxBytesPerSecond": 1}
    process = workshop.start(workshop.plan(options=options))
    wait_for_progress(process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    process = workshop.start(workshop.plan())
    process.communicate(timeout=60)
    assert process.returncode == ExitCode.DONE


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_mover_that_is_asked_to_stop_leaves_no_result_and_goes_on_later(workshop: Workshop, how: signal.Signals) -> None:
    workshop.big()
    process = workshop.start(workshop.plan())
    wait_for_progress(process)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert not any(isinstance(parse_line(line), Result) for line in out.splitlines())
    assert not workshop.message.exists()
    assert [path.name for path in workshop.target.iterdir()] == [".partial-uid"]
    assert workshop.lock_is_free()
    workshop.big(1)
    assert workshop.run(workshop.plan())[0] == ExitCode.DONE


def test_a_mover_ends_with_its_operator(workshop: Workshop) -> None:
    workshop.big()
    process = workshop.start(workshop.plan(), environment={ENV_EXIT_WITH_PARENT: "1"})
    wait_for_progress(process)
    assert not workshop.lock_is_free()
    assert process.stdin is not None
    process.stdin.close()  # as the kernel does when the operator dies
    assert process.wait(timeout=60) == 143
    assert workshop.lock_is_free()
    assert not (workshop.target / "run").exists()
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()


def test_a_mover_in_a_pod_does_not_mind_that_nobody_holds_its_input(workshop: Workshop) -> None:
    process = workshop.start(workshop.plan())
    assert process.stdin is not None
    process.stdin.close()
    assert process.stdout is not None
    assert process.stderr is not None
    lines = process.stdout.read().splitlines()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == ExitCode.DONE
    assert isinstance(parse_line(lines[-1]), Result)


def test_a_mover_whose_output_nobody_reads_any_more_ends_and_frees_its_lock(workshop: Workshop) -> None:
    workshop.big()
    process = workshop.start(workshop.plan())
    wait_for_progress(process)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()
    assert process.stderr is not None
    process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 143
    assert workshop.lock_is_free()
