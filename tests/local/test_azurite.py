"""Azurite: installed from a lock file that names no registry, up with a key of its own, and gone without a trace."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from local_helpers import all_gone, identities

from local_cluster import LocalClusterError, azurite, start_azurite
from local_cluster.nodejs import find_node, node_major

pytest.importorskip("azure.storage.blob")
pytestmark = pytest.mark.timeout(300)


def test_it_answers_to_its_own_key_alone_sends_nothing_home_and_leaves_nothing() -> None:
    from azure.core.exceptions import ClientAuthenticationError, HttpResponseError
    from azure.storage.blob import BlobServiceClient

    with start_azurite() as server:
        with server.client() as client:
            client.create_container("container").upload_blob("name", b"x")
            assert client.get_blob_client("container", "name").download_blob().readall() == b"x"
        # The key that every Azurite has by default, and that its documentation prints.
        wrong = {"account_name": server.account, "account_key": "RWJ5OHZkTTAyeE5PY3FGbHFVd0pQTGxtRXRsQ0RYSjE="}
        with pytest.raises((ClientAuthenticationError, HttpResponseError)) as caught:
            list(BlobServiceClient(server.endpoint, credential=wrong, retry_total=0).list_containers())
        assert caught.value.status_code == 403
        watched = identities(server.state_dir)
        command = Path(f"/proc/{watched[1].pid}/cmdline").read_text()
        assert "--disableTelemetry" in command
        assert "127.0.0.1" in command
        assert server.key not in command + repr(server)
    assert all_gone(watched)
    assert not server.state_dir.exists()


def test_the_lock_file_names_no_registry_and_a_hash_for_every_package() -> None:
    lock = json.loads((azurite.SOURCE / "package-lock.json").read_text())
    packages = {name: found for name, found in lock["packages"].items() if name}
    assert len(packages) > 100
    assert not [name for name, found in packages.items() if "resolved" in found]
    assert not [name for name, found in packages.items() if not found["integrity"].startswith("sha512-")]
    assert lock["packages"][""]["dependencies"] == {"azurite": packages["node_modules/azurite"]["version"]}


def test_a_node_on_path_that_is_too_old_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("node", "npm"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho v18.20.1\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert node_major(tmp_path / "node") == 18
    assert find_node(18, print).node == tmp_path / "node"
    assert find_node(22, print).node != tmp_path / "node"


def test_an_installation_that_fails_says_what_npm_said_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    real = json.loads((azurite.SOURCE / "package-lock.json").read_text())
    engines = real["packages"]["node_modules/azurite"]["engines"]
    entry = {"version": "3.37.0", "engines": engines}
    (source / "package.json").write_text('{"dependencies": {"azurite": "3.36.0"}}')
    (source / "package-lock.json").write_text(
        json.dumps({"lockfileVersion": 3, "packages": {"": {"dependencies": {}}, "node_modules/azurite": entry}})
    )
    node = find_node(22, print)
    monkeypatch.setattr(azurite, "SOURCE", source)
    monkeypatch.setattr(azurite, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(azurite, "find_node", lambda *_: node)
    with pytest.raises(LocalClusterError, match="npm"):
        azurite.ensure_azurite(print)
    assert [path.name for path in (tmp_path / "cache" / "azurite").iterdir() if not path.name.endswith(".lock")] == []
