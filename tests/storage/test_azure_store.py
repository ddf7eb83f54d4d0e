"""What only Azure does: block ids, SAS tokens, names that it alters, and a listing that knows half-sent blobs."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobBlock, ContentSettings
from azure.storage.blob._shared.policies import StorageRequestHook
from azure_world import AzureWorld, credentials, sas
from certificates import make_certificates
from proxy import Fault as Befalls
from proxy import Proxy, proxy
from storage_world import MARKER, MIB, Fault, OnLook, fetched, make, put_object, race, refused, tree
from test_s3_store import closed_port, everything_said, outcome, start_mover

import local_cluster as lc
from checkpoint_operator.api.errors import ErrorCode, ExitCode, Reason
from checkpoint_operator.api.protocol import Layout, TargetOptions
from checkpoint_operator.storage import StorageError, azure
from checkpoint_operator.storage import azure_blocks as blocks
from checkpoint_operator.storage.azure import AzureStore
from checkpoint_operator.storage.azure_access import NAMES, find_access
from checkpoint_operator.storage.azure_blocks import BlockId
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.store import Part, Piece, UploadLost
from checkpoint_operator.storage.transfer import STREAMS


@pytest.fixture
def big_source(tmp_path: Path) -> Path:
    """One file of five blocks beside a small one."""
    return make(tmp_path / "big", {"model.bin": os.urandom(MIB) * 40, "small": b"x"})


@pytest.fixture
def between(azure_world: AzureWorld) -> Iterator[Proxy]:
    """A proxy between the backend and Azurite; the raw way of the test goes past it."""
    with proxy(azure_world.server.endpoint, azure_world.server.account, azure_world.server.key) as found:
        azure_world.options = azure_world.options.replace(endpoint=f"{found.endpoint}/{azure_world.server.account}")
        yield found


def pieces_of(store: AzureStore, bodies: list[bytes]) -> list[Piece]:
    return [Piece(len(body), store.digest(body)) for body in bodies]


def send(store: AzureStore, key: str, upload_id: str, bodies: list[bytes]) -> list[Part]:
    return [
        Part(number, len(body), store.put_part(key, upload_id, number, body, store.digest(body)), store.digest(body))
        for number, body in enumerate(bodies, 1)
    ]


# ---- Refusals

REFUSALS: dict[str, Callable[[AzureWorld], object]] = {
    "a wrong key": lambda world: world.suffer(Fault.WRONG_CREDENTIALS),
    "a SAS token that may only read": lambda world: world.suffer(Fault.READ_ONLY),
    "a SAS token that has expired": lambda world: world.use_sas("rwdl", minutes=-5),
    "a SAS token of another container": lambda world: (
        credentials(world.work / "credentials", AZURE_STORAGE_SAS_TOKEN=sas(world.server, "another", "rwdl"))
        and (world.work / "credentials" / "AZURE_STORAGE_KEY").unlink()
    ),
}


@pytest.mark.parametrize("how", REFUSALS.values(), ids=REFUSALS)
def test_refused_credentials_are_named_and_never_shown(
    azure_world: AzureWorld, source: Path, how: Callable[[AzureWorld], object]
) -> None:
    how(azure_world)
    with refused(Reason.CREDENTIALS_REFUSED) as caught:
        azure_world.upload(source)
    assert caught.value.code is ErrorCode.CREDENTIALS
    assert not caught.value.retryable
    assert caught.value.context["backend"] == "azure"
    assert caught.value.context["request_id"]
    assert_nothing_secret(azure_world, everything_said(caught.value))
    assert azure_world.paths() == []


def assert_nothing_secret(world: AzureWorld, said: str) -> None:
    for file in (world.work / "credentials").iterdir():
        if file.name != "AZURE_STORAGE_ACCOUNT":
            secret = file.read_text().strip()
            found = re.search(r"sig=([^&]+)", secret)
            assert (found[1] if found else secret) not in said


def test_an_account_that_does_not_exist_is_named(azure_world: AzureWorld, source: Path) -> None:
    """As an emulator or a private cloud says it; in the public cloud the account's host name does not resolve."""
    azure_world.options = azure_world.options.replace(endpoint=azure_world.server.endpoint.replace("local", "other"))
    with refused(Reason.BUCKET_NOT_FOUND):
        azure_world.upload(source)


