"""The bodies of data objects on their way to and from S3: what the product is for, so the one place with own wire code.

Everything else that is said to S3 goes through botocore's client. A part through that client costs a copy of the body and a
millisecond of Python; here it is one ``send`` loop over a buffer that nobody copies. Signing is botocore's, HTTP is the
standard library's, the policy of retries is urllib3's.

Each request has a deadline without progress (:data:`STALL_SECONDS`): a connection on which nothing moves for so long is
dropped and the request made again on another. 503 SlowDown halves how many requests are under way at once.
"""

import hashlib
import hmac
import http.client
import logging
import socket
import ssl
import time
import weakref
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from botocore.auth import EMPTY_SHA256_HASH, SIGNED_HEADERS_BLACKLIST, UNSIGNED_PAYLOAD, S3SigV4Auth
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry, make_headers
from urllib3.util.wait import wait_for_read

from checkpoint_operator.storage.gate import SLOW_DOWN, Gate
from checkpoint_operator.storage.store import PIECE, Arrived, Body, Buffer, slices_of
from checkpoint_operator.storage.tls import TLSStream
from checkpoint_operator.storage.turn import SMALL, TURN

if TYPE_CHECKING:
    from botocore.credentials import Credentials

CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0
ATTEMPTS = 6
_SLICE = 1 << 20
"""Bytes that are given to the socket at once: a timeout counts for one of them, not for the whole body."""
_FRESH_SECONDS = 1.0
"""A connection that was used so lately is not looked at before it is used again; if it died after all, there is a retry."""
_LONGEST_ERROR = 64 << 10
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})

_Read = Callable[[http.client.HTTPResponse], Buffer]
_Idle = tuple[float, http.client.HTTPConnection]
"""(when it was put back, the connection)"""


class WireError(Exception):
    """No answer after all attempts; the message says what happened to the last one."""


