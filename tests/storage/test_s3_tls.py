"""TLS with an authority that the system does not know: refused as it comes, good once somebody names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import make_certificates
from proxy import Fault, proxy
from s3_world import BUCKET, S3World, world_on
from storage_world import MIB, make, tree

import local_cluster as lc
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage import StorageError, connector

# A certificate may be renewed on the other side without anybody doing something here, so that both are honest.
NOT_TRUSTED = (Reason.STORE_UNAVAILABLE, Reason.REQUEST_REJECTED)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lc.VersityGW]:
    with lc.start_versitygw("tls", tls=make_certificates(tmp_path_factory.mktemp("tls"))) as found:
        client = found.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield found


@pytest.fixture
def tls_world(gateway: lc.VersityGW, tmp_path: Path) -> Iterator[S3World]:
    with world_on("tls", gateway, tmp_path) as world:
        yield world


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file in several parts beside a small one: both go another way than the marker."""
    return make(tmp_path / "source", {"model.bin": os.urandom(MIB) * 17, "config.json": b"{}"})


def test_an_unknown_authority_is_refused_and_named_as_what_is_wrong(tls_world: S3World, source: Path) -> None:
    assert tls_world.options.endpoint is not None
    assert tls_world.options.endpoint.startswith("https://")
    with pytest.raises(StorageError) as caught:
        tls_world.upload(source)
    assert caught.value.reason in NOT_TRUSTED
    assert "certificate" in caught.value.message.lower()
    assert tls_world.paths() == []


def test_the_option_names_the_authority_for_markers_and_bodies_alike(
    tls_world: S3World, gateway: lc.VersityGW, source: Path
) -> None:
    tls_world.options = tls_world.options.replace(ca_bundle=str(gateway.ca))
    tls_world.upload(source)
    assert tree(tls_world.download()) == tree(source)


def test_the_sdks_own_variable_names_it_as_well(
    tls_world: S3World, gateway: lc.VersityGW, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(gateway.ca))
    tls_world.upload(source)
    assert tree(tls_world.download()) == tree(source)


@pytest.mark.parametrize("fault", [Fault.STALL, Fault.CUT, Fault.SLOW_DOWN, Fault.LOSE_REPLY], ids=lambda fault: fault.name)
def test_an_upload_over_tls_gets_over_what_befalls_a_request(
    s3_world: S3World, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Fault
) -> None:
    monkeypatch.setattr(connector, "STALL_SECONDS", 1.0)
    files, server = make_certificates(tmp_path / "tls"), s3_world.server
    with proxy(server.endpoint, server.access_key, server.secret_key, tls=files) as between:
        s3_world.options = s3_world.options.replace(endpoint=between.endpoint, ca_bundle=str(files.ca))
        between.plan(fault, "UploadPart", key="model.bin")
        between.plan(fault, "PutObject", key="config.json")
        s3_world.upload(source)
        assert between.happened[fault] == 2
        assert tree(s3_world.download()) == tree(source)
        assert s3_world.uploads() == []


@pytest.mark.parametrize("fault", [Fault.STALL, Fault.CUT_ANSWER], ids=lambda fault: fault.name)
def test_a_download_over_tls_gets_over_what_befalls_a_request(
    s3_world: S3World, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Fault
) -> None:
    monkeypatch.setattr(connector, "STALL_SECONDS", 1.0)
    files, server = make_certificates(tmp_path / "tls"), s3_world.server
    s3_world.upload(source)
    with proxy(server.endpoint, server.access_key, server.secret_key, tls=files) as between:
        s3_world.options = s3_world.options.replace(endpoint=between.endpoint, ca_bundle=str(files.ca))
        between.plan(fault, "GetObject", key="model.bin")
        assert tree(s3_world.download()) == tree(source)
        assert between.happened[fault] == 1


def test_another_authority_does_not_help(tls_world: S3World, source: Path, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "other")
    tls_world.options = tls_world.options.replace(ca_bundle=str(other.ca))
    with pytest.raises(StorageError) as caught:
        tls_world.upload(source)
    assert caught.value.reason in NOT_TRUSTED
    assert tls_world.paths() == []


def test_a_bundle_that_is_not_there_is_named(tls_world: S3World, source: Path) -> None:
    tls_world.options = tls_world.options.replace(ca_bundle="/nowhere/ca.pem")
    with pytest.raises(StorageError, match=r"/nowhere/ca\.pem") as caught:
        tls_world.upload(source)
    assert caught.value.reason is Reason.REQUEST_REJECTED
