"""Hosts that are network namespaces of this machine: own names, own networks, own /etc/hosts."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.commands import Commands

_UNSHARE = ("unshare", "--net", "--mount", "--uts")
# Addresses can be used at once, without asking whether another host has them.
_BECOME = """
hostname "$0" && mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf &&
ip link set lo up &&
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
echo ready >&2; exec sleep 600
"""
_links = itertools.count()


def can_make_hosts() -> bool:
    """It takes root, `ip` and a kernel that lets us."""
    programs = all(map(shutil.which, ("unshare", "nsenter", "ip")))
    return programs and subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode == 0


needs_hosts = pytest.mark.skipif(not can_make_hosts(), reason="no network namespaces can be made")


class Host:
    """One of them; it ends with the test's commands."""

    def __init__(self, commands: Commands, folder: Path, name: str, names: dict[str, str]) -> None:
        self.hosts_file = folder / f"hosts-of-{name}"
        self.know(names)
        resolver = folder / "resolv.conf"
        resolver.write_text("nameserver 127.0.0.1\n")  # who is not there, and says so at once
        holder = commands.start([*_UNSHARE, "sh", "-c", _BECOME, name, self.hosts_file, resolver])
        holder.read_until("ready")
        self.pid = holder.process.pid

    def know(self, names: dict[str, str]) -> None:
        """Its /etc/hosts."""
        lines = [f"{address} {name}\n" for name, address in names.items()]
        self.hosts_file.write_text("".join(["127.0.0.1 localhost\n", *lines]))

    def inside(self, *argv: str | Path) -> list[str]:
        """What to start for `argv` to run there."""
        options = ("--target", str(self.pid), "--net", "--mount", "--uts", f"--wd={os.getcwd()}")
        return ["nsenter", *options, "--", *map(str, argv)]

    def take_ports(self, ports: range) -> None:
        """Those that its kernel chooses for who asks for none."""
        setting = "/proc/sys/net/ipv4/ip_local_port_range"
        order = f"echo {ports[0]} {ports[-1]} > {setting}"
        subprocess.run(self.inside("sh", "-c", order), check=True, timeout=10)

    def ip(self, *argv: str) -> str:
        """`ip ARGV` there, and what it says."""
        ran = subprocess.run(
            self.inside("ip", *argv), check=True, capture_output=True, text=True, timeout=10
        )
        return ran.stdout


def block_all_but(host: Host, interface: str, passed: range) -> None:
    """A firewall that drops, without a word, what comes by TCP for other ports than those."""
    # Whether a packet is for this host is asked first, unless that rule comes after ours.
    host.ip("rule", "add", "pref", "10", "lookup", "local")
    host.ip("rule", "del", "pref", "0")
    # The kernel takes no range that ends with 65535.
    for ports in (f"1-{passed[0] - 1}", f"{passed[-1] + 1}-65534"):
        match = ("iif", interface, "ipproto", "tcp", "dport", ports)
        host.ip("rule", "add", "pref", "5", *match, "blackhole")


def connect(one: Host, address: str | None, other: Host, others: str | None) -> str:
    """A cable between two hosts, with an address at each end (and IPv6 makes link-local ones);
    the name of the interface on both."""
    name = f"cable{next(_links)}"
    subprocess.run(
        [
            *("ip", "link", "add", name, "netns", str(one.pid)),
            *("type", "veth", "peer", "name", name, "netns", str(other.pid)),
        ],
        check=True,
        timeout=10,
    )
    for host, own in ((one, address), (other, others)):
        if own is not None:
            host.ip("address", "add", own, "dev", name)
        host.ip("link", "set", name, "up")
    return name


def give_default_route(host: Host, address: str) -> None:
    """A network of its own, as for management, by which it would go to the world."""
    name = f"world{next(_links)}"
    host.ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-peer")
    host.ip("address", "add", address, "dev", name)
    for end in (name, f"{name}-peer"):
        host.ip("link", "set", end, "up")
    host.ip("route", "add", "default", "dev", name)
