"""The order of a chain of ranks and its hops: pure functions over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def chain_order(hosts_by_rank: Sequence[str]) -> list[int]:
    """All ranks in the order of the chain: those of one host adjacent, else by rank."""
    first: dict[str, int] = {}
    for rank, host in enumerate(hosts_by_rank):
        first.setdefault(host, rank)
    return sorted(range(len(hosts_by_rank)), key=lambda rank: (first[hosts_by_rank[rank]], rank))


def neighbours(order: Sequence[int], root: int, rank: int) -> tuple[int | None, int | None]:
    """The ranks before and after `rank` in the chain that begins at `root`; None at its ends."""
    at = order.index(rank)
    before, after = order[at - 1], order[(at + 1) % len(order)]
    return (None if rank == root else before), (None if after == root else after)


def hops_of(order: Sequence[int], roots: Iterable[int]) -> list[tuple[int, int]]:
    """The pairs (upstream, downstream) that chunks of these roots pass, in connecting order.

    Every other hop comes first, so that ranks connect side by side and never wait in a circle.
    """
    num_ranks = len(order)
    if num_ranks == 1:
        return []
    only = set(roots)
    hops = [(rank, order[(at + 1) % num_ranks]) for at, rank in enumerate(order)]
    last = (
        [hops.pop()] if num_ranks % 2 else []
    )  # it shares a rank with the first, also an even one
    return [hop for hop in (*hops[::2], *hops[1::2], *last) if only != {hop[1]}]
