"""Signs requests to S3: botocore's signature, without what it does beside for requests of every kind.

The original takes most of a millisecond for a request, most of it to build objects that are looked at once; with thousands
of small files that is what an upload waits for. What is signed, and how, is botocore's own code.
"""

import hashlib
import hmac
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from botocore.auth import SIGNED_HEADERS_BLACKLIST, S3SigV4Auth

if TYPE_CHECKING:
    from botocore.credentials import Credentials


def sign(
    credentials: "Credentials", region: str, method: str, url: str, headers: Mapping[str, str], payload: str
) -> dict[str, str]:
    """The headers of a request with its signature among them. ``payload`` is the body's SHA-256 in hex, or what stands for
    it. ``credentials`` are botocore's, which renew themselves where their source can."""
    request = _Request(method, url, dict(headers), {"payload": payload})
    signer = _Signer(credentials.get_frozen_credentials(), "s3", region)
    signer.add_auth(request)  # type: ignore[arg-type]  # as much of one as it looks at
    return request.headers


@dataclass
class _Request:
    """As much of botocore's AWSRequest as its signer looks at; the original takes longer to make than to sign."""

    method: str
    url: str
    headers: dict[str, str]
    context: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    data: bytes = b""


class _NotInDetail(logging.Filter):
    """botocore logs canonical requests and headers at DEBUG, with the session token in clear."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.DEBUG


for _name in ("botocore.auth", "botocore.endpoint"):
    logging.getLogger(_name).addFilter(_NotInDetail())


class _Signer(S3SigV4Auth):
    """botocore's signature, over a payload hash that the caller has decided on."""

    def payload(self, request: _Request) -> str:  # type: ignore[override]
        return request.context["payload"]

    # The original builds a mail's header, and searches it as one; half of the time that a signature takes.
    def headers_to_sign(self, request: _Request) -> "_ToSign":  # type: ignore[override]
        lower = ((name.lower(), value) for name, value in request.headers.items())
        return _ToSign((name, value) for name, value in lower if name not in SIGNED_HEADERS_BLACKLIST)

    def _sign(self, key: bytes, msg: str, hex: bool = False) -> str | bytes:
        # The keys of a day, a region and a service are the same for each request of it.
        return hmac.new(key, msg.encode(), hashlib.sha256).hexdigest() if hex else _derived_key(key, msg)


class _ToSign(dict[str, str]):
    """As much of a mail's header as botocore's signer looks at."""

    def get_all(self, name: str) -> list[str]:
        return [self[name]]


@lru_cache(maxsize=16)
def _derived_key(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
