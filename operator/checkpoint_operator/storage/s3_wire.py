"""The bodies of data objects on their way to and from S3: what the product is for, so the one place with own wire code.

Everything else that is said to S3 goes through botocore's client. A part through that client costs a copy of the body and a
millisecond of Python; here it is one ``send`` loop over a buffer that nobody copies. Signing is botocore's, HTTP is the
standard library's, the policy of retries is urllib3's.

Each request has a deadline without progress (``STALL_SECONDS`` of :mod:`checkpoint_operator.storage.connector`): a
connection on which nothing moves for so long is dropped and the request made again on another. 503 SlowDown halves from how
many threads requests are under way.
"""

import hashlib
import http.client
import ssl
import time
import weakref
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urlsplit

from botocore.auth import EMPTY_SHA256_HASH, UNSIGNED_PAYLOAD
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry
from urllib3.util.wait import wait_for_read

from checkpoint_operator.storage.connector import Connector, WireError
from checkpoint_operator.storage.gate import SLOW_DOWN, Gate
from checkpoint_operator.storage.s3_signer import sign
from checkpoint_operator.storage.store import PIECE, Arrived, Body, Buffer, hashed, slices_of
from checkpoint_operator.storage.streams import Stream
from checkpoint_operator.storage.turn import SMALL, TURN

