"""The producer's end where some worker's bytes stay on its device: chunks that carry their sums."""

from __future__ import annotations

import torch

from packcast.io.pool import CLOSE_LIMIT_S
from packcast.io.staging import Buffers
from packcast.packed.checksum import SlotChecksums
from packcast.packed.pipeline import Source
from packcast.packed.plan import Chunk
from packcast.packed.ring import Slot
from packcast.packed.streams import Stream, StreamEvent
from packcast.packed.trailer import SUM_NBYTES, SUM_OFFSET


class ChecksummedSource:
    """A source whose chunks carry, in their trailers, the sum of what it put into the slot."""

    def __init__(self, source: Source[Chunk], buffers: Buffers) -> None:
        self._source = source
        device = buffers.ring.device
        self._sums = SlotChecksums(device, buffers.tag, buffers.buffer_size)
        self._stream = Stream(device)  # its own: the next chunk's copies need not wait for the sum
        self._stream.wait_for_caller(device)  # the multipliers were made there
        self._newest: StreamEvent | None = None

    @property
    def device_nbytes(self) -> int:
        """Device memory that the sums need."""
        return self._sums.nbytes

    def fill(self, chunk: Chunk, slot: Slot) -> None:
        """Give chunk and trailer to the fill stream, and the sum to one behind it."""
        self._source.fill(chunk, slot)
        begin = chunk.trailer_offset + SUM_OFFSET
        self._stream.wait(slot.filled)
        with self._stream:
            place = slot.memory[begin : begin + SUM_NBYTES].view(torch.int64)
            place.copy_(self._sums.of(slot.memory, chunk.nbytes).view(1), non_blocking=True)
            slot.filled = self._newest = self._stream.record()

    def close(self) -> None:
        """End the source's threads."""
        try:
            self._source.close()
        finally:
            if self._newest is not None:
                self._newest.passes_within(CLOSE_LIMIT_S)  # it uses the slots' memory
