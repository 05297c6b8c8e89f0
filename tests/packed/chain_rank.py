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
from packcast.packed.chain import Chain, ChunkSent

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
    lost_rank: int | None = None  # has an end in the middle, by the signal, or else by an error
    by_signal: int | None = None

    @property
    def slot_nbytes(self) -> int:
        return max(nbytes for _, nbytes in self.chunks)


@dataclass
class Outcome:
    """What one of them has to say."""

    wrong: list[int] = field(default_factory=list)  # chunks that came otherwise than they left
    sent_nbytes: int = 0
    error: str = ""
    threads_left: int = 0


class Ring:
    """The slots, poisoned before each use, and how far they are begun."""

    def __init__(self, case: Case, rank: int, chain: Chain) -> None:
        self._case, self._rank, self._chain = case, rank, chain
        self._slots = torch.full((case.num_buffers, case.slot_nbytes), POISON, dtype=torch.uint8)
        self._events: list[ChunkSent | None] = [None] * case.num_buffers
        self._begun = 0

    def begin_until(self, index: int) -> None:
        """Begin this chunk, waiting for its slot, and those after it whose slots are free now."""
        case = self._case
        ahead = max(1, case.num_buffers - 1)
        while self._begun < min(index + ahead, len(case.chunks)):
            event = self._events[self._begun % case.num_buffers]
            if event is not None:
                if self._begun > index and not event.passed():
                    return
                event.synchronize()
            memory = self.memory(self._begun)
            root = case.chunks[self._begun][0]
            memory.fill_(POISON)
            if root == self._rank:
                memory.copy_(content(self._begun, memory.numel()))
            self._chain.begin(memory, root)
            self._begun += 1

    def carry(self, index: int) -> torch.Tensor:
        memory = self.memory(index)
        event = self._chain.carry(memory, self._case.chunks[index][0])
        self._events[index % self._case.num_buffers] = event
        return memory

    def finish(self) -> None:
        for event in self._events:
            if event is not None:
                event.synchronize()

    def memory(self, index: int) -> torch.Tensor:
        return self._slots[index % self._case.num_buffers, : self._case.chunks[index][1]]


def content(index: int, nbytes: int) -> torch.Tensor:
    """The bytes of a chunk: random, the same everywhere, with a period that no piece has."""
    generator = torch.Generator().manual_seed(index)
    period = torch.randint(0, 256, (65521,), dtype=torch.uint8, generator=generator)
    return period.repeat(nbytes // len(period) + 1)[:nbytes]


def carry_all(case: Case, rank: int, chain: Chain, outcome: Outcome) -> None:
    ring = Ring(case, rank, chain)
    dice = random.Random(rank)
    for index in range(len(case.chunks)):
        ring.begin_until(index)
        if rank == case.slow_rank:
            time.sleep(dice.choice([0.0, 0.0, 0.02]))
        if rank == case.lost_rank and index == len(case.chunks) // 2:
            print("lost", file=sys.stderr, flush=True)
            if case.by_signal is not None:
                os.kill(os.getpid(), case.by_signal)
            raise TransferError("its own error")
        if not torch.equal(ring.carry(index), content(index, case.chunks[index][1])):
            outcome.wrong.append(index)
    ring.finish()
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
        store.add("done", 1)  # nobody goes before all have everything
        while store.add("done", 0) < len(case.order):
            time.sleep(0.01)
    except (TransferError, RuntimeError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    chain.close()
    # The groups end with the chain, whose slots are freed here too: with nothing under way there.
    del chain
    outcome.threads_left = num_threads() - before
    return outcome


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.alarm(60)
    case_path, own_rank = Path(sys.argv[1]), int(sys.argv[2])
    print(json.dumps(asdict(run(case_path, own_rank))))
