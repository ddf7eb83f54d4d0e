"""The object store: answers for real, tells identities apart, and leaves neither process nor file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from local_helpers import all_gone, identities

from local_cluster import Identity, LocalClusterError, start_object_store

botocore_exceptions = pytest.importorskip("botocore.exceptions")
pytestmark = pytest.mark.timeout(120)


def refusal(call: object, **arguments: object) -> str:
    with pytest.raises(botocore_exceptions.ClientError) as caught:
        call(**arguments)  # type: ignore[operator]
    return str(caught.value.response["Error"]["Code"])


def test_identities_are_told_apart_and_stop_leaves_nothing() -> None:
    tenant, reader = Identity.for_bucket("tenant", "tenant-a"), Identity.read_only("reader")
    stranger = Identity("stranger", ())
    forged = Identity("forged", (), access_key=tenant.access_key)
    with start_object_store(identities=[tenant, reader]) as store:
        admin = store.client()
        for bucket in ("tenant-a", "tenant-b", "tenant-c", "tenant-d"):
            admin.create_bucket(Bucket=bucket)
            admin.put_object(Bucket=bucket, Key="k", Body=b"x")
        store.client(tenant).put_object(Bucket="tenant-a", Key="own", Body=b"x")
        assert refusal(store.client(tenant).put_object, Bucket="tenant-b", Key="k", Body=b"y") == "AccessDenied"
        assert store.client(reader).get_object(Bucket="tenant-a", Key="own")["Body"].read() == b"x"
        assert refusal(store.client(reader).put_object, Bucket="tenant-a", Key="k", Body=b"y") == "AccessDenied"
        assert refusal(store.client(stranger).list_buckets) == "InvalidAccessKeyId"
        assert refusal(store.client(forged).list_buckets) == "SignatureDoesNotMatch"
        assert refusal(admin.put_object, Bucket="absent", Key="k", Body=b"x") == "NoSuchBucket"
        assert refusal(admin.put_object, Bucket="tenant-a", Key="k", Body=b"x", IfNoneMatch="*") == "PreconditionFailed"

        assert stat.S_IMODE((store.state_dir / "identities.json").stat().st_mode) == 0o600
        watched = identities(store.state_dir)
        command = Path(f"/proc/{watched[1].pid}/cmdline").read_text()
        assert store.secret_key not in command
        assert "-master.telemetry=false" in command
        assert store.secret_key not in repr(store)
        ports = [part.rpartition("=")[2] for part in command.split("\0") if ".port.grpc=" in part]
        sockets = [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]
        assert len(sockets) == 4
    assert all_gone(watched)
    assert not store.state_dir.exists()
    assert not any(path.exists() for path in sockets)
    store.stop()  # Once more does nothing.


def test_two_identities_of_one_name_are_refused() -> None:
    with pytest.raises(LocalClusterError, match="two identities are named 'admin'"):
        start_object_store(identities=[Identity.read_only("admin")])
