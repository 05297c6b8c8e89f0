"""The ranks of a bench as one of them sees them: their hosts, and collectives between them.

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
from packcast.errors import PackcastError, error_from_code, first_line
from packcast.launch import processgroup
from packcast.launch.processgroup import Group
from packcast.packed.chain import Chain
from packcast.units import MIB

T = TypeVar("T")

_WAKING_ROUNDS = 64  # some milliseconds


class StepFailed(PackcastError):
    """A step failed on some rank; raised on all ranks, on that one with the cause.

    `first` is the error of the lowest rank that failed.
    """

    def __init__(self, message: str, first: PackcastError) -> None:
        super().__init__(message)
        self.first = first


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This rank and the others. `hosts` is each rank's host, numbered from 0; `order` the chain's.

    Also the communicator that the library functions and the original's algorithm take.
    `open_chain` makes the chains from some roots, under a unique name; gloo only.
    """

    rank: int
    hosts: tuple[int, ...]
    order: tuple[int, ...]
    device: torch.device
    group: Group
    channel: Channel
    open_chain: Callable[[Sequence[int], str], Chain]
    _broadcast: Callable[[torch.Tensor, int], None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made once, since tensors are timed. It refers to the channel, not to self: with a
        # reference cycle the group would outlive the ranks.
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
        """In place, in order with the current stream's other work."""
        self._broadcast(tensor, src)

    def share(self, value: object, root: int = SENDER) -> Any:
        """The `value` of `root`, which JSON can represent, on all ranks."""
        data = json.dumps(value).encode() if self.rank == root else b""
        length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        self.broadcast(length, root)
        memory = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == root:
            memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.broadcast(memory, root)
        return value if self.rank == root else json.loads(bytes(memory.cpu().numpy()))

    def gather(self, value: object) -> list[Any]:
        """Each rank's value, by rank."""
        return [self.share(value, rank) for rank in range(self.world_size)]

    def attempt(self, step: Callable[[], T], *kinds: type[Exception]) -> T:
        """Run `step`; raises StepFailed on all ranks if it failed on one.

        Only `kinds` are failures of one rank, by default what a step without collectives can raise.
        In other steps ranks wait for each other, so other errors end the bench.
        """
        alone = kinds or (PackcastError, OSError, RuntimeError, MemoryError)
        result: T | None = None
        error: Exception | None = None
        try:
            result = step()
        except alone as caught:
            error = caught
        try:
            failures = {
                rank: tuple(failure)
                for rank, failure in enumerate(self.gather(error and _described(error)))
                if failure
            }
            if failures:
                lowest = min(failures)
                code, text, hint = failures[lowest]
                is_common = len(set(failures.values())) == 1 and len(failures) == self.world_size
                message = text if is_common else f"rank {lowest}: {text}"
                raise StepFailed(message, error_from_code(code, message, hint)) from error
        finally:
            del error  # with its traceback it is a cycle, which would keep the step's memory
        return result  # type: ignore[return-value]  # T may include None

    def synchronize(self) -> None:
        """Wait until this rank's device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def start_together(self) -> None:
        """A barrier: returns on all ranks at about the same moment, with idle devices.

        GPUs first exchange something for a few milliseconds: after a pause, as there is while
        another rank overwrites its targets, a broadcast takes up to 0.7 ms longer, a raw one too.
        """
        self.synchronize()
        num_rounds = _WAKING_ROUNDS if self.on_gpu else 1
        token = torch.zeros(MIB if self.on_gpu else 1, dtype=torch.uint8, device=self.device)
        for _ in range(num_rounds):
            for rank in range(self.world_size):
                self.broadcast(token, rank)
            self.synchronize()

    def release_memory(self) -> None:
        """Free cached device memory, and reset its peak."""
        if self.on_gpu:
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_device_nbytes(self) -> int:
        """Most device memory reserved since `release_memory`; 0 on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.on_gpu else 0


def _described(error: Exception) -> tuple[int, str, str | None]:
    """Exit code, first line, hint."""
    if isinstance(error, PackcastError):
        return error.exit_code, first_line(error), error.hint
    return PackcastError.exit_code, first_line(error), None