class TooLarge(WireError):
    """The body has more bytes (``size``) than the caller takes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"an answer of {size} bytes")
        self.size = size


@dataclass(frozen=True)
class Answer:
    """A response whose body was read: ``body`` is the bytes of a range, or the XML of an error."""

    status: int
    headers: Mapping[str, str]
    body: Buffer


class Wire:
    """Signed PUTs and ranged GETs below one bucket's URL; from as many threads as the gate lets through.

    ``base_url`` is the bucket's URL as botocore makes it (path or virtual style). ``credentials`` are botocore's, which
    renew themselves where their source can. ``tls`` verifies; it is None for plain HTTP.
    """

    def __init__(
        self, base_url: str, credentials: "Credentials", region: str, tls: ssl.SSLContext | None, *, limit: int
    ) -> None:
        self._base = base_url.rstrip("/")
        url = urlsplit(self._base)
        if (url.scheme == "https") != (tls is not None):
            raise ValueError(f"TLS goes with https, not with {url.scheme}")
        self._connect = _Connector(url.scheme, url.hostname or "", url.port, tls)
        self._credentials, self._region = credentials, region
        self._has_tls = tls is not None
        self._idle: deque[_Idle] = deque()
        self.gate = Gate(limit)
        # As urllib3's pools do: whoever lets go of the wire need not close it.
        weakref.finalize(self, _close_all, self._idle)

    def put(self, key: str, query: str, headers: Mapping[str, str], body: Body) -> Answer:
        """PUT one body. Raises :class:`WireError`."""
        # On TLS the body is protected twice already, by the connection and by its checksum; so botocore has it as well.
        payload = UNSIGNED_PAYLOAD if self._has_tls else _sha256(body)
        headers = {**headers, "Content-Length": str(len(body))}
        return self._request("PUT", key, query, headers, payload, body, len(body), lambda answer: _read(answer, _SLICE))

    def get(self, key: str, headers: Mapping[str, str], length: int) -> Answer:
        """GET at most ``length`` bytes of an object. Raises :class:`WireError`, :class:`TooLarge` where there are more."""
        return self._request(
            "GET", key, "", headers, EMPTY_SHA256_HASH, b"", length, lambda answer: _read(answer, max(length, _SLICE))
        )

    def get_into(self, key: str, headers: Mapping[str, str], into: memoryview, arrived: Arrived) -> Answer:
        """GET exactly as many bytes as a buffer has: then the answer's body is that buffer, else it is the store's words.

        ``arrived`` hears of each piece, see there. Raises :class:`WireError`, and what ``arrived`` raises.
        """

        def read(response: http.client.HTTPResponse) -> Buffer:
            if response.status not in (200, 206) or response.length != len(into):
                return _read(response, max(len(into), _SLICE))
            done = 0
            while done < len(into):
                count = response.readinto(into[done : done + PIECE])
                if not count:
                    raise http.client.IncompleteRead(b"", len(into) - done)
                with TURN.let_go():
                    arrived(done, done + count)
                done += count
            response.close()
            return into

        return self._request("GET", key, "", headers, EMPTY_SHA256_HASH, b"", len(into), read)

    def _request(
        self,
        method: str,
        key: str,
        query: str,
        headers: Mapping[str, str],
        payload: str,
        body: Body,
        size: int,
        read: "_Read",
    ) -> Answer:
        """``size``: bytes of the body, whichever way it goes."""
        url = f"{self._base}/{quote(key, safe='/-_.~')}{query}"
        retry: Retry | None = None
        while True:
            answer, failed = None, Exception()
            try:
                with self.gate.passed():
                    answer = self._once(_Request(method, url, dict(headers), {"payload": payload}), body, size, read)
            except (OSError, http.client.HTTPException) as error:
                failed = error
                _close_all(self._idle)  # whatever happened to this connection may have happened to all of them
            if answer is not None:
                if not _may_pass(answer):
                    self.gate.went_well()
                    return answer
                if answer.status in SLOW_DOWN:
                    self.gate.slow_down()
            try:
                retry = (retry or Retry(ATTEMPTS - 1, backoff_factor=0.25, backoff_jitter=0.5, backoff_max=20)).increment(
                    method, url, error=failed
                )
            except MaxRetryError:
                if answer is not None:
                    return answer  # the store's own words say more than we could
                raise WireError(f"{type(failed).__name__}: {failed}, {ATTEMPTS} times") from failed
            time.sleep(retry.get_backoff_time())

    def _once(self, request: "_Request", body: Body, size: int, read: "_Read") -> Answer:
        signer = _Signer(self._credentials.get_frozen_credentials(), "s3", self._region)
        connection = self._take()
        # Nobody waits in a turn: a small body on TLS goes into memory, and to the socket when its answer is read, for which
        # the stream lets go. A plain socket does not.
        with TURN.taken() if self._has_tls and size < SMALL else nullcontext():
            try:
                request.headers["host"] = self._connect.host
                signer.add_auth(request)  # type: ignore[arg-type]  # as much of one as it looks at
                response = self._send(connection, request, body)
            except BaseException:
                connection.close()
                raise
            try:
                response.begin()
                content = read(response)
            except BaseException:
                response.close()
                connection.close()
                raise
            if response.will_close:
                connection.close()
            else:
                self._idle.append((time.monotonic(), connection))
            return Answer(response.status, cast(Mapping[str, str], response.headers), content)

    def _take(self) -> http.client.HTTPConnection:
        """A connection; not one that the other side has closed, or on which it has said what nobody asked for."""
        while True:
            try:
                since, connection = self._idle.pop()
            except IndexError:
                return self._connect.open()
            if time.monotonic() - since < _FRESH_SECONDS or not wait_for_read(connection.sock, timeout=0):
                return connection
            connection.close()

    def _send(self, connection: http.client.HTTPConnection, request: "_Request", body: Body) -> http.client.HTTPResponse:
        lines = [f"{request.method} {self._connect.target(request.url)} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in {**request.headers, **self._connect.headers}.items()]
        head = "\r\n".join(lines)
        if not head.replace("\r\n", "").isprintable() or head.count("\n") != len(lines) - 1:
            raise WireError("a header has a control character in it")
        sock = connection.sock
        try:
            sock.sendall(head.encode("latin-1", "strict") + b"\r\n\r\n")
            for one in slices_of(body):
                view = memoryview(one)
                # Bite by bite: the timeout of a plain socket's sendall is for all that it is given, however fast it goes.
                for start in range(0, len(view), _SLICE):
                    sock.sendall(view[start : start + _SLICE])
        except (BrokenPipeError, ConnectionResetError):
            # A store that refuses early closes while we still send; what it said is in the socket's buffer.
            if not body:
                raise
        return http.client.HTTPResponse(sock, method=request.method)


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


class _Connector:
    """Opens connections to one host, through the proxy of the environment where there is one."""

    def __init__(self, scheme: str, host: str, port: int | None, tls: ssl.SSLContext | None) -> None:
        usual = 443 if scheme == "https" else 80
        self._host, self._port, self._tls = host, port or usual, tls
        self.host = f"[{host}]" if ":" in host else host
        if self._port != usual:
            self.host += f":{self._port}"
        proxy = None if proxy_bypass(host) else getproxies().get(scheme)
        self._proxy = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
        if self._proxy and self._proxy.scheme != "http":
            raise WireError(f"a proxy is spoken to in http://, not in {self._proxy.scheme}://")
        self._proxy_headers: dict[str, str] = {}
        if self._proxy and self._proxy.username:
            self._proxy_headers = make_headers(
                proxy_basic_auth=f"{unquote(self._proxy.username)}:{unquote(self._proxy.password or '')}"
            )

    @property
    def headers(self) -> dict[str, str]:
        """What the proxy is told with each request; through a tunnel only the tunnel itself is asked for."""
        return {} if self._tls else self._proxy_headers

    def target(self, url: str) -> str:
        """What stands in the request line."""
        if self._proxy and not self._tls:
            return url
        return "/" + url.split("/", 3)[3]

    def open(self) -> http.client.HTTPConnection:
        at = (self._proxy.hostname or "", self._proxy.port or 80) if self._proxy else (self._host, self._port)
        connection = _TLSConnection(*at, self._tls, self._host) if self._tls else http.client.HTTPConnection(*at)
        connection.timeout = CONNECT_SECONDS
        if self._proxy and self._tls:
            connection.set_tunnel(self._host, self._port, self._proxy_headers)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        if not self._tls:
            connection.sock.settimeout(STALL_SECONDS)
        return connection


class _TLSConnection(http.client.HTTPConnection):
    default_port = http.client.HTTPS_PORT

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, name: str) -> None:
        super().__init__(host, port)
        self._tls, self._name = tls, name

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(STALL_SECONDS)
        self.sock = cast(socket.socket, TLSStream(self.sock, self._tls, self._name))


def _close_all(idle: deque[_Idle]) -> None:
    while idle:
        idle.pop()[1].close()


def _sha256(body: Body) -> str:
    found = hashlib.sha256()
    for one in slices_of(body):
        found.update(one)
    return found.hexdigest()


def _read(response: http.client.HTTPResponse, most: int) -> Buffer:
    """The whole body; the other side decides neither how much memory we take, nor that a part of it is enough."""
    announced = response.length
    if announced is None and not response.chunked:
        raise http.client.HTTPException("an answer that does not say how long it is")
    if announced is not None and announced > most:
        raise TooLarge(announced)
    body = response.read(most if announced is None else announced)
    if announced is not None and len(body) != announced:
        raise http.client.IncompleteRead(b"", announced - len(body))
    if response.read(1):
        raise TooLarge(most + 1)
    response.close()
    return body


def said(answer: Answer) -> dict[str, str]:
    """The elements of an error document; nothing where the body is none."""
    if answer.status < 300 or len(answer.body) > _LONGEST_ERROR:
        return {}
    try:
        document = ET.fromstring(bytes(answer.body))  # noqa: S314 - expat neither fetches nor expands without end
    except (ET.ParseError, ValueError, LookupError):  # an encoding that it does not know
        return {}
    return {element.tag.rpartition("}")[2]: element.text or "" for element in document}


def _may_pass(answer: Answer) -> bool:
    # AWS's word for a body that stalled on its way.
    return answer.status in _AGAIN or (answer.status == 400 and said(answer).get("Code") == "RequestTimeout")
