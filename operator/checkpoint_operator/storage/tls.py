"""TLS for bodies of megabytes: Python's own ``ssl``, with the system calls taken out of its hands.

``ssl.SSLSocket`` polls and writes once for each record of 16 KiB. Here the same library encrypts into memory, and a
megabyte goes to the kernel at once: a fifth less CPU for an upload (``benchmarks/transfer.py``), and a timeout on the plain
socket that counts for what is sent at once and not for the whole body.
"""

import io
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from checkpoint_operator.storage.store import Buffer
from checkpoint_operator.storage.turn import TURN

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AT_ONCE = 1 << 20
_RECEIVED_AT_ONCE = 256 << 10
_HELD_BACK = 128 << 10


class TLSStream:
    """A connected socket with TLS on it: as much of the socket's interface as :mod:`http.client` uses. One thread only.

    Certificates and the host's name are verified by the context, as for any other socket.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._received = memoryview(bytearray(_RECEIVED_AT_ONCE))
        self._readers, self._is_closed = 0, False
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._receive()
            else:
                break
        self._flush()

    def sendall(self, data: Buffer) -> None:
        """Encrypt and send everything. Raises OSError; TimeoutError where nothing moves for the socket's timeout."""
        view = memoryview(data)
        for start in range(0, len(view), AT_ONCE):
            bite = view[start : start + AT_ONCE]
            while bite:
                bite = bite[self._tls.write(bite) :]
            # Headers wait for the body that follows them, and a small body for the moment when its answer is read.
            if self._outgoing.pending > _HELD_BACK:
                self._flush()

    def recv_into(self, buffer: "WriteableBuffer") -> int:
        """Decrypt what has come into a buffer; 0 at the end of the stream."""
        view = memoryview(buffer).cast("B")
        got = 0
        while got < len(view):
            try:
                count = cast(int, self._tls.read(len(view) - got, view[got:]))
            except ssl.SSLWantReadError:
                if got:
                    return got
                self._receive()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return got
            else:
                if not count:
                    return got
                got += count
        return got

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

    def _receive(self) -> None:
        with TURN.let_go():
            self._flush()
            count = self._socket.recv_into(self._received)
        if count:
            self._incoming.write(self._received[:count])
        else:
            self._incoming.write_eof()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())


class _Reader(io.RawIOBase):
    def __init__(self, stream: TLSStream) -> None:
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
