"""The ranks of a bench as one of them sees them: who is where, and how they agree.

Every rank makes the same calls in the same order. Knows nothing of cases or weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from packcast.bench.model import SENDER
from packcast.control.channel import Channel
from packcast.errors import PackcastError, error_from_code
from packcast.launch import processgroup
from packcast.launch.processgroup import Group
from packcast.packed.chain import Chain

T = TypeVar("T")


class StepFailed(PackcastError):
    """A step failed on some rank, and all know it; its own error is the cause on that rank.

    `first` is the error of the lowest rank that failed.
    """

    def __init__(self, message: str, first: PackcastError) -> None:
        super().__init__(message)
        self.first = first


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This rank among the others. `hosts` tells for each rank which host it is on, from 0.

    It is what engines call a communicator, too: the library's functions and the original's take it.
    `open_chain` connects this rank to its neighbours in the chains from some roots, under a name of
    their own; gloo only.
    """

    rank: int
    hosts: tuple[int, ...]
    device: torch.device
    group: Group
    channel: Channel
    open_chain: Callable[[Sequence[int], str], Chain]
    _broadcast: Callable[[torch.Tensor, int], None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once, and not for each tensor that is timed. It knows the channel, not the ranks: in a
        # circle with those the group would outlive them.
        channel = self.channel
        broadcast = processgroup.broadcast_over(self.group, lambda: channel.failure)
        object.__setattr__(self, "_broadcast", broadcast)

    @property
    def world_size(self) -> int:
        return len(self.hosts)

    @property
    def is_sender(self) -> bool:
        return self.rank == SENDER

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def on_my_host(self, ranks: Sequence[int]) -> int:
        """How many of `ranks` are on this rank's host."""
        return sum(self.hosts[rank] == self.hosts[self.rank] for rank in ranks)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """In place, ordered after and before the current stream's other work."""
        self._broadcast(tensor, src)

    def share(self, value: object, root: int = SENDER) -> Any:
        """What `root` gives, on all ranks; a value that JSON can carry."""
        data = json.dumps(value).encode() if self.rank == root else b""
        length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        self.broadcast(length, root)
        memory = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == root:
            memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.broadcast(memory, root)
        return value if self.rank == root else json.loads(bytes(memory.cpu().numpy()))

    def gather(self, value: object) -> list[Any]:
        """What each rank gives, by rank."""
        return [self.share(value, rank) for rank in range(self.world_size)]

    def attempt(self, step: Callable[[], T], *kinds: type[Exception]) -> T:
        """Do what any rank may fail at alone; raises StepFailed on all where one has.

        Only `kinds` are failures of this rank alone; by default what a step without collectives
        can raise. In others the ranks wait for each other, so they end the bench.
        """
        alone = kinds or (PackcastError, OSError, RuntimeError, MemoryError)
        done: list[T] = []
        error: Exception | None = None
        try:
            done.append(step())
        except alone as caught:
            error = caught
        failures = {
            rank: (code, text, hint)
            for rank, (code, text, hint) in enumerate(self.gather(_described(error)))
            if text
        }
        if not failures:
            return done[0]
        done.clear()
        lowest = min(failures)
        code, text, hint = failures[lowest]
        same_everywhere = len(set(failures.values())) == 1 and len(failures) == self.world_size
        message = text if same_everywhere else f"rank {lowest}: {text}"
        raise StepFailed(message, error_from_code(code, message, hint)) from error

    def synchronize(self) -> None:
        """Until this rank's device is idle."""
        if self.on_gpu:
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
        if self.on_gpu:
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_device_nbytes(self) -> int:
        """Device memory reserved at most since `release_memory`; 0 on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.on_gpu else 0


def _described(error: Exception | None) -> tuple[int, str, str | None]:
    """Exit code, first line, hint."""
    if error is None:
        return 0, "", None
    if isinstance(error, PackcastError):
        return error.exit_code, error.message.splitlines()[0], error.hint
    lines = str(error).splitlines()
    return PackcastError.exit_code, lines[0] if lines else repr(error), None
