"""A wire to a real server that can be cut, slowed down and mended: a fault that no real part makes on request."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time


class FaultProxy:
    """Forwards TCP to loopback, from an address of this machine. ``bytes_per_second`` limits what clients send (None: no
    limit); ``cut`` drops everything."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._upstream = ("127.0.0.1", port)
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.endpoint = f"http://{host}:{self.port}"
        self.bytes_per_second: int | None = None
        self.forwarded = 0
        self._is_cut = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, name="fault proxy", daemon=True)

    def cut(self) -> None:
        """Reset what is open, and whatever connects from now on."""
        self._is_cut = True
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._is_cut = False
        self.bytes_per_second = None

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server, selectors.DefaultSelector() as selector:
            with self._lock:
                self._open |= {client, server}
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            try:
                while self._forward(selector, client):
                    pass
            except OSError:
                return
            finally:
                with self._lock:
                    self._open -= {client, server}

    def _forward(self, selector: selectors.BaseSelector, client: socket.socket) -> bool:
        for key, _ in selector.select(timeout=1):
            source, sink = key.fileobj, key.data
            assert isinstance(source, socket.socket)
            chunk = source.recv(32 * 1024)
            if not chunk:
                return False
            if source is client:
                self.forwarded += len(chunk)
                if self.bytes_per_second:
                    time.sleep(len(chunk) / self.bytes_per_second)
            sink.sendall(chunk)
        return not self._is_cut

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=5)
