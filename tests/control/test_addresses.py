"""Addresses: what the kernel and the resolver say of this host, and how they are written."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from packcast.control.addresses import (
    addresses_here,
    connect,
    host_and_port,
    interface_of,
    interface_towards,
    is_loopback,
    listening_socket,
    resolve,
    says_loopback,
    source_towards,
    text_of,
    with_interface,
)
from packcast.settings import is_host

HAS_IPV6 = Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text() != ""
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 address on this host")


def test_loopback_addresses_belong_to_the_loopback_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("127.0.1.1") == "lo"
    assert interface_of("::ffff:127.0.0.1") == "lo"
    assert interface_towards("127.0.1.1") == "lo"


@needs_ipv6
def test_the_ipv6_loopback_too() -> None:
    assert interface_of("::1") == "lo"
    assert interface_towards("::1") == "lo"


def test_the_address_of_another_host_is_on_no_interface() -> None:
    assert interface_of("203.0.113.7") is None
    assert interface_of("2001:db8::7") is None


def test_this_hosts_addresses_are_on_interfaces_and_no_loopback_is_among_them() -> None:
    names = {name for _, name in socket.if_nameindex()}
    here = addresses_here()
    assert {interface_of(address) for address in here} <= names - {"lo"}
    assert len(here) == len(set(here))
    assert not any(map(is_loopback, here))


def test_the_way_to_an_address_of_this_host_begins_there() -> None:
    assert source_towards("127.0.0.1") == "127.0.0.1"
    assert [source_towards(address) for address in addresses_here()] == addresses_here()
    assert source_towards("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("10.0.0.1", 5), "10.0.0.1"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1"),
        (("fd00::1", 5, 0, 0), "fd00::1"),
        (("fe80::1", 5, 0, socket.if_nametoindex("lo")), "fe80::1%lo"),
        (("fe80::1%lo", 5, 0, socket.if_nametoindex("lo")), "fe80::1%lo"),
    ],
)
def test_a_sockets_address_is_one_that_can_be_connected_to(
    address: tuple[object, ...], text: str
) -> None:
    assert text_of(address) == text


def test_a_link_local_address_gets_this_hosts_interface() -> None:
    assert with_interface("fe80::1%eth7", "lo") == "fe80::1%lo"
    assert with_interface("fe80::1", "lo") == "fe80::1%lo"
    assert with_interface("fe80::1%eth7", None) == "fe80::1%eth7"
    for other in ("10.0.0.1", "169.254.0.1", "fd00::1", "node1"):
        assert with_interface(other, "lo") == other
    assert interface_of("fe80::1%lo") == "lo"


def test_addresses_are_written_as_they_are_typed() -> None:
    assert host_and_port("node1", 1) == "node1:1"
    assert host_and_port("fe80::1%eth0", 1) == "[fe80::1%eth0]:1"


def test_only_who_says_loopback_means_this_host_alone() -> None:
    assert all(map(says_loopback, ("127.0.0.1", "127.0.1.1", "::1", "localhost", "a.localhost")))
    assert not any(map(says_loopback, ("10.0.0.1", "node1", "localhost.example", "fe80::1%lo")))


@pytest.mark.parametrize(
    "text", ["node1", "n_1.svc", "sender-0.svc.", "10.0.0.1", "::1", "fe80::1%eth0", "büro.example"]
)
def test_these_could_be_hosts(text: str) -> None:
    assert is_host(text)


@pytest.mark.parametrize(
    "text",
    ["", "x..y", ".x", "a b", "a\0b", "http://node1", "[::1]", "::g", "a" * 64, "a." * 127 + "a"],
)
def test_these_are_no_hosts(text: str) -> None:
    assert not is_host(text)


@pytest.mark.parametrize("text", ["x..y", "a" * 64])
def test_a_name_that_is_none_is_an_error_of_the_network_and_not_of_the_program(text: str) -> None:
    with pytest.raises(OSError, match="not a host name"):
        resolve(text, 1)
    with pytest.raises(OSError, match="not a host name"):
        connect(text, 1, 1.0)


@needs_ipv6
def test_listening_everywhere_is_on_both_families() -> None:
    for host in ("", "::"):
        with listening_socket(host, 0) as listener:
            port = listener.getsockname()[1]
            for address in ("127.0.0.1", "::1"):
                connect(address, port, 1.0).close()


def test_a_taken_port_is_an_oserror() -> None:
    with (
        listening_socket("127.0.0.1", 0) as listener,
        pytest.raises(OSError, match="Address already in use"),
    ):
        listening_socket("127.0.0.1", listener.getsockname()[1])
