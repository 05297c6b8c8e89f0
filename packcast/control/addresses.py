"""Addresses of this host, its routes to others, and name resolution. Knows no launchers."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

from packcast.control.time_limit import within

BACKLOG = 1024
REACH_LIMIT_S = 10.0  # a lost SYN is sent again after 1, 3 and 7 s
LOOK_UP_LIMIT_S = 15.0  # a resolver asks its second name server after 5 s

_SIOCGIFCONF = 0x8912
_IFREQ = struct.Struct("16s H 2x 4s 16x")  # name, address family, port, IPv4 address
_MAX_INTERFACES = 1024

# TEST-NET-1 and the documentation prefix: never a host, but routed like one, so the kernel picks
# the source address that it would use towards the world. No packet is sent.
_SOMEWHERE_ELSE = ("192.0.2.1", "2001:db8::1")
_ANY_PORT = 9
NO_NAME_SERVER = "no name server has answered"
NAME_HINT = "give the address instead of the name, or check /etc/resolv.conf and /etc/hosts"

Found = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]]


def resolve(
    host: str,
    port: int,
    kind: socket.SocketKind = socket.SOCK_STREAM,
    *,
    limit_s: float = LOOK_UP_LIMIT_S,
    check: Callable[[], object] | None = None,
) -> Found:
    """The addresses of `host`, a name or a literal address.

    Raises OSError if there are none, or if no name server answers within `limit_s`: the resolver's
    own limit is half a minute or more, and its call cannot be stopped. Also raises what `check`
    raises during the wait.
    """

    def look_up() -> Found:
        try:
            return socket.getaddrinfo(host, port, type=kind)
        except UnicodeError as error:  # Python's own encoding of names, before anybody is asked
            raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is not a host name") from error

    if is_literal(host):
        return look_up()
    found = within(limit_s, "packcast-look-up", look_up, check=check)
    if found is None:
        raise socket.gaierror(socket.EAI_AGAIN, NO_NAME_SERVER)
    return found[0]


def text_of(address: Any) -> str:
    """The host of a socket's address: IPv4 in its own notation, link-local with its interface."""
    host = str(address[0])
    ip = ip_address(host.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    if _needs_interface(host) and "%" not in host and len(address) > 3 and address[3]:
        return f"{host}%{socket.if_indextoname(address[3])}"
    return host


def host_and_port(host: str, port: int | range) -> str:
    """As typed on a command line: `node1:29400`, `[fe80::1%eth0]:29400`, `node1:29400-29409`."""
    ports = f"{port[0]}-{port[-1]}" if isinstance(port, range) else port
    return f"[{host}]:{ports}" if ":" in host else f"{host}:{ports}"


def is_literal(host: str) -> bool:
    """Whether it is an IP address rather than a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_everywhere(host: str) -> bool:
    """Whether a listener there listens on every address of this host."""
    return host in ("", "0.0.0.0", "::")


def is_loopback(address: str) -> bool:
    """Whether only this host can reach the address."""
    return ip_address(address.partition("%")[0]).is_loopback


def says_loopback(host: str) -> bool:
    """Whether the name or address means this host only."""
    if is_literal(host):
        return is_loopback(host)
    return host == "localhost" or host.endswith(".localhost")


def with_interface(host: str, interface: str | None) -> str:
    """The address with the local interface's name if it is link-local: each host has its own."""
    bare = host.partition("%")[0]
    if interface is None or not (is_literal(bare) and _needs_interface(bare)):
        return host
    return f"{bare}%{interface}"


def source_towards(host: str) -> str | None:
    """This host's source address for `host`; `host` itself if it is here; None without a route."""
    try:
        addresses = resolve(host, _ANY_PORT, socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # a datagram socket's: sends nothing
                return text_of(probe.getsockname())
        except OSError:
            continue
    return None


def addresses_here() -> list[str]:
    """Addresses of this host that others may reach, the one of the default route first.

    Without link-local ones, which need an interface of the other host. Empty without a network.
    """
    towards_the_world = [source_towards(host) for host in _SOMEWHERE_ELSE]
    all_of_them = [*filter(None, towards_the_world), *(address for address, _ in interfaces())]
    return [
        address
        for address in dict.fromkeys(all_of_them)
        if not is_loopback(address) and not _needs_interface(address)
    ]


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this local address, for gloo and NCCL."""
    bare, _, scope = address.partition("%")
    if scope in (name for _, name in socket.if_nameindex()):
        return scope
    ip = ip_address(bare)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    # All of 127.0.0.0/8 is this host, though only one address of it is on an interface.
    wanted = "127.0.0.1" if ip.is_loopback and ip.version == 4 else str(ip)
    return next((name for found, name in interfaces() if found == wanted), None)


def interface_towards(host: str) -> str | None:
    """The interface over which this host reaches `host`."""
    source = source_towards(host)
    return None if source is None else interface_of(source)


def listening_socket(host: str, port: int | range) -> socket.socket:
    """A socket that listens on the first usable address of `host`; raises OSError.

    "" is every address, of IPv4 and IPv6. Of a range it takes the first free port.
    """
    ports = port if isinstance(port, range) else range(port, port + 1)
    for each in ports[:-1]:
        try:
            return _listening_socket(host, each)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    return _listening_socket(host, ports[-1])


def _listening_socket(host: str, port: int) -> socket.socket:
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    found: Found = [(socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::", port))]
    if not both:
        found = resolve(host or "0.0.0.0", port)
    reason = OSError("no such address")
    for family, kind, protocol, _, address in found:
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if both:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            reason = error
        else:
            return listener
    raise reason


def connect(
    host: str,
    port: int,
    timeout_s: float,
    *,
    look_up_s: float = LOOK_UP_LIMIT_S,
    check: Callable[[], object] | None = None,
) -> socket.socket:
    """A connection to `host:port`, at the first address that accepts. Raises OSError.

    Each address gets `timeout_s`; the look-up before, `look_up_s` and `check`, as in `resolve`.
    """
    reason = OSError("no such address")
    for *_, address in resolve(host, port, limit_s=look_up_s, check=check):
        try:
            return _connect(text_of(address), port, timeout_s)
        except OSError as error:
            reason = error
    raise reason


def _connect(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to this port of a literal address.

    After many attempts at an unused port of this host the kernel connects a socket to itself, and
    the server of that port could not bind it, nor for a minute after an orderly close.
    """
    sock = socket.create_connection((address, port), timeout_s)
    if sock.getsockname() == sock.getpeername():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


def _needs_interface(address: str) -> bool:
    ip = ip_address(address.partition("%")[0])
    return ip.version == 6 and ip.is_link_local


def interfaces() -> Iterator[tuple[str, str]]:
    """Every address of this host, secondary ones too, and its interface's name."""
    names = array.array("B", bytes(_MAX_INTERFACES * _IFREQ.size))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iL", len(names), names.buffer_info()[0])
        nbytes, _ = struct.unpack("iL", fcntl.ioctl(probe, _SIOCGIFCONF, request))
    for name, _, packed in _IFREQ.iter_unpack(names[: nbytes // _IFREQ.size * _IFREQ.size]):
        yield socket.inet_ntoa(packed), name.rstrip(b"\0").decode()
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return  # a kernel without IPv6
    for line in lines:
        digits, *_, name = line.split()
        yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), name
