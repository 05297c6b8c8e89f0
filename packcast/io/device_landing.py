"""The receiving end whose bytes stay on the device: copied into tensors, or dropped.

Sums verify the bytes: only trailers come to the host, where a thread looks at them before tensors
are delivered.
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
from packcast.io.digests import SEND_AGAIN, BlockDigests
from packcast.io.pool import CLOSE_LIMIT_S
from packcast.io.sinks.planned import PlannedTensors
from packcast.io.sinks.scatter import TABLE_COLUMNS, Scatter
from packcast.io.staging import Buffers
from packcast.packed.checksum import SlotChecksums
from packcast.packed.counters import Stage
from packcast.packed.plan import Chunk, num_blocks, trailer_nbytes
from packcast.packed.ring import Slot, host_view
from packcast.packed.streams import StreamEvent
from packcast.packed.trailer import SUM_OFFSET, has_sum, read_trailer

_MAX_PAGES = 16  # chunks that may wait for their verification
_MIN_PAGES = 2
_PAGES_NBYTES = 16 << 20  # of all pages; a chunk of many tiny tensors needs a large one
_NUMBER_NBYTES = 8


@dataclass(frozen=True, slots=True)
class _Page:
    """Host memory of a chunk that is under way: its trailer as it comes from the device, and the
    table of its copies as that goes there."""

    trailer: torch.Tensor
    table: torch.Tensor

    @staticmethod
    def nbytes(trailer_nbytes: int, table_rows: int) -> int:
        return trailer_nbytes + _NUMBER_NBYTES * TABLE_COLUMNS * table_rows

    @staticmethod
    def of(memory: torch.Tensor, trailer_nbytes: int) -> _Page:
        numbers = memory[trailer_nbytes:].view(torch.int64)
        return _Page(memory[:trailer_nbytes], numbers.view(-1, TABLE_COLUMNS))


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A chunk that has left its slot, with its trailer, once `event` has passed."""

    chunk: Chunk
    page: _Page
    event: StreamEvent


class DeviceSink(Protocol):
    """Where bytes go that stay on the device: tensors, or nowhere."""

    @property
    def stage(self) -> Stage:
        """The name under which its work is counted."""

    def planned(self, chunks: Sequence[Chunk]) -> PlannedTensors | None:
        """Where the chunks' bytes go, on the current stream; None: nowhere."""


