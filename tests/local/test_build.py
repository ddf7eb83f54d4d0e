"""What a builder is told: that it waits, what went wrong, what to do. No test here compiles Kubernetes."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from local_cluster import LocalClusterError
from local_cluster.build import KUBE_SOURCE, NAMES, VERSITYGW_SOURCE, Source, build, build_go_program
from local_cluster.go_build import GoSource, compile_once, pinned_version
from local_cluster.go_toolchain import find_go, wanted_version
from local_cluster.paths import CACHE_VARIABLE, locked

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("go") is None, reason="these tests want a Go on PATH"),
]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of one file that stands for the real one, with a cache of its own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    local = tmp_path / "kubernetes"
    local.mkdir()
    (local / "go.mod").write_text("module k8s.io/kubernetes\n\ngo 1.20\n")
    (local / "empty.go").write_text("package kubernetes\n")
    (source / "go.mod").write_text(
        "module small\n\ngo 1.20\n\nrequire (\n\tk8s.io/kubernetes v1.2.3\n)\n\nreplace k8s.io/kubernetes => ../kubernetes\n"
    )
    (source / "go.sum").write_text("")
    (source / "main.go").write_text('package main\n\nimport _ "k8s.io/kubernetes"\n\nfunc main() {}\n')
    return source


def test_a_build_has_every_name_and_is_made_once(small: Path) -> None:
    said: list[str] = []
    folder = build(small, say=said.append)
    assert folder.name.startswith("v1.2.3-")
    assert all((folder / name).resolve() == folder / "kube" for name in NAMES)
    assert any("nine minutes" in line for line in said)
    said.clear()
    assert build(small, say=said.append) == folder
    assert said == []
    (small / "main.go").write_text('package main\n\nimport _ "k8s.io/kubernetes"\n\nfunc main() { println() }\n')
    assert build(small, say=said.append) != folder, "another source is another build"


def test_a_compile_error_shows_its_end_the_log_and_what_to_do(small: Path) -> None:
    (small / "main.go").write_text("package main\n\nfunc main() { undefinedThing() }\n")
    with pytest.raises(LocalClusterError) as caught:
        build(small, say=lambda _: None)
    text = str(caught.value)
    assert "undefined: undefinedThing" in text
    assert "To do: " in text
    log = Path(text.partition("Full log: ")[2].splitlines()[0])
    assert "undefinedThing" in log.read_text()
    left = [path.name for path in log.parent.iterdir() if path.suffix not in (".log", ".lock")]
    assert left == [], "a failed build leaves no half of itself"


def test_a_broken_copy_of_the_real_module_says_that_the_sums_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    copy = shutil.copytree(KUBE_SOURCE, tmp_path / "kube")
    sums = (copy / "go.sum").read_text().splitlines(keepends=True)
    (copy / "go.sum").write_text("".join(line for line in sums if "go.etcd.io/etcd/server" not in line))
    with pytest.raises(LocalClusterError, match=r"(?s)missing go.sum entry.*To do: .*go mod tidy"):
        build(copy, say=lambda _: None)


def test_the_second_builder_says_that_it_waits(small: Path, tmp_path: Path) -> None:
    key = Source.of(small).key("")
    said: list[str] = []
    waiting = threading.Event()

    def listen(text: str) -> None:
        said.append(text)
        if "waiting" in text:
            waiting.set()

    folder = build(small, say=listen)
    assert folder.name.rpartition("-")[0] == key.rpartition("-")[0]
    shutil.rmtree(folder)
    with locked(folder.parent / f"{folder.name}.lock", lambda: None):
        thread = threading.Thread(target=build, args=(small,), kwargs={"say": listen})
        thread.start()
        assert waiting.wait(10)
    thread.join(60)
    assert (folder / "kubectl").exists()


def test_a_program_of_any_pinned_module_is_built_once_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    made, folder = tmp_path / "made", tmp_path / "pin"
    for where in (made / "cmd" / "greeter", folder):
        where.mkdir(parents=True)
    (made / "go.mod").write_text("module example.org/made\n\ngo 1.20\n")
    (made / "cmd" / "greeter" / "main.go").write_text('package main\n\nfunc main() { print("hello") }\n')
    (folder / "go.mod").write_text(
        "module pin\n\ngo 1.20\n\nrequire example.org/made v0.9.1 // indirect\n\nreplace example.org/made => ../made\n"
    )
    said: list[str] = []
    program = build_go_program(folder, "example.org/made/cmd/greeter", "greeter", said.append)
    assert subprocess.run([program], capture_output=True, check=True, text=True).stderr == "hello"
    assert any("building greeter v0.9.1 with " in line for line in said)
    said.clear()
    assert build_go_program(folder, "example.org/made/cmd/greeter", "greeter", said.append) == program
    assert said == []
    with pytest.raises(LocalClusterError, match=r"requires no released version of example\.org/other; add that line"):
        build_go_program(folder, "example.org/other", "other", said.append)


@pytest.fixture
def two_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with a program in each of two folders."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    source = tmp_path / "source"
    for name in ("one", "two"):
        (source / name).mkdir(parents=True)
        (source / name / "main.go").write_text(f'package main\n\nfunc main() {{ println("{name}") }}\n')
    (source / "go.mod").write_text("module several\n\ngo 1.20\n")
    return source


def test_several_programs_of_one_module_lie_in_one_folder(two_programs: Path) -> None:
    source = GoSource(two_programs, "v1.0.0", (), ("one", "two"), ("./one", "./two"))
    folder = compile_once(source, "several", "building {version} with {go}", lambda _: None)
    for name in ("one", "two"):
        said = subprocess.run([folder / name], capture_output=True, text=True, check=True).stderr
        assert said == f"{name}\n"
    key = source.key("amd64")
    (two_programs / "two" / "main.go").write_text("package main\n\nfunc main() {}\n")
    assert source.key("amd64") != key, "another source is another build"


def test_a_name_that_no_package_makes_is_an_error_and_no_build(two_programs: Path) -> None:
    source = GoSource(two_programs, "v1.0.0", (), ("one", "three"), ("./one", "./two"))
    with pytest.raises(LocalClusterError, match="make no three"):
        compile_once(source, "several", "building {version} with {go}", lambda _: None)


def test_versitygw_is_pinned_to_a_release() -> None:
    assert pinned_version(VERSITYGW_SOURCE, "github.com/versity/versitygw") == "v1.8.0"


def test_a_go_that_is_too_old_and_cannot_be_replaced_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    # No index is reachable, as on a machine without a network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    old = tmp_path / "bin" / "go"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho go1.19.4\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(old.parent), prepend=":")
    with pytest.raises(LocalClusterError, match=r"(?s)is Go 1\.19\.4.*Install Go 1\.26\.0 or newer"):
        find_go(KUBE_SOURCE / "go.mod", lambda _: None)
    assert wanted_version(KUBE_SOURCE / "go.mod") == (1, 26, 0)
