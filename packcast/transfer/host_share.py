"""A rank's share of its host's memory and processors. Allocates and starts nothing."""

from __future__ import annotations

import os

from packcast.errors import TransferError
from packcast.io.memory import available_nbytes, memory_limits
from packcast.packed.plan import ring_nbytes
from packcast.transfer.offer import Offer
from packcast.units import format_buffers, format_size

_KEPT_PROCESSORS = 2  # of a rank's share: for its loop, and for verification on a GPU
_MAX_IO_THREADS = 24  # more do not pay, with a GPU's link as the limit


def staging_bound(offer: Offer, num_ends: int = 1) -> int:
    """The offered staging, for each of a rank's ends; or less: a rank pins at most its share of
    half the free memory."""
    available = available_nbytes()
    if available is None:
        return offer.staging
    return min(offer.staging, available // 2 // offer.assignment.ranks_on_host // num_ends)


def check_ring_fits(offer: Offer) -> None:
    """Raise TransferError where the offered ring, on a CPU, is more than this host has left now.

    The sender has asked before, but others may have taken it since. What a kernel gives without
    having it, it takes back by killing.
    """
    needed = ring_nbytes(offer.buffer_size, offer.num_buffers)
    for limit in memory_limits():
        if needed > limit.free:
            raise TransferError(
                f"no memory for {format_buffers(offer.num_buffers, offer.buffer_size)}: they need"
                f" {format_size(needed)}, and {limit.name} leaves {format_size(limit.free)}",
                hint="reduce --buffer-size or --num-buffers on the sender, or raise that limit",
            )


def num_io_threads(sharing: int) -> int:
    """How many I/O threads this rank has, if `sharing` ranks of the host do I/O.

    Its share of the processors, less those that its own threads keep busy; at least two.
    """
    share = len(os.sched_getaffinity(0)) // sharing
    return max(2, min(_MAX_IO_THREADS, share - _KEPT_PROCESSORS))
