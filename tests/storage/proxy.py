"""Between a client and a real S3 server: counts, stalls, cuts, refuses, and makes a better server look like a worse one.

A request is forwarded as it came, `Host` included, so that its signature stays good. Where headers are taken out of it
(:attr:`Proxy.strips`, :attr:`Proxy.forgets`), the proxy signs it anew with the keys of the test, as they would have been
sent without them.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

import local_cluster as lc
from checkpoint_operator.api.names import MARKER_NAME, PROBE_PREFIX

CHUNK = 1 << 16
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}
_CONDITIONS = {"if-none-match", "if-match"}
_SIGNED_BY_US = {"authorization", "x-amz-date"}
_CHECKSUM_ELEMENT = re.compile(rb"<(Checksum\w+)>[^<]*</\1>")


class Fault(Enum):
    """What may befall one request."""

    SLOW_DOWN = auto()
    """The store says 503 SlowDown, having read the body."""
    STALL = auto()
    """Nothing more is read and nothing answered, and the connection stays open for ever."""
    CUT = auto()
    """The connection is reset in the middle of the request's body."""
    CUT_ANSWER = auto()
    """The connection is reset in the middle of the answer's body."""
    LOSE_REPLY = auto()
    """The store does what was asked, and its answer never arrives."""


@dataclass(frozen=True)
class Request:
    """What was asked, in the words of S3's API."""

    method: str
    key: str
    operation: str
    size: int


@dataclass
class Proxy:
    """``sent`` counts the body bytes of data that arrived, by (operation, key); ``asked`` the requests of each operation."""

    upstream: str
    access_key: str
    secret_key: str = field(repr=False)
    strips: bool = False
    """Conditions and checksums are taken out of requests and answers: an old store that has never heard of them."""
    forgets: frozenset[str] = frozenset()
    """Operations whose conditions are taken out, and nothing else: a store that learned them one by one."""
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    happened: Counter[Fault] = field(default_factory=Counter)
    endpoint: str = ""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._ended = threading.Condition()
        self._planned: list[tuple[Fault, Callable[[Request], bool]]] = []
        self._cues: list[tuple[int, Callable[[], object]]] = []
        self.over = threading.Event()

    def plan(self, fault: Fault, operation: str, times: int = 1, *, key: str = "") -> None:
        """The next ``times`` requests of this operation (on keys that end so) suffer it."""
        for _ in range(times):
            self._planned.append((fault, lambda asked: asked.operation == operation and asked.key.endswith(key)))

    def at_byte(self, count: int, action: Callable[[], object]) -> None:
        """Call ``action`` once, when so many bytes of data have arrived in all."""
        self._cues.append((count, action))

    @contextmanager
    def handling(self) -> Iterator[None]:
        with self._ended:
            self._running += 1
        try:
            yield
        finally:
            with self._ended:
                self._running -= 1
                self._ended.notify_all()

    def wait_idle(self) -> None:
        """Until the server has answered whatever was still on its way: a killed client's last requests."""
        with self._ended:
            assert self._ended.wait_for(lambda: self._running == 0, 60)

    @property
    def bytes_of_data(self) -> int:
        with self._lock:
            return sum(self.sent.values())

    def fault_of(self, request: Request) -> Fault | None:
        with self._lock:
            self.asked[request.operation] += 1
            for number, (fault, matches) in enumerate(self._planned):
                if matches(request):
                    del self._planned[number]
                    self.happened[fault] += 1
                    return fault
        return None

    def count(self, request: Request, size: int) -> None:
        is_marker = request.key.rpartition("/")[2].startswith((MARKER_NAME, PROBE_PREFIX))
        if request.operation not in ("PutObject", "UploadPart") or is_marker:
            return
        with self._lock:
            self.sent[request.operation, request.key] += size
            total = sum(self.sent.values())
            due = [cue for cue in self._cues if cue[0] <= total]
            self._cues = [cue for cue in self._cues if cue[0] > total]
        for _, action in due:
            action()

    def signed(self, method: str, path: str, headers: dict[str, str]) -> dict[str, str]:
        """The headers with a signature of our own over them."""
        url = f"http://{headers['host']}{path}"
        request = AWSRequest(method, url, headers={name: value for name, value in headers.items() if name != "host"})
        _Signer(Credentials(self.access_key, self.secret_key), "s3", "us-east-1").add_auth(request)
        return {**dict(request.headers.items()), "host": headers["host"]}


