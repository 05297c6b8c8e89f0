"""The order of a chain of ranks, and how long one takes: pure functions over ranks and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def chain_order(hosts_by_rank: Sequence[str]) -> list[int]:
    """All ranks in the order of the chain: those of one host adjacent, else by rank."""
    first: dict[str, int] = {}
    for rank, host in enumerate(hosts_by_rank):
        first.setdefault(host, rank)
    return sorted(range(len(hosts_by_rank)), key=lambda rank: (first[hosts_by_rank[rank]], rank))


def neighbours(order: Sequence[int], root: int, rank: int) -> tuple[int | None, int | None]:
    """Whom `rank` receives from and whom it passes on to, in the rotation that begins at `root`."""
    place = order.index(rank)
    before, after = order[place - 1], order[(place + 1) % len(order)]
    return (None if rank == root else before), (None if after == root else after)


def hops_of(order: Sequence[int], roots: Iterable[int]) -> list[tuple[int, int]]:
    """The pairs (upstream, downstream) that some chunk passes, in the order to connect them in.

    That order does not make all ranks wait in a circle, nor one after the other.
    """
    num_ranks = len(order)
    if num_ranks == 1:
        return []
    only = set(roots)
    hops = [(rank, order[(place + 1) % num_ranks]) for place, rank in enumerate(order)]
    last = [hops.pop()] if num_ranks % 2 else []  # it meets the first one, which is even too
    return [hop for hop in (*hops[::2], *hops[1::2], *last) if only != {hop[1]}]


def chain_seconds(nbytes: int, piece_nbytes: int, hosts: int, hop_bytes_per_second: float) -> float:
    """How long a chain of `hosts` takes, its root included, where the hops bind."""
    return (nbytes + (hosts - 2) * min(piece_nbytes, nbytes)) / hop_bytes_per_second


def tree_seconds(nbytes: int, hosts: int, hop_bytes_per_second: float) -> float:
    """How long gloo's broadcast takes at least: its root sends everything log2(hosts) times."""
    return nbytes * (hosts - 1).bit_length() / hop_bytes_per_second
