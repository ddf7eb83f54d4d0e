"""The library's front door: what may be written for a place, who serves it, what an error says, who is cancelled when."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint_operator.api.errors import FAILURES, ErrorCode, Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import InvalidURI, TargetURI
from checkpoint_operator.storage import (
    AsyncStorageManager,
    RLHFStorageError,
    StorageError,
    StorageManager,
    get_storage_manager,
)
from checkpoint_operator.storage.listing import Filters, matches, read_in_order
from checkpoint_operator.storage.places import find_place

Install = Callable[[str, dict[str, str]], None]


def refused(reason: Reason, said: str = "") -> pytest.RaisesExc[StorageError]:
    return pytest.RaisesExc(StorageError, check=lambda error: error.reason is reason and said in error.message)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the test's own, with RLHF_STORAGE_PATH unset."""
    monkeypatch.delenv("RLHF_STORAGE_PATH", raising=False)
    folder = Path(tmp_path.resolve(), "work")
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ---- Places


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("file:///data/run", "file:///data/run"),
        ("/data/run", "file:///data/run"),
        ("/data/run/", "file:///data/run"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("azure://container/run", "azure://container/run"),
        ("az://container/run", "azure://container/run"),
        ("abfss://container@account.dfs.core.windows.net/a/run", "azure://container/a/run"),
        ("run", "file://{base}/run"),
        ("./run", "file://{base}/run"),
        ("runs/a/", "file://{base}/runs/a"),
        ("./s3:run", "file://{base}/s3:run"),
        (".", "file://{base}"),
    ],
)
def test_what_people_write_for_a_place_becomes_one_uri(text: str, uri: str, base: Path) -> None:
    assert str(find_place(text).uri) == uri.format(base=base)


def test_a_path_object_is_a_path(base: Path) -> None:
    assert str(find_place(base / "run").uri) == f"file://{base}/run"
    with refused(Reason.UNSUPPORTED_URI, "write './…' for a path"):
        find_place(Path("s3://bucket/run"))  # pathlib has made one slash of the two


def test_a_relative_path_lies_below_the_storage_path_and_an_absolute_one_does_not(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLHF_STORAGE_PATH", str(tmp_path / "store"))
    real = tmp_path.resolve()
    assert str(find_place("runs/a").uri) == f"file://{real}/store/runs/a"
    assert str(find_place(f"{real}/elsewhere").uri) == f"file://{real}/elsewhere"
    assert str(find_place(f"file://{real}/elsewhere").uri) == f"file://{real}/elsewhere"
    monkeypatch.setenv("RLHF_STORAGE_PATH", "")
    assert str(find_place("runs/a").uri) == f"file://{base}/runs/a"


def test_below_a_root_of_the_options_every_path_is_one_of_that_root() -> None:
    for text in ("runs/a", "/runs/a", "file:///runs/a"):
        assert str(find_place(text, rooted=True).uri) == "file:///runs/a"
    assert str(find_place(".", rooted=True, allow_root=True).uri) == "file:///"


def test_links_above_a_place_are_the_callers_own_and_followed_while_the_place_itself_is_not(base: Path) -> None:
    (base / "disk" / "runs").mkdir(parents=True)
    (base / "scratch").symlink_to("disk")
    (base / "disk" / "latest").symlink_to("runs")
    assert str(find_place("scratch/runs/a").uri) == f"file://{base}/disk/runs/a"
    assert str(find_place("scratch/latest").uri) == f"file://{base}/disk/latest"
    assert str(find_place("scratch/latest", allow_root=True).uri) == f"file://{base}/disk/runs", "for a list"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("~/run", "a shell expands"),
        ("~user/run", "a shell expands"),
        ("C:\\runs\\a", "a Windows path"),
        ("C:/runs/a", "a Windows path"),
        ("C:", "a Windows path"),
        ("\\\\server\\share", "a Windows path"),
        ("runs\\a", "a Windows path"),
        ("../run", "'..' segment"),
        ("runs/../../a", "'..' segment"),
        ("/runs/../a", "'..' segment"),
        ("runs/./a", "'.' segment"),
        ("runs//a", "empty segment"),
        ("/", "names a whole volume"),
        ("/runs/a?b", "has a query"),
        ("runs/a#b", "has a fragment"),
        ("runs/a\nb", "a control character"),
        ("runs/a\0b", "a control character"),
        ("runs/.metadata.json", "a name of the operator's own"),
        ("s3:/bucket/run", "has '://'"),
        ("S3://bucket/run", "has no supported scheme"),
        ("hdfs://bucket/run", "install the package that serves this one"),
        ("az://Container/run", "names no valid bucket"),
        ("az://container", "names a whole bucket"),
        ("abfss://container/run", "abfss://container@account.dfs.core.windows.net/path"),
        ("abfss://container@account.blob.core.windows.net/run", "abfss://container@account.dfs.core.windows.net/path"),
        ("abfss://container@account.dfs.core.windows.net/", "names a whole bucket"),
        ("x" * 2000, "at most 1024 are allowed"),
    ],
)
def test_what_is_no_place_is_refused_with_the_way_out(text: str, said: str, base: Path) -> None:
    with refused(Reason.UNSUPPORTED_URI, said) as caught:
        find_place(text)
    assert caught.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize(
    "text", ["s3:KEY:SECRET@bucket/run", "https://KEY:SECRET@bucket/run", "~KEY:SECRET@x", "abfss://a:SECRET@b/c"]
)
def test_a_secret_in_what_is_no_place_is_not_repeated(text: str) -> None:
    with refused(Reason.UNSUPPORTED_URI) as caught:
        find_place(text)
    assert "SECRET" not in str(caught.value)


