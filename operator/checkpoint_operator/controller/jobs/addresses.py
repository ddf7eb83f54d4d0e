"""Which network addresses a user may make a mover call. Pure: no name is resolved, so a name that *leads* somewhere else is
the business of the admin's list and of network policies; an address in any spelling is ours.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint_operator.controller.config_jobs import EVERY

_PARTS = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+|\*\.[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[!-~]*)?"
)
# Names that a cloud's own resolver answers with its metadata address, and those of the pod itself.
_INTERNAL_NAMES = (
    *("localhost", "localhost6", "ip6-localhost", "ip6-loopback"),  # as /etc/hosts of many images has them
    *("metadata", "metadata.google.internal", "metadata.goog", "instance-data"),
)
_INTERNAL_DOMAINS = (".localhost", ".metadata.google.internal", ".metadata.goog", ".ec2.internal")
_CLOUDS = (".amazonaws.com", ".amazonaws.com.cn", ".googleapis.com", ".blob.core.windows.net")
# Beside what `ipaddress` knows as link-local: the metadata services of Alibaba, of Azure's host, of Oracle, of EC2 (and EKS'
# agent, who hands out pods' identities) and of GCE over IPv6.
_METADATA = tuple(
    ipaddress.ip_address(text)
    for text in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254")
)
# NAT64's two prefixes (RFC 6052, RFC 8215 with the address at its end), and SIIT's (RFC 2765).
_TRANSLATED = tuple(ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96"))
# 240/4 too: no store is there, and some stacks take 255.255.255.255 for everybody.
_RESERVED = ipaddress.ip_network("240.0.0.0/4")


@dataclass(frozen=True)
class Address:
    """A URL's parts in one spelling. ``path`` has no slash at its end."""

    scheme: str
    host: str
    port: int
    path: str


def parse(url: str) -> Address | None:
    """The parts of an endpoint; None for what different readers might read differently (escapes, users, odd ports)."""
    match = _PARTS.fullmatch(url)
    if match is None:
        return None
    port = int(match["port"] or (443 if match["scheme"] == "https" else 80))
    path = (match["path"] or "").rstrip("/")
    if not 0 < port < 65536 or any(char in path for char in "?#@%\\") or "/.." in path or "//" in path:
        return None
    return Address(match["scheme"], match["host"].lower().rstrip(".").strip("[]"), port, path)


def store_of(endpoint: str | None) -> str:
    """A name for the store behind an endpoint, equal wherever two of them may be one: empty for the clouds' own.

    A port that is the scheme's own, a slash or a dot at an end, capitals mean nothing.
    A bucket of AWS or Google is the same bucket at each of their addresses, and with none. A container of Azure belongs to
    an account, which may be named by a Secret that the operator does not read: so all accounts count as one here.
    """
    if endpoint is None:
        return ""
    address = parse(endpoint)
    if address is None:
        return endpoint  # it will not be called
    if address.host.endswith(_CLOUDS):
        return ""
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{address.scheme}://{host}:{address.port}{address.path}"


def why_internal(host: str) -> str | None:
    """What is wrong with calling this host unless an admin names it, or None. Takes every spelling of an IP address."""
    if host in _INTERNAL_NAMES or host.endswith(_INTERNAL_DOMAINS):
        return "a name of the pod or node itself, or of a cloud's metadata service"
    address = _ip(host)
    if address is None:
        return None
    if isinstance(address, ipaddress.IPv6Address) and (inner := _inner(address)) is not None:
        address = inner
    if address in _METADATA:
        return "the address of a cloud's metadata service"
    if address.is_link_local:
        return "a link-local address, where clouds keep their metadata service"
    if address.is_loopback or address.is_unspecified or (address.version == 4 and int(address) >> 24 == 0):
        return "an address of the pod or node itself"
    if address.is_multicast or (isinstance(address, ipaddress.IPv4Address) and address in _RESERVED):
        return "no address of a store"
    return None


def is_listed(address: Address, allowed: Sequence[str]) -> bool:
    """Whether one entry of an admin's list covers the address. Wildcards never cover internal ones."""
    internal = why_internal(address.host) is not None
    return any(_covers(entry, address, internal) for entry in allowed)


def _covers(entry: str, address: Address, internal: bool) -> bool:
    if entry == EVERY:
        return not internal
    listed = parse(entry)
    if listed is None or (listed.scheme, listed.port) != (address.scheme, address.port):
        return False
    if listed.host.startswith("*."):
        # Not an IP address: 'https://*.1' is no subnet.
        hosts = address.host.endswith(listed.host[1:]) and _ip(address.host) is None and not internal
    else:
        hosts = listed.host == address.host
    return hosts and (not listed.path or address.path == listed.path or address.path.startswith(listed.path + "/"))


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return _old_ipv4(host)


def _old_ipv4(host: str) -> ipaddress.IPv4Address | None:
    """The other spellings that ``inet_aton`` takes, and so most clients: 0xa9fea9fe, 2852039166, 0251.0376.43518."""
    numbers = []
    parts = host.split(".")
    if len(parts) > 4:
        return None
    for part in parts:
        if not re.fullmatch(r"0[xX][0-9a-fA-F]*|[0-9]+", part):
            return None
        if part[:2] in ("0x", "0X"):
            numbers.append(int(part[2:] or "0", 16))
        elif part[0] == "0" and part.strip("01234567") == "":
            numbers.append(int(part, 8))
        else:
            numbers.append(int(part))
    *heads, last = numbers
    if any(number > 255 for number in heads) or last >= 256 ** (5 - len(numbers)):
        return None
    value = last
    for position, number in enumerate(heads):
        value += number << (24 - 8 * position)
    return ipaddress.IPv4Address(value)


def _inner(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for: mapped, compatible, 6to4, translated."""
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if any(address in network for network in _TRANSLATED) or (int(address) >> 32 == 0 and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None
