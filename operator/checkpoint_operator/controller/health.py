"""Whether the operator works, told to whoever asks over HTTP: /healthz, /readyz, and its numbers under /metrics.

The server has threads of its own: an operator whose event loop is stuck must be able to say so, and one that is merely
busy must not look stuck.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6, SHUT_RDWR, socket

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from checkpoint_operator.controller.config import parse_address

BEAT = 1.0
"""Seconds between two signs of life of the event loop."""
STUCK = 30.0
"""Seconds without such a sign after which the loop is stuck: nothing of ours computes for so long."""
UNHEARD_LISTINGS = 2
"""Listings in a row that found changes which a silent watch had not told: such a watch is dead, and only a restart helps."""
DEAF = 1800.0
"""Seconds without an event and without a listing that succeeded: then what we hold of the API server (addresses, token,
connections) is suspected, and thrown away by a restart."""
CLIENT_TIMEOUT = 5.0
CONNECTIONS = 32

_log = logging.getLogger(__name__)


class AddressError(Exception):
    """The address cannot be listened at."""


class Health:
    """What was seen of the operator's parts. ``clock`` counts seconds. Told by the event loop, asked by threads.

    ``resync``: seconds between two listings.
    """

    def __init__(self, resync: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaf = max(DEAF, 3 * resync)
        self._beat = self._heard = clock()
        self._spoke = False
        self._unheard = 0
        self._ended: str | None = None
        self._filled = False

    def beat(self) -> None:
        """The event loop turns."""
        self._beat = self._clock()

    def filled(self) -> None:
        """The cache knows everybody: decisions are made from now on."""
        self._filled = True

    def event(self) -> None:
        """The watch told something."""
        self._heard = self._clock()
        self._spoke = True

    def listed(self, changes: int) -> None:
        """A listing succeeded, and found so many changes that were not known."""
        self._heard = self._clock()
        self._unheard = self._unheard + 1 if changes and not self._spoke else 0
        self._spoke = False

    def ended(self, part: str) -> None:
        """A part that runs for ever has ended."""
        self._ended = part

    def heard_ago(self) -> float:
        """Seconds since the API server was last heard of."""
        return self._clock() - self._heard

    def sick(self) -> str | None:
        """Why a restart is the only help, or None."""
        now = self._clock()
        if self._ended:
            return f"a part that runs for ever has ended: {self._ended}"
        if (stuck := now - self._beat) > STUCK:
            return f"the event loop has been stuck for {stuck:.0f} s"
        if self._unheard >= UNHEARD_LISTINGS:
            return f"the watch is dead: {self._unheard} listings in a row found changes that it had not told"
        if (deaf := now - self._heard) > self._deaf:
            return f"nothing was heard of the API server for {deaf:.0f} s"
        return None

    def unready(self) -> str | None:
        """Why nothing is decided yet, or None."""
        return self.sick() or (None if self._filled else "the artifacts are being listed")

    def watch_over(self, task: "asyncio.Task[None]") -> None:
        """A task that runs for ever: its end, but for the end of everything, is a sickness."""

        def ended(done: "asyncio.Task[None]") -> None:
            if not done.cancelled():
                _log.error("%s has ended: %r", done.get_name(), done.exception())
                self.ended(done.get_name())

        task.add_done_callback(ended)


async def beat_forever(health: Health) -> None:
    """The event loop's pulse."""
    while True:
        health.beat()
        await asyncio.sleep(BEAT)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], health: Health, registry: CollectorRegistry) -> None:
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        self.health = health
        self.registry = registry
        self._open: dict[object, None] = {}  # in the order in which they came
        self._opening = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: "socket | tuple[bytes, socket]", client_address: object) -> None:
        # Whoever opens thousands of connections, with a letter on each now and then, keeps out nobody who has a question.
        # That takes a moment, so it is the oldest one that has to go. A probe that is not answered is our restart.
        with self._opening:
            oldest = next(iter(self._open)) if len(self._open) >= CONNECTIONS else None
            self._open.pop(oldest, None)
            self._open[request] = None
        if isinstance(oldest, socket):
            with suppress(OSError):
                oldest.shutdown(SHUT_RDWR)  # its thread finds the end, and closes
        super().process_request(request, client_address)

    def process_request_thread(self, request: "socket | tuple[bytes, socket]", client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._opening:
                self._open.pop(request, None)

    def handle_error(self, request: object, client_address: object) -> None:
        _log.debug("a client of %s went away", self.server_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_TIMEOUT
    server_version = "checkpoint-operator"
    sys_version = ""

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/healthz":
                self._say(self.server.health.sick())
            case "/readyz":
                self._say(self.server.health.unready())
            case "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._send(200, encode(self.server.registry), content_type)
            case _:
                self._send(404, b"there are /healthz, /readyz and /metrics\n", "text/plain")

    def _say(self, trouble: str | None) -> None:
        self._send(503 if trouble else 200, f"{trouble or 'ok'}\n".encode(), "text/plain; charset=utf-8")

    def _send(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        _log.debug(format, *args)


@contextmanager
def serve(address: str, health: Health, registry: CollectorRegistry) -> Iterator[int | None]:
    """Answer at this address (empty: nowhere) for as long as the context lasts; gives the port.

    Raises:
        AddressError: it is in use, or not ours.
    """
    if not address:
        yield None
        return
    try:
        server = _Server(parse_address(address), health, registry)
    except OSError as error:
        raise AddressError(f"'{address}' cannot be listened at: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
