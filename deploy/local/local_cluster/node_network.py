"""The link between a node's network namespace and the outside: ranges that nobody else has, and no way to anywhere else.

All addresses are of 198.18.0.0/15, which RFC 2544 sets aside for test networks, so no real network is hidden by them.
A cluster takes 4,096 of them by making them unreachable, as a route of the last resort: the kernel refuses a second
such route, so that is the lock too. What is sent to a node that is gone then fails at once, and never follows the
default route to a stranger.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from .errors import LocalClusterError
from .leftovers import LINK, ROUTE, ROUTE_METRIC, Leftover
from .session import Session

_POOL = IPv4Network("198.18.0.0/15")
_CLUSTER_PREFIX, _LINK_PREFIX = 20, 24
_CLONE_NEWNET = 0x40000000
_INNER_DEVICE = "eth0"


@dataclass(frozen=True)
class Network:
    """One cluster's part of the pool, in blocks of 256: the link, the services, and from the eighth on the pods."""

    range: IPv4Network

    @property
    def slot(self) -> int:
        """A small number that no other cluster on this machine has at the same time."""
        return (int(self.range.network_address) - int(_POOL.network_address)) // self.range.num_addresses

    @property
    def device(self) -> str:
        return f"ckptnode{self.slot}"

    @property
    def host(self) -> str:
        """The outer end: what pods shall reach outside listens there."""
        return str(self._link + 1)

    @property
    def server(self) -> str:
        return str(self._link + 2)

    def node(self, number: int) -> str:
        """The address of a node, counted from 1."""
        return str(self._link + 10 + number)

    @property
    def services(self) -> IPv4Network:
        return self._block(1)

    def service(self, number: int) -> str:
        return str(self.services.network_address + number)

    @property
    def pods(self) -> IPv4Network:
        return IPv4Network((int(self.range.network_address) + 8 * 256, _CLUSTER_PREFIX + 1))

    def pods_of(self, number: int) -> IPv4Network:
        return self._block(8 + number)

    @property
    def _link(self) -> IPv4Address:
        return self.range.network_address

    def _block(self, number: int) -> IPv4Network:
        return IPv4Network((int(self.range.network_address) + number * 256, _LINK_PREFIX))


def claim_network(session: Session) -> Network:
    """Take a range that is free on this machine; it is given back with the session.

    Raises:
        LocalClusterError: all are taken, or routes cannot be made here.
    """
    for candidate in _POOL.subnets(new_prefix=_CLUSTER_PREFIX):
        network = Network(candidate)
        made = _ip("route", "add", "unreachable", str(candidate), "metric", ROUTE_METRIC)
        if made.returncode == 0:
            session.leave(Leftover(ROUTE, str(candidate)), Leftover(LINK, network.device))
            return network
        if "File exists" not in made.stderr:
            raise LocalClusterError(f"a node needs a route of its own, and ip refuses it: {made.stderr.strip()}")
    raise LocalClusterError(f"every part of {_POOL} is in use: stop clusters, or look at `ip route show {_POOL}`.")


def connect(network: Network, session: Session, wrap: tuple[str, ...], pid: int, nodes: int) -> None:
    """Lay the link to the network namespace of process `pid`, where `wrap` starts commands, and watch it."""
    outer, length = network.device, _LINK_PREFIX
    _must("link", "add", outer, "type", "veth", "peer", "name", _INNER_DEVICE, "netns", str(pid))
    _must("address", "add", f"{network.host}/{length}", "dev", outer)
    _must("link", "set", outer, "up")
    for address in (network.server, *(network.node(number) for number in range(1, nodes + 1))):
        _must("address", "add", f"{address}/{length}", "dev", _INNER_DEVICE, wrap=wrap)
    for device in ("lo", _INNER_DEVICE):
        _must("link", "set", device, "up", wrap=wrap)
    _must("route", "add", str(network.range), "via", network.server, "dev", outer)
    session.watch("network", Path("/sys/class/net") / outer)


@contextmanager
def inside(pid: int) -> Iterator[None]:
    """Sockets that this thread makes meanwhile belong to the network namespace of that process."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        other = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        try:
            _enter(other)
            try:
                yield
            finally:
                _enter(own)
        finally:
            os.close(other)
    finally:
        os.close(own)


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _must(*words: str, wrap: tuple[str, ...] = ()) -> None:
    done = _ip(*words, wrap=wrap)
    if done.returncode != 0:
        raise LocalClusterError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")


def _ip(*words: str, wrap: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*wrap, "ip", *words], capture_output=True, text=True, check=False)