def test_the_custom_resource_has_the_four_schemes_alone() -> None:
    for text in ("az://container/run", "abfss://container@account.dfs.core.windows.net/run", "run", "/run", "hub://x/run"):
        with pytest.raises(InvalidURI, match="no supported scheme"):
            TargetURI.parse(text)


def test_a_place_that_named_its_account_is_written_with_it_again() -> None:
    place = find_place("abfss://container@account.dfs.core.windows.net/a/run")
    assert place.azure_account == "account"
    assert place.written("azure://container/a/run/x") == "abfss://container@account.dfs.core.windows.net/a/run/x"
    assert str(find_place(place.written(str(place.uri))).uri) == str(place.uri)
    assert find_place("azure://container/run").written("azure://container/run") == "azure://container/run"


def test_an_account_that_contradicts_the_options_is_refused() -> None:
    manager = StorageManager(TargetOptions(azure_account="mine"))
    with refused(Reason.UNSUPPORTED_URI, "'theirs'"):
        manager.get_metadata("abfss://container@theirs.dfs.core.windows.net/run")


# ---- Backends of other packages

BACKEND = """
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Stored

class Backend:
    def __init__(self, options):
        self.options, self.kept = options, {}

    def upload_artifact(self, request):
        self.kept[str(request.uri)] = request.metadata
        return Stored(
            storage_uri=str(request.uri), size_bytes=0, file_count=0, manifest_digest="", content_digest="", data_owner=True
        )

    def get_metadata(self, uri):
        return self.kept[str(uri)]

    def list_artifacts(self, uri, artifact_type=None, prefix=""):
        return iter(self.kept.values())

def broken(options):
    raise RuntimeError("with a SECRET in it")
"""


