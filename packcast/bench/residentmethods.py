"""Methods for resident weights: a replay, a broadcast for each tensor, and plain chunks over gloo.

They end in the workers' own tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from packcast.bench.check import sums_of, wrong_tensors
from packcast.bench.methods import MethodRun, fill_with_poison
from packcast.bench.model import SENDER
from packcast.errors import PackcastError
from packcast.packed.chain import Chain, ChunkSent
from packcast.packed.counters import counting
from packcast.packed.layout import check_plan
from packcast.packed.replay import ReplayReceiver, ReplaySender
from packcast.packed.tensor_bytes import as_bytes


class ResidentMethod(MethodRun):
    """Into the tensors of `self.data.resident`."""

    def poison(self) -> None:
        if not self.ranks.is_sender:
            fill_with_poison(*self.data.resident.values())

    def check(self) -> int:
        data = self.data
        if self.ranks.is_sender:
            return 0
        sums = sums_of(data.resident[spec.name] for spec in data.specs)
        return wrong_tensors(sums, data.sums["resident"])


class ReplayMethod(ResidentMethod):
    """A sender and receiver that repeat one plan."""

    _pair: ReplaySender | ReplayReceiver

    def prepare(self) -> None:
        case = self.case
        try:
            check_plan(self.data.specs, case.buffer_size, case.num_buffers)
        except ValueError as error:
            raise PackcastError(str(error)) from error
        self.check_room(case.buffer_size * case.num_buffers)

    def connect(self) -> None:
        """Make the pair, which compares plans, and bind the tensors as a trainer does."""
        ranks, case, resident = self.ranks, self.case, self.data.resident
        if ranks.is_sender:
            self._pair = ReplaySender(
                resident, ranks, SENDER, buffer_size=case.buffer_size, num_buffers=case.num_buffers
            )
        else:
            self._pair = ReplayReceiver(ranks, SENDER, resident)
        self._pair.bind(resident)

    def warm(self) -> None:
        """The first pass prepares all later ones; the second is counted."""
        self.run()
        with counting(self.counters):
            self.run()

    def run(self) -> None:
        if isinstance(self._pair, ReplaySender):
            self._pair.send()
        else:
            self._pair.receive()


class PerTensorMethod(ResidentMethod):
    """One broadcast for each tensor, as bytes: not every backend carries every dtype."""

    def warm(self) -> None:
        self.run()

    def run(self) -> None:
        for tensor in self.data.resident.values():
            if tensor.numel():
                self.ranks.broadcast(tensor.view(-1).view(torch.uint8), SENDER)


class GlooBroadcastMethod(MethodRun):
    """gloo's broadcast of chunks of the buffer size: a tree, whose root sends log2(N) copies."""

    _chunks: tuple[torch.Tensor, ...] = ()
    _sums: Sequence[int] = ()

    def prepare(self) -> None:
        """The weights one after the other."""
        resident = self.data.resident.values()
        self.check_room(sum(tensor.nbytes for tensor in resident))
        memory = torch.cat([as_bytes("", tensor, tensor.device) for tensor in resident])
        self._chunks = memory.split(self.case.buffer_size)

    def connect(self) -> None:
        ranks = self.ranks
        self._sums = ranks.share(sums_of(self._chunks) if ranks.is_sender else None)

    def poison(self) -> None:
        if not self.ranks.is_sender:
            fill_with_poison(*self._chunks)

    def run(self) -> None:
        for chunk in self._chunks:
            self.ranks.broadcast(chunk, SENDER)

    def check(self) -> int:
        return wrong_tensors(sums_of(self._chunks), self._sums)


class ChainMethod(GlooBroadcastMethod):
    """The same chunks along a chain: each rank passes on what it receives, and sends it once."""

    _chain: Chain

    def connect(self) -> None:
        super().connect()
        self._chain = self.open_chain((SENDER,))

    def run(self) -> None:
        calls = [(chunk, SENDER) for chunk in self._chunks]
        carry_all(self._chain, calls, self.case.num_buffers)
        self.sent_nbytes = self._chain.sent_nbytes


def carry_all(chain: Chain, calls: Sequence[tuple[torch.Tensor, int]], num_buffers: int) -> None:
    """Each memory from its root along the chain; call i + num_buffers may reuse call i's memory."""
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
