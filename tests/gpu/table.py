"""How fast weights that are resident on a GPU reach the others, by every way there is.

GB/s of the weights' bytes, from a common start until the last rank has them; medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from packcast import (
    ReplayReceiver,
    ReplaySender,
    packed_broadcast_consumer,
    packed_broadcast_producer,
)
from packcast.bench.baselines import original_consumer, original_producer

MIB = 1 << 20
GIB = 1 << 30
MAX_COMPARED = 100

Tensors = dict[str, torch.Tensor]
Run = Callable[[], object]


class Bare(Protocol):
    """What can broadcast on the current stream."""

    @property
    def device(self) -> torch.device: ...

    @property
    def rank(self) -> int: ...

    def broadcast(self, tensor: torch.Tensor, src: int) -> None: ...


def shapes(gib: float) -> dict[str, list[tuple[int, ...]]]:
    """Dense layers of 112 and 32 MiB with small ones between, experts of 3 MiB, tiny ones."""
    layer = [(14336, 4096)] * 2 + [(4096, 4096), (4096,), (4096,)]
    count = max(1, round(gib * GIB / sum(2 * math.prod(shape) for shape in layer)))
    if gib < 0.25:
        layer, count = [(1024, 1024), (1024,)], max(1, round(gib * GIB / (2 * MIB)))
    return {
        "dense": layer * count,
        "3 MiB": [(768, 2048)] * max(1, round(gib * GIB / (3 * MIB))),
        "16 KiB": [(8192,)] * max(1, round(min(1, gib) * 40_000)),
    }


def print_table(groups: Mapping[str, tuple[object, Bare]], src: int, gib: float, runs: int) -> None:
    """All ways over all groups, each a library's group and what the original is given."""
    on_rank_0 = dist.get_rank() == 0
    if on_rank_0:
        head = "".join(f"{name:>16}" for name in groups)
        title = f"GB/s, median of {runs}, {dist.get_world_size()} ranks"
        print(f"{title:48s}{head}")
    for kind, dims in shapes(gib).items():
        rates: dict[str, list[float]] = {}
        nbytes = sum(2 * math.prod(shape) for shape in dims)
        for group, bare in groups.values():
            tensors = _make(dims, bare, src)
            for way in WAYS:
                if bare.rank != src:
                    torch._foreach_zero_(list(tensors.values()))
                run = way(tensors, group, bare, src)
                label = (way.__doc__ or "").splitlines()[0]
                rates.setdefault(label, []).append(nbytes / _median(run, bare, runs) / 1e9)
                del run
                if way in LANDING:
                    _check(tensors, bare, src)
                _empty_cache(bare)
            del tensors
            _empty_cache(bare)
        if on_rank_0:
            print(f"{kind}: {len(dims)} tensors, {nbytes / GIB:.2f} GiB")
            for label, each in rates.items():
                print(f"  {label:46s}" + "".join(f"{rate:16.1f}" for rate in each), flush=True)


def compat_borrow(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """compat, 1 GiB x 2, borrowed and dropped"""
    return _compat(tensors, group, bare, src, borrow=True)


def compat_copy(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """compat, 1 GiB x 2, copies dropped"""
    return _compat(tensors, group, bare, src, borrow=False)


def replay_given(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """replay, 64 MiB x 4, into place, given each time"""
    if bare.rank == src:
        sender = ReplaySender(tensors, group, src, buffer_size=64 * MIB, num_buffers=4)
        return lambda: sender.send(tensors)
    receiver = ReplayReceiver(group, src, tensors)
    return lambda: receiver.receive(tensors)


def replay_64(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """replay, 64 MiB x 4, into place, bound"""
    return _replay(tensors, group, bare, src, 64 * MIB, 4)


def replay_128(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """replay, 128 MiB x 4, into place, bound"""
    return _replay(tensors, group, bare, src, 128 * MIB, 4)


def replay_256(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """replay, 256 MiB x 2, into place, bound"""
    return _replay(tensors, group, bare, src, 256 * MIB, 2)


def original(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """the original's algorithm, 1 GiB x 2, dropped"""
    described = _described(tensors)
    if bare.rank == src:
        return lambda: original_producer(
            iter(tensors.items()), bare, src, lambda pair: pair[1], GIB, 2, bare.device
        )
    return lambda: original_consumer(
        iter(described), bare, src, lambda _: None, GIB, 2, bare.device
    )


def one_by_one(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """one broadcast per tensor, into place"""

    def run() -> None:
        for tensor in tensors.values():
            bare.broadcast(tensor, src)

    return run


def raw(tensors: Tensors, group: object, bare: Bare, src: int) -> Run:
    """raw broadcast of as many bytes, 1 GiB per call"""
    nbytes = sum(tensor.numel() * 2 for tensor in tensors.values())
    buffer = torch.empty(min(nbytes, GIB), dtype=torch.uint8, device=bare.device)

    def run() -> None:
        for begin in range(0, nbytes, GIB):
            bare.broadcast(buffer[: min(GIB, nbytes - begin)], src)

    return run


LANDING = (replay_given, replay_64, replay_128, replay_256, one_by_one)
WAYS = (compat_borrow, compat_copy, original, *LANDING, raw)


def _compat(tensors: Tensors, group: object, bare: Bare, src: int, *, borrow: bool) -> Run:
    described = _described(tensors)
    if bare.rank == src:
        return lambda: packed_broadcast_producer(tensors.items(), group, src, lambda pair: pair[1])
    return lambda: packed_broadcast_consumer(described, group, src, lambda _: None, borrow=borrow)


def _replay(
    tensors: Tensors, group: object, bare: Bare, src: int, buffer_size: int, num_buffers: int
) -> Run:
    if bare.rank == src:
        sender = ReplaySender(tensors, group, src, buffer_size=buffer_size, num_buffers=num_buffers)
        sender.bind(tensors)
        return sender.send
    receiver = ReplayReceiver(group, src, tensors)
    receiver.bind(tensors)
    return receiver.receive


def _make(dims: Sequence[tuple[int, ...]], bare: Bare, src: int) -> Tensors:
    """Random weights on the sender, zeros elsewhere."""
    make = torch.randn if bare.rank == src else torch.zeros
    return {
        f"layers.{i}.weight": make(shape, dtype=torch.bfloat16, device=bare.device)
        for i, shape in enumerate(dims)
    }


def _described(tensors: Tensors) -> list[tuple[str, tuple[torch.Size, torch.dtype]]]:
    return [(name, (tensor.shape, tensor.dtype)) for name, tensor in tensors.items()]


def _median(run: Run, bare: Bare, runs: int) -> float:
    """Seconds of the slowest rank, once it is warm."""
    run()
    seconds = []
    for _ in range(runs):
        _synchronize(bare)
        dist.barrier()
        began = time.perf_counter()
        run()
        _synchronize(bare)
        took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        seconds.append(took.item())
    return statistics.median(seconds)


def _check(tensors: Tensors, bare: Bare, src: int) -> None:
    """Some of the weights that are there now, against the sender's."""
    for tensor in list(tensors.values())[:: max(1, len(tensors) // MAX_COMPARED)]:
        sent = tensor.clone()
        bare.broadcast(sent, src)
        assert torch.equal(sent, tensor), "weights differ"


def _synchronize(bare: Bare) -> None:
    if bare.device.type == "cuda":
        torch.cuda.synchronize()


def _empty_cache(bare: Bare) -> None:
    if bare.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
