"""The secrets of one throw-away cluster, made without openssl and without a dependency."""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .paths import private_file

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_P256_OID = bytes.fromhex("06082a8648ce3d030107")


def new_token() -> str:
    return secrets.token_hex(24)


def write_signing_key(path: Path) -> Path:
    """A P-256 key in SEC 1 form (RFC 5915), for ES256. The public point is optional there and Go computes it:
    that is why no elliptic curve arithmetic is needed, and why this is not RSA."""
    scalar = (secrets.randbelow(_P256_ORDER - 1) + 1).to_bytes(32, "big")
    body = _der(0x02, b"\x01") + _der(0x04, scalar) + _der(0xA0, _P256_OID)
    text = base64.encodebytes(_der(0x30, body)).decode()
    return private_file(path, f"-----BEGIN EC PRIVATE KEY-----\n{text}-----END EC PRIVATE KEY-----\n")


@dataclass(frozen=True)
class Account:
    """Somebody whom the API server knows by a token."""

    user: str
    group: str = ""
    token: str = field(default_factory=new_token, repr=False)


def write_token_file(path: Path, accounts: Iterable[Account]) -> Path:
    lines = [f"{item.token},{item.user},{item.user}" + (f',"{item.group}"' if item.group else "") for item in accounts]
    return private_file(path, "\n".join(lines) + "\n")


def write_kubeconfig(path: Path, *, name: str, server: str, ca: Path, account: Account) -> Path:
    """JSON is YAML, and needs no YAML library."""
    cluster = {"server": server, "certificate-authority-data": base64.b64encode(ca.read_bytes()).decode()}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": account.user, "user": {"token": account.token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": account.user, "namespace": "default"}}],
        "current-context": name,
    }
    return private_file(path, json.dumps(config, indent=1) + "\n")


def extract_ca(served: Path, ca: Path) -> bool:
    """kube-apiserver writes its own certificate and, after it, that of the authority it made up to sign it.
    Only the authority belongs into a kubeconfig and a root CA file. False while the file is not there."""
    if ca.exists():
        return True
    try:
        blocks = _CERTIFICATE.findall(served.read_text(encoding="ascii"))
    except OSError:
        return False
    if len(blocks) < 2:
        return False  # Still being written.
    ca.write_text(blocks[-1] + "\n", encoding="ascii")
    return True


def _der(tag: int, body: bytes) -> bytes:
    assert len(body) < 128, "long-form DER lengths are not needed here"
    return bytes([tag, len(body)]) + body
