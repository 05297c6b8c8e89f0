"""Chunk after chunk over gloo and nothing else: along a chain of ranks, or by gloo's broadcast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from packcast.bench.check import sums_of, wrong_tensors
from packcast.bench.methods import Job, MethodRun, check_room, fill_with_poison
from packcast.bench.model import SENDER
from packcast.packed.chain import Chain, ChunkSent
from packcast.packed.tensor_bytes import as_bytes


class ChunksMethod(MethodRun):
    """The bytes of the resident weights, laid one after the other, in calls of the buffer size."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._truth: list[int] = []

    def prepare(self) -> None:
        resident = self.job.data.resident.values()
        nbytes = sum(tensor.nbytes for tensor in resident)
        check_room(self.job, nbytes)
        self._memory = torch.empty(nbytes, dtype=torch.uint8)
        at = 0
        for tensor in resident:
            self._memory[at : at + tensor.nbytes] = as_bytes("", tensor, tensor.device)
            at += tensor.nbytes

    def connect(self) -> None:
        ranks = self.job.ranks
        self._truth = ranks.share(sums_of(self._chunks()) if ranks.is_sender else None)

    def poison(self) -> None:
        if not self.job.ranks.is_sender:
            fill_with_poison(self._memory)

    def check(self) -> int:
        return wrong_tensors(sums_of(self._chunks()), self._truth)

    def close(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _chunks(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._memory.split(self.job.case.buffer_size))


class GlooBroadcastMethod(ChunksMethod):
    """gloo's own broadcast of each chunk: a tree, whose root sends all of it log2(N) times."""

    def run(self) -> None:
        for chunk in self._chunks():
            self.job.ranks.broadcast(chunk, SENDER)


class ChainMethod(ChunksMethod):
    """Each rank passes on what it receives, so that nobody sends the weights more than once."""

    _chain: Chain | None = None

    def connect(self) -> None:
        super().connect()
        self._chain = self.job.ranks.open_chain((SENDER,), self.job.run_id)

    def run(self) -> None:
        assert self._chain is not None, "connect comes first"
        calls = [(chunk, SENDER) for chunk in self._chunks()]
        carry_all(self._chain, calls, self.job.case.num_buffers)
        self.sent_nbytes = self._chain.sent_nbytes

    def close(self) -> None:
        if self._chain is not None:
            self._chain.close()
            self._chain = None
        super().close()


def carry_all(chain: Chain, calls: Sequence[tuple[torch.Tensor, int]], num_buffers: int) -> None:
    """Each memory from its root along the chain; call i + num_buffers may use that of call i."""
    passing: list[ChunkSent] = []
    begun, ahead = 0, max(1, num_buffers - 1)
    for i, (memory, root) in enumerate(calls):
        while begun < min(i + ahead, len(calls)):
            if begun >= num_buffers:
                passing[begun - num_buffers].synchronize()
            chain.begin(*calls[begun])
            begun += 1
        passing.append(chain.carry(memory, root))
    for event in passing[-num_buffers:]:
        event.synchronize()
