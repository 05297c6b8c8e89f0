"""GO: the sender's word that all ranks are ready, and where they meet for the process group.

From another process, so checked field by field before anything uses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from packcast.errors import TransferError

_HOST = re.compile(r"[0-9A-Za-z.:%_-]{1,255}")  # a name or an address, IPv6 with its scope
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Go:
    """Where the sender serves a store, and whether chunks carry sums."""

    host: str
    port: int
    sums: bool

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; the inverse of `from_json`."""
        return {"kind": "GO", "host": self.host, "port": self.port, "sums": self.sums}

    @staticmethod
    def from_json(message: Mapping[str, object]) -> Go:
        """Check a GO, which may be hostile; TransferError says what is wrong."""
        host, port, sums = (message.get(name) for name in ("host", "port", "sums"))
        if not isinstance(host, str) or not _HOST.fullmatch(host):
            raise _refused("its host is no name or address")
        if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= _MAX_PORT:
            raise _refused(f"its port is no number from 1 to {_MAX_PORT}")
        if not isinstance(sums, bool):
            raise _refused("its sums is neither true nor false")
        return Go(host, port, sums)


def _refused(why: str) -> TransferError:
    return TransferError(f"the sender's GO is refused: {why}")
