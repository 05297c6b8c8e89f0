"""Two ranks in two processes, one forked from the other: for programs that tests run.

Imported by a program that has imported torch, but has no thread yet: half the waiting.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packcast.group.store import connect_store, serve_store

if TYPE_CHECKING:
    from torch.distributed import Store

_REPOSITORY = Path(__file__).parents[2]


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


def run_program(text: str) -> subprocess.CompletedProcess[str]:
    """The program, which has ended well."""
    ran = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": str(_REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return ran
