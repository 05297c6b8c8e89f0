"""The ranks of a bench as one of them sees them: who is where, and the group they share.

Knows the process group and devices; nothing of cases or weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from packcast.control.channel import Channel
from packcast.group import processgroup
from packcast.group.processgroup import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """This rank among the others. `hosts` tells for each rank which host it is on, from 0.

    It is what engines call a communicator, too: the library's functions and the original's take it.
    """

    rank: int
    sender: int
    hosts: tuple[int, ...]
    device: torch.device
    group: Group
    channel: Channel
    _broadcast: Callable[[torch.Tensor, int], None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once, and not for each tensor that is timed. It knows the channel, not the team: in a
        # circle with that the group would outlive it.
        channel = self.channel
        broadcast = processgroup.broadcast_over(self.group, lambda: channel.failure)
        object.__setattr__(self, "_broadcast", broadcast)

    @property
    def world_size(self) -> int:
        return len(self.hosts)

    @property
    def is_sender(self) -> bool:
        return self.rank == self.sender

    @property
    def workers(self) -> tuple[int, ...]:
        """Every rank but the sender."""
        return tuple(rank for rank in range(self.world_size) if rank != self.sender)

    @property
    def host(self) -> int:
        """This rank's."""
        return self.hosts[self.rank]

    def on_my_host(self, ranks: Sequence[int]) -> int:
        """How many of `ranks` are on this rank's host."""
        return sum(self.hosts[rank] == self.host for rank in ranks)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """In place, ordered after and before the current stream's other work."""
        self._broadcast(tensor, src)

    def synchronize(self) -> None:
        """Until this rank's device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start_together(self) -> None:
        """Returns on all ranks at about the same moment, with idle devices."""
        self.synchronize()
        token = torch.zeros(1, dtype=torch.uint8, device=self.device)
        for rank in range(self.world_size):  # who has heard from all may begin
            self.broadcast(token, rank)
        self.synchronize()

    def release_memory(self) -> None:
        """Give cached device memory back, and count its peak anew."""
        if self.device.type == "cuda":
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_device_nbytes(self) -> int:
        """Device memory reserved at most since `release_memory`; 0 on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0
