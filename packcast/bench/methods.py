"""What all methods of moving weights have in common: the steps of a run, and its resources."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from packcast.bench.dataset import Dataset
from packcast.bench.model import Case
from packcast.bench.ranks import Ranks
from packcast.errors import PackcastError
from packcast.packed.chain import Chain
from packcast.packed.counters import Counters


class RunFailed(PackcastError):
    """A run that failed on this rank while no other rank waits for it."""


@dataclass(kw_only=True, eq=False)
class MethodRun:
    """One run of one case on one rank, the `turn`-th; `run_id` is unique.

    All ranks call the steps in this order, `close` also after a failure. `counters` are of the data
    path, empty where nothing is counted; `pinned_nbytes` and `sent_nbytes` are set by `run`. A
    method that writes makes `write_folder`. `resources` are released by `close`.
    """

    case: Case
    ranks: Ranks
    data: Dataset
    run_id: str
    turn: int
    nbytes: int
    cold: bool
    write_folder: Path
    counters: Counters = field(default_factory=Counters)
    pinned_nbytes: int = 0
    sent_nbytes: int | None = None
    resources: ExitStack = field(default_factory=ExitStack)

    def prepare(self) -> None:
        """Allocate and open, without a collective. May raise PackcastError on one rank alone."""

    def connect(self) -> None:
        """Collective steps that are not timed."""

    def warm(self) -> None:
        """A first pass, for methods that users call again and again."""

    def poison(self) -> None:
        """Overwrite buffers and targets, so that no earlier bytes pass for received ones."""

    def run(self) -> float | None:
        """The timed part: until the last byte has arrived, or is under way on the device.

        Returns the end, by `time.perf_counter()`, where more is done after it.
        """
        raise NotImplementedError

    def check(self) -> int:
        """How many blocks or tensors differ from the sender's. May be a collective."""
        raise NotImplementedError

    def close(self) -> None:
        """Release everything; idempotent."""
        self.resources.close()

    def open_chain(self, roots: Sequence[int]) -> Chain:
        """All ranks; gloo only. The chain is closed with the method."""
        chain = self.ranks.open_chain(roots, self.run_id)
        self.resources.callback(chain.close)
        return chain

    def time(self) -> float:
        """Warm up and run; returns the seconds from the common start to the end of this rank."""
        self.warm()
        self.poison()
        self.ranks.start_together()
        began = time.perf_counter()
        ended = self.run()
        self.ranks.synchronize()
        return (ended or time.perf_counter()) - began

    @property
    def readers(self) -> tuple[int, ...]:
        """The ranks that read."""
        return self.data.able[: self.case.readers]

    def check_room(self, nbytes: int) -> None:
        """Raise PackcastError unless the device has `nbytes` free.

        A failure during a run would leave the other ranks waiting in a collective.
        """
        device = self.ranks.device
        try:
            if device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(device)
                if nbytes > free:
                    raise torch.OutOfMemoryError
            else:
                torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            text = f"{device} has no room for the buffers, {self.case.buffers}"
            raise PackcastError(text) from error


def fill_with_poison(*tensors: torch.Tensor) -> None:
    """Overwrite tensors with a random byte."""
    byte = random.randrange(256)
    for tensor in tensors:
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(byte)
