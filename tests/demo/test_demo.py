"""`make demo` shows what the README promises, and leaves nothing behind, however it ends."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_cluster.build import build
from local_cluster.operator_process import ROOT
from local_cluster.paths import cache_root


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build()


class Demo:
    """The demo as a process, with a temp folder and a cache of its own, so that what it leaves behind can be counted."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.temp = folder / "t"
        self.temp.mkdir()
        cache = folder / "cache"
        cache.mkdir()
        (cache / "kube").symlink_to(cache_root() / "kube")
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "PYTHONPATH": str(ROOT / "deploy" / "local"),
            "TMPDIR": str(self.temp),
            "CHECKPOINT_OPERATOR_CACHE": str(cache),
            **env,
        }
        self.output = ""
        self._seen = threading.Condition()

    def start(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "deploy" / "demo" / "demo.py"), *arguments],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                with self._seen:
                    self.output += line
                    self._seen.notify_all()

    def wait_for(self, text: str) -> None:
        with self._seen:
            assert self._seen.wait_for(lambda: text in self.output, timeout=60), self.output

    def end(self) -> int:
        code = self.process.wait(timeout=120)
        self._reader.join()
        return code

    def left(self) -> list[str]:
        """Processes that name our temp folder, and files below it."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.temp).encode() in (process / "cmdline").read_bytes():
                    found.append((process / "cmdline").read_text())
            except OSError:
                continue
        return found + [str(path) for path in self.temp.rglob("*") if path.is_file()]


@pytest.fixture
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    made = Demo(tmp_path_factory.mktemp("d"))
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.end()


def test_it_shows_the_table_and_the_proof_and_ends_by_itself(demo: Demo) -> None:
    demo.start()
    assert demo.end() == 0, demo.output
    assert "$ kubectl get checkpointartifacts -n demo" in demo.output
    assert re.search(r"NAME +TYPE +PHASE +PROGRESS +SIZE +JOB +STEP +LOSS +AGE", demo.output)
    assert re.search(r"dpo-llama-2 +checkpoint +Ready +100% +60Ki +dpo-llama +2 +0\.69 +\d+s", demo.output)
    assert "storageURI:     s3://checkpoints/experiments/dpo-llama/checkpoint-2" in demo.output
    assert "experiments/dpo-llama/checkpoint-2/adapter_model.safetensors" in demo.output
    assert "compared 11 files, 61335 bytes: every byte is what the training wrote" in demo.output
    assert demo.left() == []


@pytest.mark.parametrize("moment", ["==> Kubernetes", "==> S3", "==> the operator", "$ kubectl get checkpointartifacts"])
def test_ctrl_c_at_any_moment_leaves_nothing_and_no_traceback(demo: Demo, moment: str) -> None:
    demo.start()
    demo.wait_for(moment)
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == 130, demo.output
    assert "interrupted; everything was stopped" in demo.output
    assert "Traceback" not in demo.output
    assert demo.left() == []


def test_what_is_kept_runs_until_it_is_stopped(demo: Demo) -> None:
    demo.env["KEEP"] = "1"
    demo.start()
    assert demo.end() == 0, demo.output
    exports = dict(re.findall(r"^export (\w+)=(.*)$", demo.output, re.MULTILINE))
    shown = subprocess.run(
        ["kubectl", "get", "ckpt", "-n", "demo", "dpo-llama-2"],
        env={
            "HOME": str(demo.temp.parent),
            "KUBECONFIG": exports["KUBECONFIG"],
            "PATH": exports["PATH"].replace("$PATH", os.environ["PATH"]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Ready" in shown.stdout
    demo.start("down")
    assert demo.end() == 0
    assert "==> stopped the demo" in demo.output
    assert demo.left() == []
