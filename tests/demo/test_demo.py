"""`make demo` shows what the README promises, and leaves nothing behind, however it ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local_cluster.errors import NodeUnavailable
from local_cluster.image import ImageUnavailable, ensure_image
from local_cluster.node import prepare_node
from local_cluster.operator_process import ROOT
from local_cluster.paths import cache_root
from local_cluster.providers import programs_dir, silent


@pytest.fixture(scope="module", autouse=True)
def has_node() -> bool:
    """Whether a node can run here. What the demo needs is built before: its own tests are no place to wait for that."""
    programs_dir(silent)
    try:
        prepare_node(silent)
        ensure_image(silent)
    except (NodeUnavailable, ImageUnavailable):
        return False
    return True


class Demo:
    """The demo as a process, with a temp folder and a cache of its own, so that what it leaves behind can be counted."""

    def __init__(self, folder: Path) -> None:
        self.temp = folder / "t"
        self.temp.mkdir()
        cache = folder / "cache"
        cache.mkdir()
        for built in cache_root().iterdir():
            if built.is_dir() and built.name not in ("demo", "clusters"):
                (cache / built.name).symlink_to(built)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "PYTHONPATH": str(ROOT / "deploy" / "local"),
            "TMPDIR": str(self.temp),
            "CHECKPOINT_OPERATOR_CACHE": str(cache),
        }
        if "KUBEBUILDER_ASSETS" in os.environ:
            self.env["KUBEBUILDER_ASSETS"] = os.environ["KUBEBUILDER_ASSETS"]
        self.output = ""
        self._seen = threading.Condition()

    def start(self, *arguments: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "deploy" / "demo"), *arguments],
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
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
            assert self._seen.wait_for(lambda: text in self.output, timeout=150), self.output

    def end(self) -> int:
        code = self.process.wait(timeout=240)
        self._reader.join()
        return code

    def left(self) -> list[str]:
        """Processes that name our temp folder, and files below it."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                texts = [(process / name).read_bytes() for name in ("cmdline", "environ")]
            except OSError:
                continue
            if any(str(self.temp).encode() in text for text in texts):
                found.append(texts[0].decode(errors="replace"))
        # Unlike rglob, os.walk does not mind a folder that is being removed right now.
        return found + [os.path.join(folder, name) for folder, _, names in os.walk(self.temp) for name in names]


@pytest.fixture
def new_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Demo]]:
    made: list[Demo] = []

    def make() -> Demo:
        made.append(Demo(tmp_path_factory.mktemp("d")))
        return made[-1]

    yield make
    for demo in made:
        if demo.process.poll() is None:
            demo.process.kill()
            demo.end()


def assert_shows_everything(demo: Demo, *, on_node: bool) -> None:
    assert ("$ helm install checkpoint-operator charts/checkpoint-operator" in demo.output) == on_node
    assert ("a training Job writes a checkpoint into the claim" in demo.output) == on_node
    assert "$ kubectl get checkpointartifacts -n demo" in demo.output
    assert re.search(r"NAME +TYPE +PHASE +PROGRESS +SIZE +JOB +STEP +LOSS +AGE", demo.output)
    assert re.search(r"dpo-llama-2 +checkpoint +Ready +100% +60Ki +dpo-llama +2 +0\.69 +\d+s", demo.output)
    assert "storageURI:     s3://checkpoints/experiments/dpo-llama/checkpoint-2" in demo.output
    assert re.search(r" \d+  experiments/dpo-llama/checkpoint-2/adapter_model\.safetensors\n", demo.output)
    assert "the manifest in the bucket has the digest that the status names" in demo.output
    assert "compared 11 files, 61335 bytes: every byte is what the training wrote" in demo.output


def test_two_at_once_show_everything_and_only_what_is_to_be_kept_stays(new_demo: Callable[[], Demo], has_node: bool) -> None:
    ends, kept = new_demo(), new_demo()
    ends.start(NODE="0")
    kept.start(KEEP="1")
    assert ends.end() == 0, ends.output
    assert_shows_everything(ends, on_node=False)
    assert ends.left() == []

    assert kept.end() == 0, kept.output
    assert_shows_everything(kept, on_node=has_node)
    exports = dict(re.findall(r"^export (\w+)=(.*)$", kept.output, re.MULTILINE))
    shown = subprocess.run(
        ["kubectl", "get", "ckpt", "-n", "demo", "dpo-llama-2"],
        env={
            "HOME": str(kept.temp.parent),
            "KUBECONFIG": exports["KUBECONFIG"],
            "PATH": exports["PATH"].replace("$PATH", os.environ["PATH"]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Ready" in shown.stdout
    kept.start("down")
    assert kept.end() == 0, kept.output
    assert "==> stopped the demo that was kept running" in kept.output
    assert kept.left() == []


def test_ctrl_c_and_a_kill_in_the_middle_leave_nothing(new_demo: Callable[[], Demo]) -> None:
    interrupted, killed = new_demo(), new_demo()
    for demo in (interrupted, killed):
        demo.start()
    for demo, number in ((interrupted, signal.SIGINT), (killed, signal.SIGKILL)):
        demo.wait_for("$ kubectl get checkpointartifacts")
        demo.process.send_signal(number)
    assert interrupted.end() == 130, interrupted.output
    assert "==> interrupted; everything was stopped" in interrupted.output
    assert "Traceback" not in interrupted.output
    assert interrupted.left() == []

    assert killed.end() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while killed.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert killed.left() == []


@pytest.mark.parametrize("moment", ["A checkpoint that", "\n==> "])
def test_ctrl_c_at_the_start_gives_no_traceback(new_demo: Callable[[], Demo], moment: str) -> None:
    demo = new_demo()
    demo.start()
    demo.wait_for(moment)
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == 130, demo.output
    assert "Traceback" not in demo.output
    assert demo.left() == []


def test_a_word_that_is_no_command_is_an_error_with_the_way_out(new_demo: Callable[[], Demo]) -> None:
    demo = new_demo()
    demo.start("dwon")
    assert demo.end() == 1
    assert demo.output == "error: 'dwon' is no command of the demo; there is one, 'down'\n"
