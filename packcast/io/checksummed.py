"""The producer's end where some worker's bytes stay on its device: chunks that carry their sums."""

from __future__ import annotations

from packcast.io.staging import Buffers
from packcast.packed.checksum import SlotChecksums
from packcast.packed.pipeline import Source
from packcast.packed.plan import Chunk
from packcast.packed.ring import Slot
from packcast.packed.trailer import SUM_OFFSET


class ChecksummedSource:
    """A source that adds to each chunk's trailer the sum of the bytes in the slot.

    On the communication stream, right before the broadcast: the next chunk's copies do not wait.
    """

    def __init__(self, source: Source[Chunk], buffers: Buffers) -> None:
        self._source = source
        self._ring = buffers.ring
        self._sums = SlotChecksums(self._ring.device, buffers.tag, buffers.buffer_size)
        self._ring.comm.wait_for_caller(self._ring.device)  # the multipliers were made there

    @property
    def device_nbytes(self) -> int:
        """Device memory that the sums need."""
        return self._sums.nbytes

    def fill(self, chunk: Chunk, slot: Slot) -> None:
        """Give chunk and trailer to the fill stream, and the sum to the one behind it."""
        self._source.fill(chunk, slot)
        self._ring.comm.wait(slot.filled)
        with self._ring.comm:
            self._sums.add(slot, chunk.nbytes, chunk.trailer_offset + SUM_OFFSET)

    def close(self) -> None:
        """End the source's threads."""
        self._source.close()