class DeviceLanding:
    """Takes chunks out of slots into the tensors of `sink`, copying from device to device.

    The tables of tensors are made here, before any byte moves. The root must send sums
    (packed/checksum.py): they verify the bytes from its GPU's slot on; the file digests are those
    that the root took of the bytes that it read. At most 16 chunks wait for their verification. A
    damaged chunk raises; with `tolerant` it only has no digests. Works on a CPU's ring too, where
    no chain passes the slots on.
    """

    def __init__(
        self,
        sink: DeviceSink,
        files: Sequence[FileSpec],
        chunks: Sequence[Chunk],
        buffers: Buffers,
        *,
        tolerant: bool = False,
    ) -> None:
        self._tolerant = tolerant
        self._digests = BlockDigests([spec.nbytes for spec in files])
        self.stage: Stage = sink.stage  # what the loop waits for when it waits here
        self._files = files
        self._ring = ring = buffers.ring
        self._counters = ring.counters
        self._tag = buffers.tag
        with ring.drain:
            planned = sink.planned(chunks)
        self._scatter = None if planned is None else Scatter(planned, ring.device)
        self._sums = SlotChecksums(ring.device, buffers.tag, buffers.buffer_size, subtract=True)
        ring.drain.wait_for_caller(ring.device)  # tables and multipliers were made there
        self._free: SimpleQueue[_Page | None] = SimpleQueue()
        self.pinned_nbytes = self._make_pages(trailer_nbytes(buffers.buffer_size))
        self._queue: SimpleQueue[_Arrival | None] = SimpleQueue()
        self._failure: PackcastError | None = None
        self._is_finished = False
        self._thread = threading.Thread(target=self._work, name="packcast-verify", daemon=True)
        self._thread.start()

    @property
    def device_nbytes(self) -> int:
        """Device memory that the copies and sums need."""
        tables = 0 if self._scatter is None else self._scatter.device_nbytes
        return tables + self._sums.nbytes

    def _make_pages(self, trailer_nbytes: int) -> int:
        """Make the pages, in one piece; returns how many bytes of it are pinned."""
        table_rows = 0 if self._scatter is None else self._scatter.table_rows
        nbytes = _Page.nbytes(trailer_nbytes, table_rows)
        count = min(_MAX_PAGES, max(_MIN_PAGES, _PAGES_NBYTES // nbytes))
        memory = torch.empty(count * nbytes, dtype=torch.uint8, pin_memory=not self._ring.is_host)
        for page in memory.split(nbytes):
            self._free.put(_Page.of(page, trailer_nbytes))
        return 0 if self._ring.is_host else memory.nbytes

    def drain(self, chunk: Chunk, slot: Slot) -> None:
        """Give the copies to the drain stream, and their verification to the thread."""
        ring = self._ring
        with self._counters.waiting_on(self.stage):
            page = self._free.get()
        if page is None or self._failure is not None:
            raise self._failure or TransferError("the transfer is over")
        with ring.drain:
            ring.drain.wait(slot.arrived)
            begin = ring.drain.record()
            if self._scatter is not None:
                self._scatter.copy(chunk.index, slot.memory, page.table)
            at = chunk.trailer_offset
            self._sums.add(slot, chunk.nbytes, at + SUM_OFFSET)
            page.trailer.copy_(slot.view(at, chunk.trailer_nbytes), non_blocking=True)
            slot.drained = event = ring.drain.record()
        ring.clock.span(self.stage, chunk.index, chunk.nbytes, begin, event)
        self._queue.put(_Arrival(chunk, page, event))
        self._counters.newest = chunk.extents[-1]

    def finish(self) -> None:
        """Block until every chunk is verified and every tensor passed on; raises the failure."""
        self._queue.put(None)
        with self._counters.waiting_on(self.stage):
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        self._is_finished = True

    def digests(self) -> BlockDigests:
        """Of every block that came, once all are through; after `finish`."""
        return self._digests

    def close(self) -> None:
        """End the thread; after a failure queued chunks are dropped."""
        self._failure = self._failure or TransferError("the transfer is over")
        self._free.put(None)
        self._queue.put(None)
        if self._scatter is not None and not self._is_finished:
            self._scatter.give_up(self._ring.drain)
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_LIMIT_S)

    def _work(self) -> None:
        if self._ring.device.type == "cuda":  # or its first call would make a context on GPU 0
            torch.cuda.set_device(self._ring.device)
        while (arrival := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    arrival.event.synchronize()
                    self._verify(arrival)
                    if self._scatter is not None:
                        self._scatter.landed(arrival.chunk.index)
            except Exception as error:
                self._failure = self._failure or as_packcast_error(error, self.stage)
            finally:
                self._free.put(arrival.page)

    def _verify(self, arrival: _Arrival) -> None:
        try:
            digests = self._verified_digests(arrival.chunk, arrival.page)
        except TransferError:
            if not self._tolerant:
                raise
            return
        self._digests.record([arrival.chunk], digests)

    def _verified_digests(self, chunk: Chunk, page: _Page) -> bytes:
        blocks = sum(num_blocks(extent.nbytes) for extent in chunk.extents)
        trailer = host_view(page.trailer)
        digests = read_trailer(trailer, self._tag, chunk, blocks)
        if has_sum(trailer):  # its own was subtracted from the root's
            first = chunk.extents[0]
            raise TransferError(
                f"{self._files[first.file].name}: bytes from {first.offset} were damaged in"
                f" transit, chunk {chunk.index}",
                hint=SEND_AGAIN,
            )
        return digests