class _Signer(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """The payload's hash is the one that the client sent (or that we computed), never one of an empty body."""

    def add_auth(self, request: AWSRequest) -> None:
        self._payload = request.headers["X-Amz-Content-SHA256"]
        super().add_auth(request)

    def payload(self, request: AWSRequest) -> str:
        return str(self._payload)


@contextmanager
def proxy(
    upstream: str,
    access_key: str,
    secret_key: str,
    *,
    strips: bool = False,
    forgets: Iterable[str] = (),
    tls: lc.TLSFiles | None = None,
) -> Iterator[Proxy]:
    """A proxy on a free port of loopback, for as long as the block lasts. With ``tls`` its own side is an https one."""
    made = Proxy(upstream, access_key, secret_key, strips, frozenset(forgets))
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": made}))
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    made.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a stalled handler waits for its client, which may be waiting for us

    def server_bind(self) -> None:
        # Small, so that a body does not disappear in the kernel while nobody reads it.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is what the tests are about, and no news; a bug of the proxy is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def handle_any(self) -> None:
        with self.proxy.handling():
            self._handle()

    def _handle(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        request = _understood(self.command, self.path, size)
        fault = self.proxy.fault_of(request)
        match fault:
            case Fault.STALL:
                self.proxy.over.wait()
                self.close_connection = True
            case Fault.SLOW_DOWN:
                for _ in self._body(request, size):
                    pass
                self._answer(503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>")
            case Fault.CUT:
                for _ in self._body(request, size // 2):
                    pass
                self._reset()
            case _:
                self._forward(request, size, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815 - the names that http.server asks for

    def _forward(self, request: Request, size: int, fault: Fault | None) -> None:
        path, headers, body = self._rewritten(request, size)
        target = urlsplit(self.proxy.upstream)
        upstream = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            upstream.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                upstream.putheader(name, value)
            upstream.endheaders()
            for piece in body:
                # Refused early: the rest is for nobody, and what the server said is still to be read.
                with suppress(BrokenPipeError, ConnectionResetError):
                    upstream.send(piece)
            response = upstream.getresponse()
            if fault is Fault.LOSE_REPLY:
                response.read()
                self._reset()
            else:
                self._relay(response, fault)
        finally:
            upstream.close()

    def _rewritten(self, request: Request, size: int) -> tuple[str, dict[str, str], Iterator[bytes]]:
        headers = {name.lower(): value for name, value in self.headers.items()}
        headers = {name: value for name, value in headers.items() if name not in _HOP_BY_HOP}
        body = self._body(request, size)
        if request.operation in self.proxy.forgets:
            headers = {name: value for name, value in headers.items() if name not in _CONDITIONS | _SIGNED_BY_US}
            return self.path, self.proxy.signed(self.command, self.path, headers), body
        if not self.proxy.strips:
            return self.path, headers, body
        headers = {name: value for name, value in headers.items() if not _is_modern(name)}
        if request.method == "POST" and size:
            document = _CHECKSUM_ELEMENT.sub(b"", b"".join(body))
            headers["x-amz-content-sha256"] = hashlib.sha256(document).hexdigest()
            headers["content-length"] = str(len(document))
            headers.pop("content-md5", None)
            body = iter([document])
        headers = {name: value for name, value in headers.items() if name not in _SIGNED_BY_US}
        return self.path, self.proxy.signed(self.command, self.path, headers), body

    def _body(self, request: Request, size: int) -> Iterator[bytes]:
        left = size
        while left:
            piece = self.rfile.read1(min(left, CHUNK))  # type: ignore[attr-defined]  # a BufferedReader
            if not piece:
                raise ConnectionResetError("the client is gone")
            left -= len(piece)
            self.proxy.count(request, len(piece))
            yield piece

    def _relay(self, response: http.client.HTTPResponse, fault: Fault | None) -> None:
        length = response.length
        small = b""
        is_document = "xml" in response.headers.get("Content-Type", "")
        if self.command != "HEAD" and (length is None or (is_document and self.proxy.strips)):
            small = response.read()
            small = _CHECKSUM_ELEMENT.sub(b"", small) if self.proxy.strips else small
            length = len(small)
        self.send_response_only(response.status, response.reason)
        for name, value in response.headers.items():
            if name.lower() in _HOP_BY_HOP | {"content-length"} or (self.proxy.strips and _is_checksum(name)):
                continue
            self.send_header(name, value)
        announced = response.headers.get("Content-Length", "0") if self.command == "HEAD" else str(length)
        if response.status not in (204, 304):
            self.send_header("Content-Length", announced)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is Fault.CUT_ANSWER:
            self.wfile.write(small[: len(small) // 2] or response.read((length or 0) // 2))
            self._reset()
            return
        self.wfile.write(small)
        while piece := response.read(CHUNK):
            self.wfile.write(piece)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """An RST, as a machine that lost its power gives, not the orderly end of a stream."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()


def _is_modern(name: str) -> bool:
    return name.lower() in _CONDITIONS or _is_checksum(name)


def _is_checksum(name: str) -> bool:
    return name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum-", "x-amz-trailer"))


def _understood(method: str, target: str, size: int) -> Request:
    """Path style only: /bucket/key?query."""
    url = urlsplit(target)
    key = unquote(url.path).lstrip("/").partition("/")[2]
    query = parse_qs(url.query, keep_blank_values=True)
    is_upload = "uploadId" in query or "uploads" in query
    names = {
        ("PUT", True): "UploadPart",
        ("PUT", False): "PutObject",
        ("POST", True): "CompleteMultipartUpload" if "uploadId" in query else "CreateMultipartUpload",
        ("DELETE", True): "AbortMultipartUpload",
        ("DELETE", False): "DeleteObject",
        ("GET", True): "ListParts" if "uploadId" in query else "ListMultipartUploads",
        ("GET", False): "GetObject" if key else "ListObjectsV2",
        ("HEAD", False): "HeadObject",
    }
    return Request(method, key, names.get((method, is_upload), method), size)
