"""Opens connections to one host, over our own streams, through the proxy of the environment where there is one."""

import http.client
import socket
import ssl
from typing import cast
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from urllib3.util import make_headers

from checkpoint_operator.storage.streams import PlainStream, TLSStream

CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0


class WireError(Exception):
    """There is no way to send, or no answer after all attempts; the message says what happened to the last one."""


class Connector:
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
        connection = _Connection(*at, self._tls, self._host)
        connection.timeout = CONNECT_SECONDS
        if self._proxy and self._tls:
            connection.set_tunnel(self._host, self._port, self._proxy_headers)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection


class _Connection(http.client.HTTPConnection):
    """Over our own streams."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, name: str) -> None:
        super().__init__(host, port)
        self._tls, self._name = tls, name

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(STALL_SECONDS)
        stream = TLSStream(self.sock, self._tls, self._name) if self._tls else PlainStream(self.sock)
        self.sock = cast(socket.socket, stream)
