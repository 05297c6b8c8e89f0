"""One rank of a chain, in a process of its own: `python -m tests.packed.chain_rank CASE RANK`.

It goes through its slots as the loop over the chunks does, and prints its outcome.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from packcast.errors import TransferError
from packcast.launch.hops import open_hops
from packcast.packed.chain import Chain
from packcast.packed.counters import Stage
from packcast.packed.pipeline import run_pipeline
from packcast.packed.ring import Ring, Slot

POISON = 0xEE


@dataclass(frozen=True)
class Case:
    """What all ranks of a chain do."""

    order: list[int]
    chunks: list[tuple[int, int]]  # root, bytes
    num_buffers: int
    piece_nbytes: int
    connections: int = 1
    slow_rank: int | None = None  # sleeps now and then
    lost_rank: int | None = None  # ends in the middle, by the signal or else by an error
    by_signal: int | None = None


@dataclass
class Outcome:
    """The result of one rank."""

    wrong: list[int] = field(default_factory=list)  # chunks that arrived damaged
    sent_nbytes: int = 0
    error: str = ""
    threads_left: int = 0


@dataclass(frozen=True)
class Block:
    """A chunk of the ring that is nothing but bytes."""

    index: int
    root: int
    nbytes: int
    own: None = None

    @property
    def wire_nbytes(self) -> int:
        return self.nbytes


class Content:
    """Source and drain of one rank: fills what it sends and compares what it has."""

    stage: Stage = "verify"

    def __init__(self, case: Case, rank: int, outcome: Outcome) -> None:
        self._case, self._rank, self._outcome = case, rank, outcome
        self._dice = random.Random(rank)

    def fill(self, chunk: Block, slot: Slot) -> None:
        slot.memory[: chunk.nbytes] = content(chunk)

    def drain(self, chunk: Block, slot: Slot) -> None:
        case = self._case
        if self._rank == case.slow_rank:
            time.sleep(self._dice.choice([0.0, 0.0, 0.02]))
        if self._rank == case.lost_rank and chunk.index == len(case.chunks) // 2:
            print("lost", file=sys.stderr, flush=True)
            if case.by_signal is not None:
                os.kill(os.getpid(), case.by_signal)
            raise TransferError("its own error")
        if not torch.equal(slot.memory[: chunk.nbytes], content(chunk)):
            self._outcome.wrong.append(chunk.index)

    def finish(self) -> None:
        """It compares at once."""

    def close(self) -> None:
        """It has no threads."""


def content(chunk: Block) -> torch.Tensor:
    """The bytes of a chunk: random, the same everywhere, with a period that no piece has."""
    generator = torch.Generator().manual_seed(chunk.index)
    period = torch.randint(0, 256, (65521,), dtype=torch.uint8, generator=generator)
    return period.repeat(chunk.nbytes // len(period) + 1)[: chunk.nbytes]


def carry_all(case: Case, rank: int, chain: Chain, outcome: Outcome) -> None:
    def begin(chunk: Block, slot: Slot) -> None:
        slot.memory.fill_(POISON)
        chain.begin(slot.memory[: chunk.nbytes], chunk.root)

    slot_nbytes = max(nbytes for _, nbytes in case.chunks)
    ends = Content(case, rank, outcome)
    run_pipeline(
        [Block(index, *chunk) for index, chunk in enumerate(case.chunks)],
        rank=rank,
        ring=Ring(torch.device("cpu"), slot_nbytes, case.num_buffers),
        broadcast=chain.carry,
        source=ends,
        drain=ends,
        begin=begin,
    )
    outcome.sent_nbytes = chain.sent_nbytes


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def run(path: Path, rank: int) -> Outcome:
    case = Case(**json.loads(path.read_text()))
    outcome = Outcome()
    verdict = path.with_name("verdict")

    def check() -> None:
        if verdict.exists():
            raise TransferError(verdict.read_text())

    store = dist.FileStore(str(path.with_name("store")), len(case.order))
    before = num_threads()
    hops = open_hops(
        case.order,
        {root for root, _ in case.chunks},
        rank=rank,
        store=store,
        timeout_s=60.0,
        interface="lo",
        check=check,
        connections=case.connections,
    )
    chain = Chain(*hops, rank=rank, order=case.order, check=check, piece_nbytes=case.piece_nbytes)
    del hops
    try:
        carry_all(case, rank, chain, outcome)
        store.add("done", 1)  # stay until all ranks have everything
        while store.add("done", 0) < len(case.order):
            time.sleep(0.01)
    except (TransferError, RuntimeError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    chain.close()
    del chain  # and with it the groups
    outcome.threads_left = num_threads() - before
    return outcome


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.alarm(60)
    case_path, own_rank = Path(sys.argv[1]), int(sys.argv[2])
    print(json.dumps(asdict(run(case_path, own_rank))))