def distribution(site: Path, name: str, entries: dict[str, str]) -> None:
    """An installed package, as pip leaves it."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{scheme} = {value}" for scheme, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[checkpoint_operator.backends]", *lines, ""]))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    site = tmp_path / "site"
    site.mkdir()
    (site / "hub_backend.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(str(site))
    yield lambda name, entries: distribution(site, name, entries)
    sys.modules.pop("hub_backend", None)


def test_another_package_can_serve_a_scheme(install: Install) -> None:
    install("hub-backend", {"hub": "hub_backend:Backend"})
    manager = StorageManager(TargetOptions(region="here"))
    metadata = ArtifactMetadata(artifact_id="a", job_name="dpo")
    assert manager.upload(".", "hub:///run", metadata) == "hub:///run", "a bucket is not needed"
    uri = manager.upload(".", "hub://Some_Org/run/", metadata)
    assert uri == "hub://Some_Org/run"
    assert manager.get_metadata(uri).job_name == "dpo"
    assert manager.backend("hub") is manager.backend("hub"), "made once and kept"
    assert len(list(manager.list("hub://Some_Org", job_name="dpo"))) == 2
    for text in ("hub://user:key@org/run", "hub://org/../run", "hub://org/run?x", "hub://org"):
        with refused(Reason.UNSUPPORTED_URI):
            manager.get_metadata(text)


def test_the_schemes_of_this_package_cannot_be_replaced(install: Install, tmp_path: Path) -> None:
    install("hub-backend", dict.fromkeys(("file", "s3", "az", "abfss"), "hub_backend:Backend"))
    manager = StorageManager(TargetOptions(file_root=str(tmp_path)))
    with refused(Reason.NOT_FOUND):
        manager.get_metadata("file:///run")
    assert type(manager.backend("s3")).__module__.startswith("checkpoint_operator.")
    assert find_place("az://container/run").uri.scheme == "azure"


@pytest.mark.parametrize("value", ["hub_backend:broken", "hub_backend:Missing", "no_such_module:Backend"])
def test_a_package_whose_backend_is_broken_is_named(install: Install, value: str) -> None:
    install("hub-backend", {"hub": value})
    with refused(Reason.BACKEND_NOT_INSTALLED, "the package 'hub-backend' registers hub://") as caught:
        StorageManager().get_metadata("hub://org/run")
    assert caught.value.__cause__ is not None
    assert "SECRET" not in str(caught.value)


def test_two_packages_that_serve_one_scheme_are_both_named(install: Install) -> None:
    install("hub-one", {"hub": "hub_backend:Backend"})
    install("hub-two", {"hub": "hub_backend:Backend"})
    with refused(Reason.BACKEND_NOT_INSTALLED, "hub-one and hub-two both register hub://"):
        StorageManager().get_metadata("hub://org/run")


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("azure", "azure")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(scheme: str, extra: str) -> None:
    script = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("boto3", "botocore", "google", "azure"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from checkpoint_operator.storage import StorageError, StorageManager
try:
    StorageManager().get_metadata("{scheme}://bucket/run")
except StorageError as error:
    print(error.reason, error.message)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith("BackendNotInstalled")
    assert f"pip install 'checkpoint-operator[{extra}]'" in said


def test_the_library_imports_no_sdk_before_it_is_asked_for_one() -> None:
    script = "import sys, checkpoint_operator.storage; print({'boto3', 'botocore', 'google', 'azure'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- The manager


def test_a_process_has_one_manager_whoever_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(8)

    def ask() -> StorageManager:
        barrier.wait()
        return get_storage_manager()

    with ThreadPoolExecutor(8) as pool:
        managers = {id(pool_result.result()) for pool_result in [pool.submit(ask) for _ in range(8)]}
    assert managers == {id(get_storage_manager())}


def test_a_backend_is_made_once_whoever_asks_first() -> None:
    manager, barrier = StorageManager(TargetOptions(allow_ambient_credentials=True)), threading.Barrier(8)

    def ask() -> int:
        barrier.wait()
        return id(manager.backend("s3"))

    with ThreadPoolExecutor(8) as pool:
        assert len({one.result() for one in [pool.submit(ask) for _ in range(8)]}) == 1


# ---- Errors


def test_an_error_says_what_was_asked_where_and_why(base: Path) -> None:
    source = base / "source"
    source.mkdir()
    for act, operation in (
        (lambda: StorageManager().download("nowhere/run", base / "restored"), "download"),
        (lambda: StorageManager().get_metadata("nowhere/run"), "get metadata"),
        (lambda: StorageManager().upload(source / "missing", "run"), "upload"),
    ):
        with pytest.raises(RLHFStorageError) as caught:
            act()
        context = caught.value.context
        assert (context["operation"], context["backend"]) == (operation, "file")
        assert context["uri"].startswith(f"file://{base}/")


def test_what_was_asked_decides_the_code_of_a_refusal_and_what_was_being_done_is_kept() -> None:
    for operation, code in (
        ("upload", ErrorCode.UPLOAD),
        ("download", ErrorCode.DOWNLOAD),
        ("verify", ErrorCode.DOWNLOAD),
        ("list", ErrorCode.METADATA),
        ("get metadata", ErrorCode.METADATA),
        ("delete", ErrorCode.METADATA),
    ):
        error = StorageError(Reason.REQUEST_REJECTED, "no", operation="head", uri="s3://b/run/file", request_id="7")
        error.locate(operation, uri="s3://b/run", backend="s3")
        assert error.code is code
        assert error.context == {
            "uri": "s3://b/run/file",
            "backend": "s3",
            "operation": operation,
            "request": "head",
            "request_id": "7",
        }


def test_an_error_survives_the_way_to_another_process() -> None:
    error = StorageError(Reason.TARGET_BUSY, "somebody is there", uri="s3://b/x", path=None)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(copy), str(copy), copy.context) == (StorageError, str(error), error.context)


def test_every_code_has_its_line_in_the_docs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "failures.md").read_text()
    for code in ErrorCode:
        lines = [line for line in page.splitlines() if line.startswith(f"| {code} |")]
        assert len(lines) == 1, code
        assert all(f"`{reason}`" in lines[0] for reason, failure in FAILURES.items() if failure.code is code), code


# ---- Lists


def test_a_list_is_read_in_parallel_and_given_in_the_order_of_the_store() -> None:
    together = threading.Barrier(4, timeout=30)

    def read(place: int) -> int | None:
        together.wait()  # only four at once get past
        return None if place % 3 == 0 else place

    assert list(read_in_order(range(16), read, threads=4)) == [place for place in range(16) if place % 3]


def test_a_list_is_never_read_further_ahead_than_its_threads() -> None:
    asked = 0

    def places() -> Iterator[int]:
        nonlocal asked
        while True:
            asked += 1
            yield asked

    found = read_in_order(places(), lambda place: place, threads=4)
    for taken in range(1, 1000):
        assert next(found) == taken
        assert asked < taken + 8
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("list")]


def test_an_error_ends_a_list_at_its_place() -> None:
    def read(place: int) -> int:
        if place == 5:
            raise StorageError(Reason.STORE_UNAVAILABLE, "gone")
        return place

    seen = []
    with refused(Reason.STORE_UNAVAILABLE):
        for place in read_in_order(range(100), read, threads=4):
            seen.append(place)  # noqa: PERF402 - what came before the error counts
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, True),
        ({"job_name": "dpo"}, True),
        ({"job_name": None}, True),
        ({"job_name": "dp"}, False),
        ({"job_name": "dpo", "algorithm": "ppo"}, False),
        ({"step": 0}, True),
        ({"step": 1}, False),
        ({"tags": {"a": "1"}}, True),
        ({"tags": {"a": "1", "b": "2"}}, True),
        ({"tags": {"a": "2"}}, False),
        ({"tags": {"c": "1"}}, False),
        ({"tags": {}, "labels": None}, True),
        ({"labels": {"a": "1"}}, False),
        ({"stage": "Final"}, False),
    ],
)
def test_filters_are_exact_and_all_must_hold(filters: Filters, found: bool) -> None:
    metadata = ArtifactMetadata(job_name="dpo", algorithm="dpo", step=0, tags={"a": "1", "b": "2"})
    assert matches(metadata, filters) is found


def test_a_filter_that_does_not_exist_is_no_filter_that_finds_everything(base: Path) -> None:
    with pytest.raises(TypeError, match="no such filter: job"):
        StorageManager().list(".", job="dpo")  # type: ignore[call-arg]


@pytest.mark.parametrize("prefix", ["/experiments", "../x", "a/../b", "a//b", "a\\/b"])
def test_a_prefix_that_can_begin_no_path_is_refused(prefix: str, base: Path) -> None:
    with refused(Reason.UNSUPPORTED_URI, "prefix"):
        StorageManager().list(".", prefix=prefix)


# ---- The async twin


def test_an_error_reaches_the_one_who_awaits(base: Path) -> None:
    storage = AsyncStorageManager(StorageManager())
    for call in (storage.get_metadata("run"), storage.download("run", base / "x")):
        with refused(Reason.NOT_FOUND):
            asyncio.run(call)


def test_the_twin_has_every_method_of_the_manager_with_the_same_parameters() -> None:
    for name in ("upload", "download", "verify", "delete", "get_metadata", "list"):
        sync = inspect.signature(getattr(StorageManager, name)).parameters
        twin = inspect.signature(getattr(AsyncStorageManager, name)).parameters
        assert [*twin] == [parameter for parameter in sync if parameter != "cancelled"], name
