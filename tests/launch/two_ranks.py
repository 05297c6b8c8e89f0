"""Two ranks in two processes, one forked from the other: for programs that tests run.

Imported by a program that has imported torch, but has no thread yet: half the waiting.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packcast.launch.store import connect_store, serve_store
from tests.helpers.commands import Ended, run_warm

if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True)
class OfTwo:
    """This rank, the store that both have, and on rank 0 the process of the other."""

    rank: int
    store: Store
    child: int


def become_two(limit_s: float) -> OfTwo:
    """Fork; both come back, rank 0 in the process that called. The store waits for `limit_s`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        store, port = serve_store("127.0.0.1", limit_s)
        os.write(writer, b"%d\n" % port)
        return OfTwo(0, store, child)
    port = int(os.read(reader, 100))
    return OfTwo(1, connect_store("127.0.0.1", port, limit_s), child)


def run_program(text: str) -> Ended:
    """The program, which has ended well."""
    ran = run_warm(text)
    assert ran.returncode == 0, ran.stderr
    return ran