if TYPE_CHECKING:
    from botocore.credentials import Credentials

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
        self._connect = Connector(url.scheme, url.hostname or "", url.port, tls)
        self._credentials, self._region = credentials, region
        self._has_tls = tls is not None
        self._is_well = True
        # Large bodies leave megabytes of buffers behind in a connection, and there are many connections for small ones.
        self._idle: tuple[deque[_Idle], deque[_Idle]] = (deque(), deque())
        self.gate = Gate(limit)
        # As urllib3's pools do: whoever lets go of the wire need not close it.
        weakref.finalize(self, _close_all, self._idle)

    @contextmanager
    def putting(self, key: str, query: str, headers: Mapping[str, str], body: Body) -> Iterator[Callable[[], Answer]]:
        """PUT one body: on its way when the block begins; what the block is given waits for the answer, and may be called
        once. It raises :class:`WireError`. A block that ends without that waits for one answer, whatever it says: nothing
        that was sent happens later."""
        # On TLS the body is protected twice already, by the connection and by its checksum; so botocore has it as well.
        payload = UNSIGNED_PAYLOAD if self._has_tls else hashed(body, hashlib.sha256()).hexdigest()
        headers = {**headers, "Content-Length": str(len(body))}
        call = _Call("PUT", self._url(key, query), headers, payload, body, len(body), lambda answer: _read(answer, _SLICE))
        # Trouble is told when the answer is asked for, after all attempts. While the store is in trouble nothing is sent
        # before that either.
        first = self._try(call) if self.gate.is_free and self._is_well else None
        try:
            yield lambda: self._finish(call, first)
        finally:
            if isinstance(first, _Sent):
                first.wait()

    def get(self, key: str, headers: Mapping[str, str], length: int) -> Answer:
        """GET at most ``length`` bytes of an object. Raises :class:`WireError`, :class:`TooLarge` where there are more."""
        most = max(length, _SLICE)
        url = self._url(key)
        return self._finish(_Call("GET", url, headers, EMPTY_SHA256_HASH, b"", length, lambda answer: _read(answer, most)))

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

        return self._finish(_Call("GET", self._url(key), headers, EMPTY_SHA256_HASH, b"", len(into), read))

    def _url(self, key: str, query: str = "") -> str:
        return f"{self._base}/{quote(key, safe='/-_.~')}{query}"

    def _try(self, call: "_Call") -> "_Sent | Exception":
        try:
            with _turn(call):
                return self._begin(call)
        except (OSError, http.client.HTTPException) as error:
            return error

    def _finish(self, call: "_Call", first: "_Sent | Exception | None" = None) -> Answer:
        """Make a request until it has an answer, or there were enough attempts; ``first`` is what came of the first one."""
        retry = Retry(ATTEMPTS - 1, backoff_factor=0.25, backoff_jitter=0.5, backoff_max=20)
        with _turn(call):
            while True:
                answer, failed, slowdowns = None, Exception(), 0
                try:
                    sent, first = first or self._begin(call), None
                    if isinstance(sent, Exception):
                        raise sent
                    answer, slowdowns = sent.answer(), sent.slowdowns
                except (OSError, http.client.HTTPException) as error:
                    failed = error.with_traceback(None)  # its frames hold the body, and the list of retries holds it
                    self._is_well = False
                    _close_all(self._idle)  # whatever happened to this connection may have happened to all of them
                if answer is not None:
                    self._is_well = True
                    if not _may_pass(answer):
                        self.gate.went_well()
                        return answer
                    if answer.status in SLOW_DOWN:
                        self.gate.slow_down(slowdowns)
                try:
                    retry = retry.increment(call.method, call.url, error=failed)
                except MaxRetryError:
                    if answer is not None:
                        return answer  # the store's own words say more than we could
                    raise WireError(f"{type(failed).__name__}: {failed}, {ATTEMPTS} times") from failed
                with TURN.let_go():
                    time.sleep(retry.get_backoff_time())

    def _begin(self, call: "_Call") -> "_Sent":
        """Send a request, as soon as the gate lets it pass."""
        self.gate.enter()
        slowdowns, connection = self.gate.slowdowns, None
        try:
            headers = {**call.headers, "host": self._connect.host}
            headers = sign(self._credentials, self._region, call.method, call.url, headers, call.payload)
            idle = self._idle[call.size < SMALL]
            connection = self._take(idle)
            response = self._send(connection, call, headers)
        except BaseException:
            if connection:
                connection.close()
            self.gate.leave()
            raise
        return _Sent(call.read, connection, response, idle, self.gate, slowdowns)

    def _take(self, idle: deque[_Idle]) -> http.client.HTTPConnection:
        """A connection; not one that the other side has closed, or on which it has said what nobody asked for."""
        while True:
            try:
                since, connection = idle.pop()
            except IndexError:
                with TURN.let_go():
                    return self._connect.open()
            if time.monotonic() - since < _FRESH_SECONDS or not wait_for_read(connection.sock, timeout=0):
                return connection
            connection.close()

    def _send(
        self, connection: http.client.HTTPConnection, call: "_Call", headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        lines = [f"{call.method} {self._connect.target(call.url)} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in {**headers, **self._connect.headers}.items()]
        head = "\r\n".join(lines)
        if not head.replace("\r\n", "").isprintable() or head.count("\n") != len(lines) - 1:
            raise WireError("a header has a control character in it")
        sock = connection.sock
        try:
            sock.sendall(head.encode("latin-1", "strict") + b"\r\n\r\n")
            for one in slices_of(call.body):
                view = memoryview(one)
                # Bite by bite: the timeout of a plain socket's sendall is for all that it is given, however fast it goes.
                for start in range(0, len(view), _SLICE):
                    sock.sendall(view[start : start + _SLICE])
                cast(Stream, sock).flush()  # the next slice is read into the same buffer
        except (BrokenPipeError, ConnectionResetError):
            # A store that refuses early closes while we still send; what it said is in the socket's buffer.
            if not call.body:
                raise
        return http.client.HTTPResponse(sock, method=call.method)


@dataclass(frozen=True)
class _Call:
    """What is asked for, in as many attempts as it takes. ``size``: bytes of the body, whichever way it goes."""

    method: str
    url: str
    headers: Mapping[str, str]
    payload: str
    body: Body
    size: int
    read: _Read


def _turn(call: _Call) -> AbstractContextManager[None]:
    return TURN.taken() if call.size < SMALL else nullcontext()


class _Sent:
    """One request that was sent on a connection of its own; it is inside the gate until its answer was read."""

    def __init__(
        self,
        read: _Read,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        idle: deque[_Idle],
        gate: Gate,
        slowdowns: int,
    ) -> None:
        self._read, self._connection, self._response, self._idle, self._gate = read, connection, response, idle, gate
        self.slowdowns = slowdowns
        """Of the gate, when it was sent."""
        self._is_over = False

    def answer(self) -> Answer:
        """Wait for it, and make the connection free for another one. Raises OSError, HTTPException."""
        response, self._is_over = self._response, True
        try:
            response.begin()
            content = self._read(response)
        except BaseException:
            response.close()
            self._connection.close()
            self._gate.leave()
            raise
        if response.will_close:
            self._connection.close()
        else:
            self._idle.append((time.monotonic(), self._connection))
        self._gate.leave()
        return Answer(response.status, cast(Mapping[str, str], response.headers), content)

    def wait(self) -> None:
        """Until the store has said something, where nobody has asked for it."""
        if not self._is_over:
            with suppress(OSError, http.client.HTTPException, WireError):
                self.answer()


def _close_all(idle: Iterable[deque[_Idle]]) -> None:
    for connections in idle:
        while connections:
            connections.pop()[1].close()


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
