"""Sockets for bodies of megabytes and for thousands of small ones, plain and with TLS, as :mod:`http.client` uses a socket.

Python's own sockets ask the kernel whether something may be read or written before they do it, and with TLS for each record
of 16 KiB; and at each of these calls a thread gives the interpreter's lock away. Here the system is asked to do it, and
only where it cannot yet is it waited for. What is sent is gathered: headers and a small body go out in one call. With TLS
the same library encrypts into memory, and 256 KiB go to the kernel at once: a fifth less CPU for an upload
(``benchmarks/transfer.py``). The timeout of the socket counts for what is sent at once and not for the whole body.
"""

import io
import os
import socket
import ssl
from abc import abstractmethod
from contextlib import suppress
from mmap import mmap
from typing import TYPE_CHECKING, cast

from checkpoint_operator.storage.store import Buffer
from checkpoint_operator.storage.turn import TURN

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AT_ONCE = 256 << 10
_RECEIVED_AT_ONCE = 256 << 10
_HELD_BACK = 128 << 10


class Stream:
    """A connected socket with a timeout. One thread only. Whoever waits for the other side lets go of the turn."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._readers, self._is_closed = 0, False

    @abstractmethod
    def sendall(self, data: Buffer) -> None:
        """Send everything, of a little only with :meth:`flush`; until then it must stay as it is.

        Raises OSError; TimeoutError where nothing moves for the socket's timeout.
        """

    @abstractmethod
    def flush(self) -> None:
        """Send what was held back. Raises as :meth:`sendall` does."""

    @abstractmethod
    def recv_into(self, buffer: "WriteableBuffer") -> int:
        """Put what has come into a buffer, or wait for something; 0 at the end of the stream."""

    def fileno(self) -> int:
        """For a look whether something has come; what was received already is in our memory and is not seen by it."""
        return self._socket.fileno()

    def makefile(self, mode: str) -> io.BufferedReader:
        """What :class:`http.client.HTTPResponse` reads from, also after the connection was closed, as a socket has it."""
        self._readers += 1
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """The last one closes the socket: this call, or that of a reader."""
        self._is_closed = True
        if self._readers == 0:
            self._socket.close()

    def release(self) -> None:
        """A reader has ended."""
        self._readers -= 1
        if self._is_closed:
            self.close()

    def _send(self, *views: Buffer) -> None:
        try:
            sent = os.writev(self._socket.fileno(), views)
        except BlockingIOError:
            sent = 0
        for view in views:
            if sent < len(view):
                with TURN.let_go():
                    self._socket.sendall(memoryview(view)[sent:])
            sent = max(0, sent - len(view))

    def _receive(self, into: memoryview) -> int:
        try:
            return os.readv(self._socket.fileno(), [into])
        except BlockingIOError:
            with TURN.let_go():
                return self._socket.recv_into(into)


class PlainStream(Stream):
    """Without TLS."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._held: list[memoryview] = []

    def sendall(self, data: Buffer) -> None:
        self._held.append(memoryview(data))
        if sum(map(len, self._held)) > _HELD_BACK:
            self.flush()

    def flush(self) -> None:
        held, self._held = self._held, []
        if held:
            self._send(*held)

    def recv_into(self, buffer: "WriteableBuffer") -> int:
        self.flush()
        return self._receive(memoryview(buffer).cast("B"))


class TLSStream(Stream):
    """With TLS: certificates and the host's name are verified by the context, as for any other socket."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        # Of private memory the kernel gives what is written to: not much of it on a connection for small bodies.
        self._received = memoryview(mmap(-1, _RECEIVED_AT_ONCE))
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._take_in()
            else:
                break
        self.flush()

    def sendall(self, data: Buffer) -> None:
        view = memoryview(data)
        for start in range(0, len(view), AT_ONCE):
            bite = view[start : start + AT_ONCE]
            while bite:
                bite = bite[self._tls.write(bite) :]
            # Headers wait for the body that follows them, and a small body for the moment when all of it is there.
            if self._outgoing.pending > _HELD_BACK:
                self.flush()

    def flush(self) -> None:
        if self._outgoing.pending:
            self._send(self._outgoing.read())

    def recv_into(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        got = 0
        while got < len(view):
            try:
                count = cast(int, self._tls.read(len(view) - got, view[got:]))
            except ssl.SSLWantReadError:
                if got:
                    return got
                self._take_in()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return got
            else:
                if not count:
                    return got
                got += count
        return got

    def _take_in(self) -> None:
        self.flush()
        count = self._receive(self._received)
        if count:
            self._incoming.write(self._received[:count])
        else:
            self._incoming.write_eof()


class _Reader(io.RawIOBase):
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        with suppress(ConnectionResetError):
            return self._stream.recv_into(buffer)
        return 0

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.release()
