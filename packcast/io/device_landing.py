"""The consumer's end where bytes stay on the device: copied into tensors, or dropped.

They are proven by sums: only those and trailers come to the host, where a thread compares them
before tensors are given out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import PackcastError, TransferError, as_packcast_error
from packcast.io.digests import BlockDigests
from packcast.io.pool import CLOSE_LIMIT_S
from packcast.io.sinks.tensors import Part
from packcast.io.staging import Buffers
from packcast.packed.counters import Stage
from packcast.packed.lanes import Mark
from packcast.packed.plan import Chunk, num_blocks, trailer_nbytes
from packcast.packed.ring import Slot, host_view
from packcast.packed.sums import SlotSums
from packcast.packed.trailer import SUM_NBYTES, read_trailer, sum_in

_NUM_PAGES = 16  # chunks whose proof may be under way: each is a trailer of host memory


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A chunk that has left its slot, once `mark` has passed; `page` is its trailer and sum."""

    chunk: Chunk
    parts: Sequence[Part]
    page: torch.Tensor
    mark: Mark


class DeviceSink(Protocol):
    """Where bytes go that stay on the device: tensors, or nowhere."""

    @property
    def stage(self) -> Stage:
        """The name under which its work is counted."""

    def parts_of(self, file: int, offset: int, nbytes: int) -> Sequence[Part]:
        """Which tensors' bytes a run holds; the loop's thread."""

    def landed(self, parts: Sequence[Part]) -> None:
        """These are proven, and in the tensors' memory; another thread."""


class DeviceLanding:
    """Takes chunks out of slots into the tensors of `sink`, copying from device to device.

    The root has to send sums (packed/sums.py): they prove the way from its GPU's slot, and the
    file digests are what the root took of the bytes that it read. At most 16 chunks are ahead of
    their proof. A damaged chunk ends it; a `tolerant` one goes on, and has no digests of it.
    Works on a CPU's ring too.
    """

    def __init__(
        self,
        sink: DeviceSink,
        files: Sequence[FileSpec],
        buffers: Buffers,
        *,
        tolerant: bool = False,
    ) -> None:
        self._tolerant = tolerant
        self._digests = BlockDigests([spec.nbytes for spec in files])
        self._sink = sink
        self._files = files
        self._ring = buffers.ring
        self._counters = buffers.ring.counters
        self._tag = buffers.tag
        device = buffers.ring.device
        self._sums = SlotSums(device, buffers.tag, buffers.buffer_size)
        self._ring.drain.wait_for_caller(device)  # the multipliers were made there
        page_nbytes = trailer_nbytes(buffers.buffer_size) + SUM_NBYTES
        pages = [
            torch.empty(page_nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(_NUM_PAGES)
        ]
        self.pinned_nbytes = 0 if self._ring.is_host else len(pages) * page_nbytes
        self._free: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        for page in pages:
            self._free.put(page)
        self._queue: SimpleQueue[_Arrival | None] = SimpleQueue()
        self._failure: PackcastError | None = None
        self._thread = threading.Thread(target=self._work, name="packcast-prove", daemon=True)
        self._thread.start()

    @property
    def device_nbytes(self) -> int:
        """Device memory that the proofs need."""
        return self._sums.nbytes

    @property
    def stage(self) -> Stage:
        """What the loop waits for when it waits here."""
        return self._sink.stage

    def drain(self, chunk: Chunk, slot: Slot) -> None:
        """Give the copies into the tensors to the drain lane, and their proof to the thread."""
        ring = self._ring
        with self._counters.waiting_on(self.stage):
            page = self._free.get()
        if page is None or self._failure is not None:
            raise self._failure or TransferError("the transfer is over")
        with ring.drain:
            ring.drain.wait(slot.arrived)
            begin = ring.drain.mark()
            parts = self._copy_parts(chunk, slot)
            at, nbytes = chunk.trailer_offset, chunk.trailer_nbytes
            page[:nbytes].copy_(slot.memory[at : at + nbytes], non_blocking=True)
            found = self._sums.of(slot.memory, chunk.nbytes).view(1).view(torch.uint8)
            page[nbytes : nbytes + SUM_NBYTES].copy_(found, non_blocking=True)
            slot.drained = mark = ring.drain.mark()
        ring.clock.span(self.stage, chunk.index, chunk.nbytes, begin, mark)
        self._queue.put(_Arrival(chunk, parts, page, mark))
        self._counters.newest = chunk.extents[-1]

    def finish(self) -> None:
        """Block until every chunk is proven and every tensor handed on; raises what went wrong."""
        self._queue.put(None)
        with self._counters.waiting_on(self.stage):
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def digests(self) -> BlockDigests:
        """Of every block that came, once all are through; after `finish`."""
        return self._digests

    def close(self) -> None:
        """End the thread; after a failure what is queued is dropped."""
        self._failure = self._failure or TransferError("the transfer is over")
        self._free.put(None)
        self._queue.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_LIMIT_S)

    def _copy_parts(self, chunk: Chunk, slot: Slot) -> list[Part]:
        parts: list[Part] = []
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        at = 0
        for extent in chunk.extents:
            for part in self._sink.parts_of(extent.file, extent.offset, extent.nbytes):
                parts.append(part)
                if part.nbytes:
                    begin = at + part.begin
                    targets.append(part.growing.data[part.offset : part.offset + part.nbytes])
                    sources.append(slot.memory[begin : begin + part.nbytes])
            at += extent.nbytes
        if targets:
            torch._foreach_copy_(targets, sources)
        return parts

    def _work(self) -> None:
        if self._ring.device.type == "cuda":  # or its first call would make a context on GPU 0
            torch.cuda.set_device(self._ring.device)
        while (arrival := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    arrival.mark.synchronize()
                    self._prove(arrival)
                    self._sink.landed(arrival.parts)
            except Exception as error:
                self._failure = self._failure or as_packcast_error(error, self.stage)
            finally:
                self._free.put(arrival.page)

    def _prove(self, arrival: _Arrival) -> None:
        try:
            digests = self._proven_digests(arrival.chunk, host_view(arrival.page))
        except TransferError:
            if not self._tolerant:
                raise
            return
        self._digests.record([arrival.chunk], digests)

    def _proven_digests(self, chunk: Chunk, page: memoryview) -> bytes:
        blocks = sum(num_blocks(extent.nbytes) for extent in chunk.extents)
        digests = read_trailer(page, self._tag, chunk, blocks)
        found = bytes(page[chunk.trailer_nbytes : chunk.trailer_nbytes + SUM_NBYTES])
        if found != sum_in(page):
            first = chunk.extents[0]
            raise TransferError(
                f"{self._files[first.file].name}: bytes from {first.offset} were damaged on the"
                f" way, chunk {chunk.index}"
            )
        return digests
