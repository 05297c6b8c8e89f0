"""The hops of a chain whose ranks are threads of one process."""

from __future__ import annotations

import threading

import torch.distributed as dist

from packcast.launch.hops import open_hops
from packcast.packed.chain import Hop

Ends = tuple[Hop | None, Hop | None]


def open_all(order: list[int], roots: list[int], connections: int = 1) -> list[Ends]:
    """Those of all ranks, each in a thread of its own."""
    store = dist.HashStore()
    ends: dict[int, Ends] = {}

    def open_own(rank: int) -> None:
        ends[rank] = open_hops(
            order,
            roots,
            rank=rank,
            store=store,
            timeout_s=20.0,
            interface="lo",
            check=lambda: None,
            connections=connections,
        )

    threads = [threading.Thread(target=open_own, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [ends[rank] for rank in sorted(order)]


def open_pair(connections: int = 1) -> tuple[Hop, Hop]:
    """The two ends of the hop from rank 0 to rank 1: that upstream, that downstream."""
    (_, after), (before, _) = open_all([0, 1], [0], connections)
    assert after is not None
    assert before is not None
    return after, before
