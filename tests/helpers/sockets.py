"""The sockets on which processes listen, as in `ss -ltnp`, and one that takes no connection."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Listening:
    """A socket on which a process takes connections."""

    pid: int
    address: str
    port: int


@contextmanager
def full_listener() -> Iterator[int]:
    """The port of a socket on 127.0.0.1 that listens, but answers no further connection."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def listening(pids: Iterable[int]) -> set[Listening]:
    """The TCP sockets on which these processes listen; those that have ended have none."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            held = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
            found |= {
                Listening(pid, address, port)
                for inode, address, port in _table(pid)
                if f"socket:[{inode}]" in held
            }
    return found


def _table(pid: int) -> Iterator[tuple[str, str, int]]:
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTEN:
                address, _, port = local.partition(":")
                yield inode, _address(address), int(port, 16)


def _address(digits: str) -> str:
    words = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    packed = struct.pack(f"={len(words)}I", *words)  # each word is in the host's order
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