def test_a_store_that_is_down_is_no_verdict_and_no_url_is_shown(azure_world: AzureWorld, source: Path) -> None:
    azure_world.use_sas("rwdl")
    azure_world.options = azure_world.options.replace(endpoint=f"{closed_port()}/localaccount")
    with refused(Reason.STORE_UNAVAILABLE) as caught:
        azure_world.upload(source)
    assert caught.value.retryable
    assert "Connection refused" in caught.value.message
    assert_nothing_secret(azure_world, everything_said(caught.value))


def test_no_log_of_any_level_shows_a_signature(
    azure_world: AzureWorld, source: Path, between: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    azure_world.use_sas("rwdl")
    between.plan(Befalls.CUT, "PutObject", key="model.safetensors")
    with caplog.at_level(logging.DEBUG):
        azure_world.upload(source)
    assert "comp=list" in caplog.text, "urllib3 logs the URLs of requests"
    assert_nothing_secret(azure_world, caplog.text)


@pytest.mark.parametrize("name", ["AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING"])
@pytest.mark.parametrize("how", ["empty", "blank", "binary", "two lines", "half"])
def test_credentials_that_are_not_whole_never_become_those_of_the_process(
    azure_world: AzureWorld, source: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    # The operator's own identity could do it; a profile that is broken must not borrow it.
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", azure_world.server.account)
    monkeypatch.setenv("AZURE_STORAGE_KEY", azure_world.server.key)
    azure_world.options = azure_world.options.replace(allow_ambient_credentials=True)
    folder = azure_world.work / "credentials"
    (folder / "AZURE_STORAGE_KEY").unlink()
    contents = {"empty": b"", "blank": b" \n", "binary": b"SECRET\xff", "two lines": b"SECRET\nmore", "half": b"SECRET"}
    (folder / name).write_bytes(contents[how])
    with refused(Reason.CREDENTIALS_MISSING) as caught:
        azure_world.upload(source)
    assert "SECRET" not in everything_said(caught.value)
    assert azure_world.paths() == []


def test_a_profile_without_any_key_is_no_profile(azure_world: AzureWorld, source: Path) -> None:
    (azure_world.work / "credentials" / "AZURE_STORAGE_KEY").unlink()
    with refused(Reason.CREDENTIALS_MISSING) as caught:
        azure_world.upload(source)
    assert all(name in caught.value.message for name in NAMES if name != "AZURE_STORAGE_ACCOUNT")


def test_the_account_of_the_target_and_of_the_credentials_must_be_one(azure_world: AzureWorld, source: Path) -> None:
    azure_world.options = azure_world.options.replace(azure_account="another")
    with pytest.raises(StorageError, match="'localaccount', the target is in 'another'"):
        azure_world.upload(source)


def test_without_a_profile_the_environment_is_used_only_where_that_is_allowed(
    azure_world: AzureWorld, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", azure_world.server.account)
    monkeypatch.setenv("AZURE_STORAGE_KEY", azure_world.server.key)
    azure_world.options = azure_world.options.replace(credentials_directory=None)
    with refused(Reason.CREDENTIALS_MISSING):
        azure_world.upload(source)
    azure_world.options = azure_world.options.replace(allow_ambient_credentials=True)
    assert azure_world.upload(source).data_owner


def test_the_librarys_default_finds_the_account_by_a_connection_string(
    azure_world: AzureWorld, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = azure_world.server
    text = f"AccountName={server.account};AccountKey={server.key};BlobEndpoint={server.endpoint};"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    azure_world.options = TargetOptions(allow_ambient_credentials=True)
    assert azure_world.manager().upload(source, str(azure_world.uri())) == str(azure_world.uri())


ENDPOINTS: dict[str, tuple[dict[str, str], str]] = {
    "an account": ({"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": "a2V5"}, "https://acc.blob.core.windows.net"),
    "a SAS token": (
        {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=a2V5"},
        "https://acc.blob.core.windows.net",
    ),
    "another cloud": (
        {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=acc;AccountKey=a2V5;EndpointSuffix=core.chinacloudapi.cn"},
        "https://acc.blob.core.chinacloudapi.cn",
    ),
    "a connection string with a SAS token": (
        {"AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=https://x.example/;SharedAccessSignature=sv=1&sig=a2V5"},
        "https://x.example",
    ),
}


@pytest.mark.parametrize(("files", "endpoint"), ENDPOINTS.values(), ids=ENDPOINTS)
def test_the_account_is_found_by_its_credentials_and_they_do_not_show(
    tmp_path: Path, files: dict[str, str], endpoint: str
) -> None:
    access = find_access(TargetOptions(credentials_directory=credentials(tmp_path, **files)))
    assert access.endpoint == endpoint
    assert access.key == "a2V5" or access.sas == "sv=1&sig=a2V5"
    assert "a2V5" not in repr(access)


def test_a_process_without_an_identity_says_so_and_asks_no_metadata_address(
    azure_world: AzureWorld, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(azure_world.work))  # no `az` of whoever runs the tests
    reached: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: reached.append(address))
    https = closed_port().replace("http:", "https:")
    azure_world.options = TargetOptions(allow_ambient_credentials=True, endpoint=f"{https}/localaccount")
    with refused(Reason.CREDENTIALS_MISSING):
        azure_world.upload(source)
    assert reached == []


def test_a_token_never_goes_over_plain_http(azure_world: AzureWorld, source: Path) -> None:
    azure_world.options = TargetOptions(allow_ambient_credentials=True, endpoint=azure_world.server.endpoint)
    with refused(Reason.INVALID_SPEC) as caught:
        azure_world.upload(source)
    assert "HTTPS" in caught.value.message


def test_a_sas_token_in_the_endpoint_is_refused_and_not_repeated(azure_world: AzureWorld, source: Path) -> None:
    azure_world.options = azure_world.options.replace(endpoint=f"{azure_world.server.endpoint}?sig=abc")
    with refused(Reason.INVALID_SPEC) as caught:
        azure_world.upload(source)
    assert "sig=abc" not in everything_said(caught.value)


# ---- Keys that are rotated while a mover runs


@pytest.mark.parametrize("verb", ["read", "list", "start_upload", "put_part", "finish_upload"])
def test_keys_that_are_rotated_in_the_middle_of_an_upload_are_read_again(
    azure_world: AzureWorld, big_source: Path, verb: str
) -> None:
    folder = azure_world.work / "credentials"
    opened = azure_world.open(azure_world.uri())
    azure_world.settings = lambda: ()  # type: ignore[method-assign]  # this store, whatever the folder says by now
    azure_world._open = {(azure_world.bucket,): opened}
    rotated: list[str] = []

    def swap(what: str, _: str) -> None:
        if what == verb and not rotated:
            rotated.append(what)
            revoke(opened)
            (folder / "AZURE_STORAGE_KEY").unlink()
            credentials(folder, AZURE_STORAGE_SAS_TOKEN=sas(azure_world.server, azure_world.bucket, "rwdl"))

    azure_world.cues.append(swap)
    azure_world.upload(big_source)
    assert rotated
    assert tree(azure_world.download()) == tree(big_source)


def revoke(store: Any) -> None:
    """The key that a client holds is worth nothing from now on."""
    steps = [getattr(step, "_policy", None) for step in store._container.client._pipeline._impl_policies]
    [signer] = [step for step in steps if type(step).__name__ == "SharedKeyCredentialPolicy"]
    signer.account_key = "d3Jvbmctc2VjcmV0"  # type: ignore[union-attr]


def test_what_is_refused_with_the_keys_that_are_there_is_asked_once(
    azure_world: AzureWorld, source: Path, between: Proxy
) -> None:
    azure_world.suffer(Fault.WRONG_CREDENTIALS)
    with refused(Reason.CREDENTIALS_REFUSED):
        azure_world.upload(source)
    assert sum(between.asked.values()) == 1


# ---- Permissions


def test_the_letters_that_the_docs_name_are_enough(azure_world: AzureWorld, big_source: Path) -> None:
    azure_world.use_sas("rwdl")
    azure_world.upload(big_source)
    assert tree(azure_world.download()) == tree(big_source)
    azure_world.delete()
    assert azure_world.paths() == []


@pytest.mark.parametrize("letter", "rwdl")
def test_each_letter_that_the_docs_name_is_needed(azure_world: AzureWorld, source: Path, letter: str) -> None:
    azure_world.use_sas("rwdl".replace(letter, ""))
    with refused(Reason.CREDENTIALS_REFUSED):
        azure_world.upload(source)
        azure_world.delete()


def test_reading_needs_two_letters(azure_world: AzureWorld, source: Path) -> None:
    azure_world.upload(source)
    azure_world.use_sas("rl")
    assert len(list(azure_world.backend.list_artifacts(azure_world.uri()))) == 1
    assert tree(azure_world.download()) == tree(source)


def test_the_servers_certificate_is_checked_against_the_ca_bundle(
    azure_world: AzureWorld, source: Path, tmp_path: Path
) -> None:
    with lc.start_azurite("tls", tls=make_certificates(tmp_path / "tls")) as server:
        server.client().create_container(azure_world.bucket)
        folder = credentials(
            tmp_path / "tls-credentials", AZURE_STORAGE_ACCOUNT=server.account, AZURE_STORAGE_KEY=server.key
        )
        azure_world.options = TargetOptions(endpoint=server.endpoint, credentials_directory=folder, ca_bundle=str(server.ca))
        azure_world.upload(source)
        assert tree(azure_world.download()) == tree(source)
        azure_world.options = azure_world.options.replace(ca_bundle=None)
        with pytest.raises(StorageError, match="CERTIFICATE_VERIFY_FAILED"):
            azure_world.backend.get_metadata(azure_world.uri())


# ---- Names

ALTERED = {
    "a trailing dot": "weights.",
    "a folder with a trailing dot": "epoch 1./weights",
    "private use": "\ue000",
    "a C1 control character": "\x81",
    "a noncharacter": "\ufffe",
}


@pytest.mark.parametrize("name", ALTERED.values(), ids=ALTERED)
def test_a_name_that_azure_would_alter_is_refused_before_the_first_byte(
    azure_world: AzureWorld, source: Path, name: str
) -> None:
    make(source, {name: b"x"})
    with refused(Reason.UNSUPPORTED_NAME):
        azure_world.upload(source)
    assert azure_world.paths() == []


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("k" * 1024, None),
        ("k" * 1025, "1024 characters"),
        ("🔥" * 512, None),
        ("🔥" * 513, "1024 characters"),
        ("/".join("s" * 254), None),
        ("/".join("s" * 255), "254 segments"),
        ("a./b", "ends with a dot"),
        ("a/b.", "ends with a dot"),
        ("a/.b", None),
        ("a//b", "empty segment"),
        ("a\\b", "backslash"),
        ("a\tb", "U+0009"),
        ("日本語 é + % ?", None),
    ],
)
def test_the_rules_for_names(key: str, problem: str | None) -> None:
    found = blocks.refusal(key)
    assert (problem in found) if problem and found else found is problem


# ---- Sizes and ids


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 8 * MIB + 1, 12_500 * 8 * MIB, 12_500 * 8 * MIB + 1, 5 << 40])
def test_a_file_never_has_more_blocks_than_azure_takes(size: int) -> None:
    part_size = blocks.part_size(size)
    assert part_size >= 8 * MIB
    assert part_size % MIB == 0
    assert -(-size // part_size) <= blocks.MAX_BLOCKS


def test_a_block_id_says_what_it_was_made_from_and_never_changes_its_length() -> None:
    for number in (1, 50_000):
        found = BlockId(blocks.new_upload_id(), number, os.urandom(16))
        assert BlockId.parse(str(found)) == found
        assert len(str(found)) == 51


@pytest.mark.parametrize(
    "text", ["", "block-1", "A" * 51, f"{'A' * 22}.00001.{'A' * 21}B", f"{'A' * 22}.00001.{'A' * 22}\n"]
)
def test_another_tools_block_is_not_taken_for_ours(text: str) -> None:
    assert BlockId.parse(text) is None


def test_a_damaged_body_is_refused_by_the_store(azure_world: AzureWorld) -> None:
    store, key = azure_world.store(), azure_world.prefix + "x"
    for act in (
        lambda: put_object(store, key, b"damaged", store.digest(b"sent"), "uid"),
        lambda: store.put_part(key, store.start_upload(key, "uid"), 1, b"damaged", store.digest(b"sent")),
    ):
        with refused(Reason.INTEGRITY_MISMATCH):
            act()
    assert azure_world.paths() == []
    assert list(store.list_uploads(azure_world.prefix)) == []


# ---- Blocks


def test_a_listing_of_several_pages_is_one_listing(
    azure_world: AzureWorld, tmp_path: Path, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure gives 5,000 blobs to a page; here two. (``make test-scale`` has ten thousand, and so three real pages.)"""
    source = make(tmp_path / "many", {f"{number}.bin": b"x" for number in range(6)})
    azure_world.upload(source)
    monkeypatch.setattr(azure, "PAGE", 2)
    before = sum(between.asked.values())
    listed = [entry.key.removeprefix(azure_world.prefix) for entry in azure_world.store().list(azure_world.prefix)]
    assert listed == azure_world.paths() == [f"run/{name}" for name in (MARKER, *sorted(tree(source)))]
    assert sum(between.asked.values()) - before == 4, "seven blobs, two to a page"
    azure_world.manager().verify(str(azure_world.uri()))
    azure_world.delete()
    assert azure_world.paths() == []


def test_a_half_sent_blob_is_no_object_and_is_found_by_its_upload(azure_world: AzureWorld) -> None:
    store, key = azure_world.store(), azure_world.prefix + "model.bin"
    ours, theirs = store.start_upload(key, "uid"), store.start_upload(key, "uid")
    parts = send(store, key, ours, [b"one", b"two"])
    send(store, key, theirs, [b"three"])
    assert list(store.list(azure_world.prefix)) == []
    assert (store.stat(key), store.read(key)) == (None, None)
    assert {(upload.key, upload.id) for upload in store.list_uploads(azure_world.prefix)} == {(key, ours), (key, theirs)}
    assert store.list_parts(key, ours) == parts
    assert store.is_part(parts[0], b"one", store.digest(b"one"))
    assert not store.is_part(parts[0], b"two", store.digest(b"two"))


def test_what_is_committed_is_read_back_from_its_block_list(azure_world: AzureWorld) -> None:
    store, key, bodies = azure_world.store(), azure_world.prefix + "model.bin", [b"one", b"two"]
    upload = store.start_upload(key, "uid")
    written = store.finish_upload(key, upload, send(store, key, upload, bodies), "uid")
    assert written is not None
    assert written.checksum == store.checksum(pieces_of(store, bodies))
    assert azure_world.get("model.bin") == b"onetwo"
    stat = store.stat(key)
    assert stat is not None
    assert (stat.size, stat.token, stat.checksum, stat.owner) == (6, written.token, written.checksum, "uid")
    assert list(store.list_uploads(azure_world.prefix)) == []


@pytest.mark.parametrize("order", [[1, 0], [0], [0, 1, 1]], ids=["in another order", "cut off", "with one twice"])
def test_a_block_list_that_is_not_ours_has_no_checksum_of_ours(azure_world: AzureWorld, order: list[int]) -> None:
    store, key, bodies = azure_world.store(), azure_world.prefix + "model.bin", [b"one", b"two"]
    upload = store.start_upload(key, "uid")
    parts = send(store, key, upload, bodies)
    azure_world.client.get_blob_client(key).commit_block_list(
        [BlobBlock(parts[number].token) for number in order], metadata={"artifactuid": "uid"}
    )
    stat = store.stat(key)
    assert stat is not None
    assert stat.checksum != store.checksum(pieces_of(store, bodies))


def test_the_md5_that_another_tool_claims_is_not_believed(azure_world: AzureWorld, source: Path) -> None:
    """Of a blob of several blocks Azure keeps whatever Content-MD5 the client says."""
    claimed = bytearray(hashlib.md5(b"weights", usedforsecurity=False).digest())

    def intrude() -> None:
        blob = azure_world.client.get_blob_client(azure_world.prefix + "run/model.safetensors")
        blob.stage_block("theirs", b"rubbish")
        blob.commit_block_list([BlobBlock("theirs")], content_settings=ContentSettings(content_md5=claimed))

    with pytest.raises(StorageError, match="written by somebody else"):
        azure_world.upload(source, cancelled=OnLook(1, intrude), force=True)


def test_an_upload_whose_blocks_somebody_dropped_is_begun_again(azure_world: AzureWorld) -> None:
    store, key = azure_world.store(), azure_world.prefix + "model.bin"
    upload = store.start_upload(key, "uid")
    parts = send(store, key, upload, [b"one", b"two"])
    blob = azure_world.client.get_blob_client(key)
    blob.commit_block_list([])
    blob.delete_blob()
    assert store.list_parts(key, upload) == []
    with pytest.raises(UploadLost):
        store.finish_upload(key, upload, parts, "uid")
    assert azure_world.paths() == []


def test_a_finish_never_overwrites(azure_world: AzureWorld) -> None:
    store, key = azure_world.store(), azure_world.prefix + "model.bin"
    upload = store.start_upload(key, "uid")
    parts = send(store, key, upload, [b"one", b"two"])
    azure_world.put("model.bin", b"another")
    assert store.finish_upload(key, upload, parts, "uid") is None
    assert azure_world.get("model.bin") == b"another"


def test_another_tools_unfinished_blocks_are_named(azure_world: AzureWorld) -> None:
    store, key = azure_world.store(), azure_world.prefix + "model.bin"
    azure_world.client.get_blob_client(key).stage_block("short", b"theirs")
    assert list(store.list_uploads(azure_world.prefix)) == []
    with pytest.raises(StorageError, match="another tool left unfinished blocks"):
        send(store, key, store.start_upload(key, "uid"), [b"one"])


def test_a_large_marker_is_one_request_that_two_writers_cannot_mix(azure_world: AzureWorld) -> None:
    store, key = azure_world.store(), azure_world.prefix + MARKER
    token = store.create(key, b"1" * (70 * MIB // 2))
    assert token is not None
    assert store.swap(key, token, b"2" * (65 * MIB)) is not None
    assert azure_world.client.get_blob_client(key).get_block_list("all") == ([], [])


def test_an_etag_that_no_blob_can_have_matches_none(azure_world: AzureWorld) -> None:
    """It may come from a manifest that somebody edited."""
    store, key = azure_world.store(), azure_world.prefix + "x"
    azure_world.put("x", b"content")
    for token in ("", " x", 'x"\r\nx-ms-meta-a: b', "*"):
        store.remove(key, token)
        with refused(Reason.INTEGRITY_MISMATCH):
            fetched(store, key, token, 0, 7)
    assert azure_world.get("x") == b"content"


def test_no_bytes_of_a_blob_are_fetched_of_exactly_that_version_too(azure_world: AzureWorld) -> None:
    store, key = azure_world.store(), azure_world.prefix + "empty"
    azure_world.put("empty", b"")
    [entry] = store.list(key)
    assert fetched(store, key, entry.token, 0, 0) == b""
    azure_world.put("empty", b"")
    with refused(Reason.INTEGRITY_MISMATCH):
        fetched(store, key, entry.token, 0, 0)


def test_an_answer_that_is_cut_off_each_time_is_no_verdict(azure_world: AzureWorld, between: Proxy) -> None:
    between.plan(Befalls.CUT_ANSWER, "GetObject", times=4)
    azure_world.put("x", b"content")
    with refused(Reason.STORE_UNAVAILABLE):
        azure_world.store().read(azure_world.prefix + "x")


def test_an_endpoint_that_answers_everything_with_a_page_raises_nothing_of_the_sdks(azure_world: AzureWorld) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "14")
            self.end_headers()
            self.wfile.write(b"<p>Welcome</p>")

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        azure_world.options = azure_world.options.replace(endpoint=f"http://127.0.0.1:{server.server_port}/localaccount")
        store = azure_world.store()
        for act in (lambda: store.read("x"), lambda: list(store.list("x")), lambda: fetched(store, "x", '"0x1"', 0, 1)):
            with pytest.raises(StorageError):
                act()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("start", "length"), [(5, 100), (7, 1), (1 << 40, 8)])
def test_a_range_that_the_blob_does_not_have_is_a_mismatch(azure_world: AzureWorld, start: int, length: int) -> None:
    """As of a manifest that claims another size."""
    store, key = azure_world.store(), azure_world.prefix + "x"
    azure_world.put("x", b"content")
    [entry] = store.list(key)
    with refused(Reason.INTEGRITY_MISMATCH):
        fetched(store, key, entry.token, start, length)


# ---- Going on


@pytest.mark.usefixtures("sequential")
def test_what_a_deletion_leaves_of_half_sent_files_is_invisible(azure_world: AzureWorld, big_source: Path) -> None:
    with pytest.raises(Cancelled):
        azure_world.upload(big_source, cancelled=OnLook(4))
    azure_world.delete()
    assert azure_world.paths() == []
    other = make(azure_world.work / "other", {"model.bin": b"another checkpoint"})
    azure_world.upload(other, uid="uid-b")
    assert tree(azure_world.download()) == tree(other)
    assert azure_world.uploads() == []


def test_blocks_that_were_sent_before_a_kill_are_not_sent_again(
    azure_world: AzureWorld, tmp_path: Path, between: Proxy
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "model.bin").open("wb") as model:
        for number in range(16):
            model.write(bytes([number]) * (8 * MIB))
    first = start_mover(azure_world, source)  # type: ignore[arg-type]  # whose world it is, is all the same to it
    between.at_byte(72 * MIB, lambda: first.send_signal(signal.SIGKILL))
    assert outcome(first)[0] == -9
    between.wait_idle()
    assert azure_world.uploads() == ["run/model.bin"]
    arrived = sum(block.size for block in _uncommitted(azure_world, "run/model.bin"))
    assert arrived >= 8 * MIB
    between.sent.clear()
    code, result, log = outcome(start_mover(azure_world, source, earlier_mover_gone=True))  # type: ignore[arg-type]
    assert code == ExitCode.DONE, log
    assert result is not None
    block_list = 16 * 200
    assert between.bytes_of_data <= 16 * 8 * MIB - arrived + block_list
    with (azure_world.download() / "model.bin").open("rb") as restored, (source / "model.bin").open("rb") as original:
        assert hashlib.file_digest(restored, "sha256").digest() == hashlib.file_digest(original, "sha256").digest()


def _uncommitted(world: AzureWorld, path: str) -> list[Any]:
    found: list[Any] = world.client.get_blob_client(world.prefix + path).get_block_list("uncommitted")[1]
    return found


@pytest.mark.parametrize("befalls", [Befalls.LOSE_REPLY, Befalls.CUT, Befalls.SLOW_DOWN], ids=lambda fault: fault.name)
@pytest.mark.parametrize("file", ["model.bin", "small", MARKER])
def test_an_upload_gets_over_what_befalls_one_request(
    azure_world: AzureWorld, big_source: Path, between: Proxy, befalls: Befalls, file: str
) -> None:
    between.plan(befalls, "PutObject", key=file)
    azure_world.upload(big_source)
    assert between.happened[befalls] == 1
    assert tree(azure_world.download()) == tree(big_source)


def test_a_store_that_is_busy_gets_fewer_requests_at_once(azure_world: AzureWorld, big_source: Path, between: Proxy) -> None:
    between.plan(Befalls.SLOW_DOWN, "PutObject", times=2, key="model.bin")
    azure_world.upload(big_source)
    assert between.happened[Befalls.SLOW_DOWN] == 2
    assert azure_world.open(azure_world.uri()).gate.limit < STREAMS  # type: ignore[attr-defined]
    assert tree(azure_world.download()) == tree(big_source)


# ---- An endpoint that is not Azure's own


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions are lost on the way, as at a gateway that has never heard of them: taken out before the signature."""

    def drop(_: StorageRequestHook, request: Any) -> None:
        for name in ("If-None-Match", "If-Match"):
            request.http_request.headers.pop(name, None)

    monkeypatch.setattr(StorageRequestHook, "on_request", drop)


@pytest.mark.usefixtures("forgetful")
def test_an_endpoint_that_ignores_conditions_is_refused_before_the_first_byte(azure_world: AzureWorld, source: Path) -> None:
    with refused(Reason.CONDITIONAL_WRITES_UNSUPPORTED):
        azure_world.upload(source)
    assert azure_world.paths() == []


@pytest.mark.usefixtures("forgetful")
def test_layout_unique_needs_no_conditions(azure_world: AzureWorld, big_source: Path) -> None:
    stored = azure_world.upload(big_source, layout=Layout.UNIQUE)
    assert tree(azure_world.download(stored.storage_uri.removeprefix(f"{azure_world.base}/"))) == tree(big_source)
    azure_world.delete(layout=Layout.UNIQUE)
    assert azure_world.paths() == []


@pytest.mark.usefixtures("forgetful")
def test_without_conditions_each_write_looks_first(azure_world: AzureWorld) -> None:
    store, key = azure_world.store().without_conditions(), azure_world.prefix + "x"
    token = store.create(key, b"first")
    assert token is not None
    assert store.create(key, b"second") is None
    assert store.swap(key, '"0x1"', b"second") is None
    assert put_object(store, key, b"second", store.digest(b"second"), "uid") is None
    upload = store.start_upload(key, "uid")
    assert store.finish_upload(key, upload, send(store, key, upload, [b"second"]), "uid") is None
    store.remove(key, '"0x1"')
    assert azure_world.get("x") == b"first"
    token = store.swap(key, token, b"third")
    assert token is not None
    assert azure_world.get("x") == b"third"
    store.remove(key, token)
    assert azure_world.paths() == []


# ---- Several writers


def test_of_two_uploads_at_once_exactly_one_is_committed_and_it_is_right(azure_world: AzureWorld, tmp_path: Path) -> None:
    sources = [
        make(tmp_path / name, {"model.bin": name.encode() * (3 * MIB), "x": name.encode()}) for name in ("ours", "them")
    ]
    for round_ in range(6):
        place = f"run-{round_}"
        winner, loser = race(azure_world, sources, place)
        assert loser in (Reason.TARGET_BUSY, Reason.TARGET_EXISTS, Reason.TARGET_NOT_EMPTY)
        assert azure_world.backend.get_manifest(azure_world.uri(place)).artifact_uid == f"uid-{winner}"
        assert tree(azure_world.download(place)) == tree(sources[winner])


def test_of_many_finishes_at_once_one_makes_the_object(azure_world: AzureWorld) -> None:
    store, key, bodies = azure_world.store(), azure_world.prefix + "model.bin", [b"one", b"two"]
    upload = store.start_upload(key, "uid")
    parts = send(store, key, upload, bodies)
    barrier, made = threading.Barrier(6), list[object]()

    def finish() -> None:
        barrier.wait()
        made.append(store.finish_upload(key, upload, parts, "uid"))

    threads = [threading.Thread(target=finish) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([written for written in made if written is not None]) == 1
    assert made.count(None) == 5
    assert azure_world.get("model.bin") == b"onetwo"


def test_connections_are_kept_and_not_thrown_away(
    azure_world: AzureWorld, big_source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(big_source, {f"{number}.bin": b"x" for number in range(40)})
    with caplog.at_level(logging.WARNING):
        azure_world.upload(big_source)
        azure_world.download()
    assert caplog.text == ""


# ---- Options


def test_the_tier_is_for_the_data_alone(azure_world: AzureWorld, big_source: Path) -> None:
    azure_world.options = azure_world.options.replace(storage_class="cool")
    azure_world.upload(big_source)

    def tier(path: str) -> str:
        return str(azure_world.client.get_blob_client(azure_world.prefix + path).get_blob_properties().blob_tier)

    assert (tier("run/model.bin"), tier("run/small"), tier(f"run/{MARKER}")) == ("Cool", "Cool", "Hot")


@pytest.mark.parametrize("options", [{"storage_class": "Archive"}, {"sse_kms_key_id": "key"}], ids=["Archive", "KMS key"])
def test_options_that_azure_cannot_keep_are_refused_before_the_first_byte(
    azure_world: AzureWorld, source: Path, options: dict[str, str]
) -> None:
    azure_world.options = azure_world.options.replace(**options)
    with refused(Reason.INVALID_SPEC):
        azure_world.upload(source)
    assert azure_world.paths() == []


def test_an_error_of_the_raw_client_is_what_the_sdk_really_raises(azure_world: AzureWorld) -> None:
    """The worlds of these tests answer as the SDK expects it: codes, not texts."""
    with pytest.raises(HttpResponseError) as caught:
        azure_world.client.get_blob_client("missing").download_blob()
    assert caught.value.error_code == "BlobNotFound"
