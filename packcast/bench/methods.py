"""What every way of moving weights has in common: made, started together, checked, let go."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import torch

from packcast.bench.dataset import Dataset
from packcast.bench.model import Case
from packcast.bench.ranks import Ranks
from packcast.errors import PackcastError
from packcast.packed.counters import Counters


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of one case on one rank, the `turn`-th. `run_id` is unique."""

    case: Case
    ranks: Ranks
    data: Dataset
    run_id: str
    turn: int
    nbytes: int
    cold: bool

    @property
    def readers(self) -> tuple[int, ...]:
        """The ranks that read."""
        return self.data.able[: self.case.readers]


class RunFailed(PackcastError):
    """A run that failed on this rank without leaving another one waiting for it."""


@dataclass(slots=True)
class MethodRun:
    """One run of one method. All ranks call the same, in this order; close also after a failure.

    `counters` are of the data path, empty where nothing is counted; `pinned_nbytes` and
    `sent_nbytes` are known once it has run.
    """

    job: Job
    counters: Counters = field(default_factory=Counters)
    pinned_nbytes: int = 0
    sent_nbytes: int | None = None

    def prepare(self) -> None:
        """Allocate, open, reserve: alone, without a collective. May raise PackcastError."""

    def connect(self) -> None:
        """What takes all ranks but is no part of the run, as agreeing on a plan."""

    def warm(self) -> None:
        """A first pass, where in use many follow; all ranks are connected."""

    def poison(self) -> None:
        """Leave nothing in buffers and targets that could pass for what is to come."""

    def run(self) -> float | None:
        """The timed part: ends when the last byte is where it belongs, or is under way on the
        device. Where more is done after that, it returns the moment, by `time.perf_counter()`."""
        raise NotImplementedError

    def check(self) -> int:
        """How many blocks or tensors are not the sender's; may take all ranks."""
        raise NotImplementedError

    def close(self) -> None:
        """Give everything back; idempotent."""


def time_run(method: MethodRun, ranks: Ranks) -> float:
    """Seconds from the common start until this rank is done."""
    method.warm()
    method.poison()
    ranks.start_together()
    began = time.perf_counter()
    ended = method.run()
    ranks.synchronize()
    return (ended or time.perf_counter()) - began


def fill_with_poison(*tensors: torch.Tensor) -> None:
    """Overwrite tensors with a byte that nobody sends on purpose: another one each time."""
    byte = random.randrange(256)
    for tensor in tensors:
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(byte)


def check_room(job: Job, nbytes: int) -> None:
    """Raise PackcastError unless the device could hold so much more now.

    In the middle of a run it would be too late: the others would be left in a collective.
    """
    device = job.ranks.device
    try:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if nbytes > free:
                raise torch.OutOfMemoryError
        else:
            torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise PackcastError(f"{device} has no room for the buffers, {job.case.buffers}") from error
