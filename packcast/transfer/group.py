"""The group that carries the chunks: a chain of gloo connections on CPUs, NCCL's group on GPUs.

Knows the control channel only as the source of the true cause when a collective breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C._distributed_c10d import Store

from packcast.control.channel import Channel
from packcast.errors import PackcastError, RendezvousError, TransferError, first_line
from packcast.launch.fitting import NEARLY_FULL_GPU
from packcast.launch.hops import open_hops
from packcast.launch.processgroup import Group, broadcast_over, open_process_group
from packcast.packed.chain import Chain
from packcast.packed.counters import Counters
from packcast.packed.ratelimit import RateLimit
from packcast.packed.ring import Broadcast
from packcast.packed.streams import Completion
from packcast.transfer.offer import Offer

_FAILURE_WAIT_S = 5.0


def open_group(
    offer: Offer,
    store: Store,
    interface: str | None,
    channel: Channel,
    timeout_s: float,
    counters: Counters,
) -> Group | Chain:
    """The group that the offer asks for; all ranks call this, and it waits for them."""
    counters.standing = "connect"
    try:
        if offer.backend == "gloo":
            # No closure: the frames of an error would keep it, and the buffers with it.
            check = channel.check
            hops = open_hops(
                offer.order,
                offer.readers,
                rank=offer.rank,
                store=store,
                timeout_s=timeout_s,
                interface=interface,
                check=check,
            )
            return Chain(*hops, rank=offer.rank, order=offer.order, check=check)
        return open_process_group(
            "nccl",
            rank=offer.rank,
            world_size=offer.world_size,
            store=store,
            device=torch.device(offer.device),
            timeout_s=timeout_s,
            interface=interface,
            check=channel.check,
        )
    except RendezvousError as error:
        raise channel.wait_failure(_FAILURE_WAIT_S) or error from error
    finally:
        counters.standing = None


def warm_up(group: Group | Chain, device: torch.device, channel: Channel) -> None:
    """NCCL's first broadcast takes a quarter of a second: here, while readers fill the staging."""
    if not isinstance(group, Chain) and device.type == "cuda":
        broadcast_over(group, lambda: channel.failure)(torch.zeros(1).to(device), 0)
        torch.cuda.current_stream(device).synchronize()


def broadcast_of(group: Group | Chain, channel: Channel, *, survives: bool) -> Broadcast:
    """The group's broadcast of a chunk, which raises the channel's failure once there is one.

    If the process `survives` a failure, no broadcast is launched after it: see
    `DataPlane._run_dry`.
    """
    if isinstance(group, Chain):
        return group.carry
    broadcast = broadcast_over(group, lambda: channel.failure)
    if not survives:
        return broadcast

    def broadcast_until_failure(tensor: torch.Tensor, root: int) -> None:
        channel.check()
        broadcast(tensor, root)

    return broadcast_until_failure


def limited(
    broadcast: Broadcast, bytes_per_second: float, channel: Channel, counters: Counters
) -> Broadcast:
    """Every chunk waits on the sender until the rate allows it, also one of another root.

    The broadcasts come in one order on all ranks, so other readers wait for the sender here.
    """
    limit = RateLimit(bytes_per_second)

    def pause(seconds: float) -> None:
        counters.standing = "limit"
        if failure := channel.wait_failure(seconds):
            raise failure
        counters.standing = "broadcast"
        counters.num_pauses += 1

    def broadcast_at_rate(tensor: torch.Tensor, root: int) -> Completion | None:
        limit.take(tensor.nbytes, pause)
        return broadcast(tensor, root)

    return broadcast_at_rate


@contextmanager
def cause_named(offer: Offer, channel: Channel, position: Callable[[], str]) -> Iterator[None]:
    """Raise TransferError for torch's own errors, of a collective or a copy."""
    try:
        yield
    except PackcastError:
        raise
    except RuntimeError as error:
        # The control channel often knows the cause a moment later, with the rank's name.
        is_full = offer.device != "cpu" and "out of memory" in str(error)
        raise channel.wait_failure(_FAILURE_WAIT_S) or TransferError(
            f"{offer.backend} failed at {position()}: {first_line(error)}",
            hint=NEARLY_FULL_GPU if is_full else None,
        ) from error
