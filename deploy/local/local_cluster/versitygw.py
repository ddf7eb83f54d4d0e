"""A second real S3 server for tests, stricter than SeaweedFS and with AWS's own IAM: versitygw on loopback.

Its users get IAM policies by AWS's own calls, and each S3 permission is asked for by its own name: that is what tells
whether a policy on a page of the docs is enough, and whether each line of it is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import build_versitygw
from .paths import new_run_dir
from .processes import free_ports, http_get
from .providers import Say, silent
from .seaweedfs import REGION, Identity, ObjectStore, new_secret
from .session import Session, start_on_free_ports, sweep

_HEALTH = "/healthz"


@dataclass(frozen=True)
class TLSFiles:
    """PEM files: the server's certificate (for 127.0.0.1), its key, and the authority that signed it."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class VersityGW(ObjectStore):
    """As :class:`ObjectStore`; `admin` is the root user, whom no policy limits."""

    iam_endpoint: str = ""

    def add_user(self, name: str, policy: Mapping[str, Any]) -> Identity:
        """A user who may do what one IAM policy document says, and nothing else."""
        iam = self.iam_client()
        iam.create_user(UserName=name)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        iam.put_user_policy(UserName=name, PolicyName="only", PolicyDocument=json.dumps(policy))
        iam.close()
        self.identities[name] = Identity(name, (), key["AccessKeyId"], key["SecretAccessKey"])
        return self.identities[name]

    def set_policy(self, user: Identity, policy: Mapping[str, Any]) -> None:
        """Give a user of :meth:`add_user` another policy; the next request is judged by it."""
        iam = self.iam_client()
        iam.put_user_policy(UserName=user.name, PolicyName="only", PolicyDocument=json.dumps(policy))
        iam.close()

    def iam_client(self) -> Any:
        """A boto3 IAM client of the root user."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "iam",
            endpoint_url=self.iam_endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(proxies={}, retries={"max_attempts": 1, "mode": "standard"}),
        )


def start_versitygw(name: str = "s3", *, tls: TLSFiles | None = None, say: Say = silent) -> VersityGW:
    """Up in a second, once it is built. With `tls` the S3 endpoint is an https one."""
    program = build_versitygw(say)
    sweep()
    return start_on_free_ports(lambda: new_run_dir(name), lambda session: _start(session, program, tls))


def _start(session: Session, program: Path, tls: TLSFiles | None) -> VersityGW:
    state = session.state_dir
    data, users, sidecar = state / "data", state / "users", state / "sidecar"
    for folder in (data, users, sidecar):
        folder.mkdir()
    s3_port, iam_port = free_ports(2)
    root = Identity("admin", (), new_secret(), new_secret())
    # By the environment: the arguments of a process can be read by everybody.
    environment = {"ROOT_ACCESS_KEY": root.access_key, "ROOT_SECRET_KEY": root.secret_key}
    common: list[str | Path] = [program, "--quiet", "--health", _HEALTH, "--region", REGION]
    socket = state / "iam.sock"

    iam = [*common, "--port", f"127.0.0.1:{iam_port}", "iam", "--dir", users, "--private-ports", socket]
    session.start("iam", iam, env=environment)
    session.wait_until(
        lambda: http_get(iam_port, _HEALTH)[0] == 200 and socket.exists(),
        what="the IAM service to be healthy",
        seconds=60,
        program="iam",
    )

    gateway = [*common, "--port", f"127.0.0.1:{s3_port}", "--iam-standalone-endpoint", socket, "--iam-cache-disable"]
    if tls:
        gateway += ["--cert", tls.certificate, "--key", tls.key]
    gateway.append("posix")
    if not _has_attributes(data):
        gateway += ["--sidecar", sidecar]
    session.start("versitygw", [*gateway, data], env=environment)
    session.wait_until(
        lambda: http_get(s3_port, _HEALTH, ca=tls.ca if tls else None)[0] == 200,
        what="the S3 API to be healthy",
        seconds=60,
        program="versitygw",
    )
    return VersityGW(
        endpoint=f"{'https' if tls else 'http'}://127.0.0.1:{s3_port}",
        access_key=root.access_key,
        secret_key=root.secret_key,
        identities={"admin": root},
        state_dir=state,
        ca=tls.ca if tls else None,
        iam_endpoint=f"http://127.0.0.1:{iam_port}",
        _stop=session.stop,
        _detach=session.detach,
    )


def _has_attributes(folder: Path) -> bool:
    """Whether extended attributes work there; where they do not, the metadata of objects lies in a folder beside them."""
    if not hasattr(os, "setxattr"):
        return False
    try:
        os.setxattr(folder, "user.probe", b"1")
        os.removexattr(folder, "user.probe")
    except OSError:
        return False
    return True
