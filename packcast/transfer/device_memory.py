"""Memory of a rank's device: taken here, or refused with what was asked for and what there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from packcast.errors import TransferError
from packcast.packed.counters import Counters
from packcast.packed.plan import ring_nbytes, slot_nbytes
from packcast.packed.ring import Ring
from packcast.transfer.host_share import check_ring_fits
from packcast.transfer.offer import Offer
from packcast.units import format_buffers, format_size


def make_ring(offer: Offer, counters: Counters) -> Ring:
    """The offered ring on this rank's device, which is the thread's current one from now on."""
    device = torch.device(offer.device)
    with memory_named(offer):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            check_ring_fits(offer)
        return Ring(device, slot_nbytes(offer.buffer_size), offer.num_buffers, counters)


@contextmanager
def memory_named(offer: Offer) -> Iterator[None]:
    """Raise TransferError for torch's own errors, of making the ring or the tables of sums."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, the CPU's is a plain one
        buffers = format_buffers(offer.num_buffers, offer.buffer_size)
        raise TransferError(
            f"{offer.device} is not available, or has no memory for {buffers}{_free(offer)}",
            hint="reduce --buffer-size or --num-buffers on the sender",
        ) from error


def _free(offer: Offer) -> str:
    """What a GPU still has, for a sentence, where it can say so."""
    device = torch.device(offer.device)
    if device.type == "cuda":
        with suppress(RuntimeError):
            free, _ = torch.cuda.mem_get_info(device)
            needed = ring_nbytes(offer.buffer_size, offer.num_buffers)
            return f": they need {format_size(needed)}, and it has {format_size(free)} free"
    return ""
