"""Several ranks as threads of one process, over real gloo: quick enough to try many shapes."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from packcast.packed.ring import Broadcast

T = TypeVar("T")


def run_ranks(
    world_size: int, body: Callable[[int, Broadcast], T], timeout_s: float = 60
) -> list[T]:
    """Run `body(rank, broadcast)` on every rank; results by rank, the first error raised."""
    store = dist.HashStore()
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}
    groups = []  # kept until all have ended: older gloos abort where a peer goes first

    def run(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(
                dist.PrefixStore("ranks", store),
                rank,
                world_size,
                datetime.timedelta(seconds=timeout_s),
            )

            groups.append(group)

            def broadcast(tensor: torch.Tensor, root: int) -> None:
                options = dist.BroadcastOptions()
                options.rootRank, options.rootTensor = root, 0
                group.broadcast([tensor], options).wait()

            results[rank] = body(rank, broadcast)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    if errors:
        raise errors[min(errors)]
    assert len(results) == world_size, "a rank hangs"
    return [results[rank] for rank in range(world_size)]
