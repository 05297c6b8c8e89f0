"""The producer's end where some worker's bytes stay on its device: chunks that carry their sums."""

from __future__ import annotations

import torch

from packcast.ends.staging import Buffers
from packcast.packed.pipeline import Source
from packcast.packed.plan import Chunk
from packcast.packed.ring import Slot
from packcast.packed.sums import SlotSums
from packcast.packed.trailer import SUM_NBYTES, SUM_OFFSET


class Summed:
    """A source whose chunks carry, in their trailers, the sum of what it put into the slot."""

    def __init__(self, source: Source[Chunk], buffers: Buffers) -> None:
        self._source = source
        self._ring = buffers.ring
        self._sums = SlotSums(buffers.ring.device, buffers.tag, buffers.buffer_size)
        self._ring.fill.wait_for_caller(buffers.ring.device)  # the multipliers were made there

    def fill(self, chunk: Chunk, slot: Slot) -> None:
        """Give chunk, trailer and sum to the fill lane."""
        self._source.fill(chunk, slot)
        begin = chunk.trailer_offset + SUM_OFFSET
        with self._ring.fill:
            place = slot.memory[begin : begin + SUM_NBYTES].view(torch.int64)
            place.copy_(self._sums.of(slot.memory, chunk.nbytes).view(1), non_blocking=True)
            slot.filled = self._ring.fill.mark()

    def close(self) -> None:
        """End the source's threads."""
        self._source.close()
