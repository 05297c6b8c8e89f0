"""The data phase on one rank: buffers, made before READY, then the loop over the chunks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from torch._C._distributed_c10d import Store

from packcast.control.channel import Channel
from packcast.control.frames import Progress
from packcast.errors import PackcastError, TransferError
from packcast.io.checksummed import ChecksummedSource
from packcast.io.device_landing import DeviceLanding
from packcast.io.landing import Landing, Sink
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.tensors import TensorSink
from packcast.io.source import FileReader, FileSource
from packcast.io.staging import Buffers
from packcast.launch.processgroup import Group, begin_abort, begin_close, broadcast_over
from packcast.packed.chain import Chain
from packcast.packed.counters import Counters
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import Chunk
from packcast.packed.ring import Slot
from packcast.packed.trailer import transfer_tag
from packcast.transfer.device_memory import make_ring, memory_named
from packcast.transfer.group import broadcast_of, cause_named, limited, open_group, warm_up
from packcast.transfer.host_share import num_io_threads, staging_bound
from packcast.transfer.offer import Offer
from packcast.units import format_size
from packcast.view import Snapshot, WorkerState

# Backstops: the control channel notices lost ranks earlier, the stall watch everything else. But
# a group that is left behind in a library's process ends by this timeout.
_GROUP_TIMEOUT_BEYOND_STALL_S = 60.0
_CLOSE_LIMIT_S = 15.0
_ABORT_LIMIT_S = 2.0
# For broadcasts that need the other ranks; longer than it takes to notice a lost one.
_DRY_PATIENCE_S = 4.0

_left_behind: list[DataPlane] = []  # failed ones, with a collective that would not end


@dataclass(frozen=True, slots=True)
class DataPhaseResult:
    """The result of the data phase on this rank.

    `began` and `ended` are by `time.perf_counter()`; at the end the last byte has arrived and the
    buffers are still allocated. The memory is packcast's own, not that of the whole process.
    """

    counters: Counters  # which go on after it
    began: float
    ended: float
    digests: list[str] | None  # of every file, if this rank saw every block
    peak_device_nbytes: int
    pinned_nbytes: int


class DataPlane:
    """This rank's buffers and threads, made from an offer; a reader reads from `read_ahead` on.

    `survives`: the process goes on after a failure. `tolerant`: damaged blocks are counted.
    """

    def __init__(
        self,
        offer: Offer,
        chunks: Sequence[Chunk],
        channel: Channel,
        transfer_id: str,
        *,
        reader: FileReader | None,
        sink: Sink | None,
        survives: bool = False,
        tolerant: bool = False,
    ) -> None:
        self.counters = Counters()
        self._offer = offer
        self._chunks = chunks
        self._channel = channel
        self._sink = sink
        self._device = torch.device(offer.device)
        self._survives = survives and self._device.type == "cuda"
        self._is_moved = False
        self._outside = threading.Event()  # of the loop
        self._outside.set()
        self._group: Group | Chain | None = None
        self._ring = make_ring(offer, self.counters)
        staged = (reader is not None) + (sink is not None and not self._stays_on_device(sink))
        self._buffers = Buffers(
            self._ring,
            offer.buffer_size,
            staging_nbytes=staging_bound(offer, max(1, staged)),
            tag=transfer_tag(transfer_id),
        )
        self._landing: Landing | DeviceLanding | None = None
        self._source: FileSource | None = None
        self._checksummed: ChecksummedSource | None = None
        try:
            if sink is not None:
                self._landing = self._make_landing(sink, tolerant=tolerant)
            if reader is not None:
                mine = [chunk for chunk in chunks if chunk.root == offer.rank]
                num_threads = num_io_threads(offer.assignment.readers_on_host)
                self._source = FileSource(mine, reader, self._buffers, num_threads=num_threads)
        except BaseException:
            self.close()
            raise

    def _make_landing(self, sink: Sink, *, tolerant: bool) -> Landing | DeviceLanding:
        offer, buffers = self._offer, self._buffers
        if self._stays_on_device(sink):
            with memory_named(self._offer):
                return DeviceLanding(sink, offer.files, self._chunks, buffers, tolerant=tolerant)
        return Landing(
            self._chunks,
            sink,
            offer.files,
            buffers,
            num_threads=num_io_threads(offer.assignment.ranks_on_host),
            tolerant=tolerant,
        )

    def _stays_on_device(self, sink: Sink) -> TypeGuard[TensorSink | DiscardSink]:
        return self._device.type == "cuda" and isinstance(sink, (TensorSink, DiscardSink))

    @property
    def needs_sums(self) -> bool:
        """Whether the roots have to prove their chunks by sums on the device."""
        return isinstance(self._landing, DeviceLanding)

    def move(
        self,
        store: Store,
        interface: str | None,
        *,
        stall_timeout_s: float,
        sums: bool,
        max_rate: float | None = None,
    ) -> DataPhaseResult:
        """Make the process group and send or receive every chunk. All ranks.

        `sums`: some rank needs them, the same on all ranks. `max_rate`, in bytes per second, on
        the sender.
        """
        timeout_s = stall_timeout_s + _GROUP_TIMEOUT_BEYOND_STALL_S
        try:
            if sums:
                self.prove_by_sums()
            self._group = open_group(
                self._offer, store, interface, self._channel, timeout_s, self.counters
            )
            with cause_named(self._offer, self._channel, self.position):
                warm_up(self._group, self._device, self._channel)
        except PackcastError:
            self.close()
            raise
        self._channel.be_patient(0.0)  # what may hold the interpreter for long is over
        return self.run(self._group, max_rate)

    def prove_by_sums(self) -> None:
        """Before `run`, on all ranks, if some rank needs sums of what the roots send."""
        if self._source is not None:
            with memory_named(self._offer):
                self._checksummed = ChecksummedSource(self._source, self._buffers)

    def run(self, group: Group | Chain, max_rate: float | None = None) -> DataPhaseResult:
        """Send or receive every chunk over an open group. All ranks, once per DataPlane."""
        self._group = group
        broadcast = broadcast_of(group, self._channel, survives=self._survives)
        if max_rate is not None:
            broadcast = limited(broadcast, max_rate, self._channel, self.counters)
        self._outside.clear()
        began = time.perf_counter()
        try:
            with cause_named(self._offer, self._channel, self.position):
                try:
                    ended = run_pipeline(
                        self._chunks,
                        rank=self._offer.rank,
                        ring=self._ring,
                        broadcast=broadcast,
                        source=self._checksummed or self._source,
                        drain=self._landing,
                        begin=partial(self._begin, group),
                        on_failure=partial(self._run_dry, group) if self._survives else None,
                    )
                finally:
                    self._outside.set()
        except BaseException as error:
            if isinstance(group, Chain):
                # Closing a chain breaks it for the neighbours, so they receive the reason before.
                self._channel.fail(_for_others(error))
                group.close()
            raise
        self._is_moved = True
        return DataPhaseResult(
            counters=self.counters,
            began=began,
            ended=ended,
            digests=self._digests(),
            peak_device_nbytes=self._peak_device_nbytes(),
            pinned_nbytes=sum(end.pinned_nbytes for end in (self._source, self._landing) if end),
        )

    def read_ahead(self) -> None:
        """Before `move` or `run`: a reader begins to fill its staging."""
        if self._source is not None:
            self._source.read_ahead()

    def overwrite_buffers(self, byte: int) -> None:
        """Before `run`: leave nothing of an earlier use in them."""
        self._ring.overwrite(byte)

    def block_digests(self) -> list[bytes]:
        """For each file the digests of the blocks that this rank received; after the data phase."""
        assert self._landing is not None, "this rank receives nothing"
        return self._landing.digests().of_blocks()

    def _begin(self, group: Group | Chain, chunk: Chunk, slot: Slot) -> None:
        """On a CPU: the chunk has its slot, ahead of its turn."""
        if self._source is not None and chunk.root == self._offer.rank:
            self._source.begin(chunk)
        if isinstance(group, Chain):
            group.begin(slot.memory[: chunk.wire_nbytes], chunk.root)

    def _run_dry(self, group: Group | Chain, error: BaseException) -> None:
        """This rank has failed, or knows that another has, and its process goes on.

        Keep buffers alive until the peers have finished the collectives they launched: every rank
        takes part in those.
        """
        assert not isinstance(group, Chain), "no GPU passes chunks on along a chain"
        self._channel.fail(_for_others(error))
        with suppress(RuntimeError):
            self._ring.run_dry(
                self._chunks,
                self._offer.world_size,
                broadcast_over(group, lambda: None),
                _DRY_PATIENCE_S,
            )

    def abandon(self) -> None:
        """The transfer has failed, and a thread may be stuck in `move`: free what can be freed.

        Not its memory, as long as a GPU may still write there.
        """
        self.close()  # wakes the loop
        num_dry = -1
        while self._survives and not self._outside.wait(_DRY_PATIENCE_S + 1):
            if num_dry == self._ring.num_dry:
                break  # it is stuck on the GPU, and the abort frees it
            num_dry = self._ring.num_dry
        group, self._group = self._group, None
        if isinstance(group, Chain):
            group.close()
        elif group is not None and not begin_abort(group, self._device).wait(_ABORT_LIMIT_S):
            _left_behind.append(self)
        self.close()

    def close(self) -> None:
        """End the I/O threads of a rank that will not run; `run` ends them itself."""
        for end in (self._checksummed or self._source, self._landing):
            if end is not None:
                end.close()

    def begin_close(self) -> Callable[[], bool]:
        """Take the process group down, once every rank has all bytes: some backends break the last
        collective of slower ranks.

        Returns a function that waits for the end; False: the process must leave by os._exit.
        """
        group, self._group = self._group, None
        assert group is not None, "close comes after move"
        if isinstance(group, Chain):
            group.close()
            return lambda: True
        closed = begin_close(group, self._device)
        return lambda: closed.wait(_CLOSE_LIMIT_S)

    def position(self) -> str:
        """How far this rank is, for messages: the newest file and its bytes so far."""
        newest = self.counters.newest
        if self._is_moved:
            return "the end, with all bytes sent"
        if newest is None:
            return "the beginning"
        spec = self._offer.files[newest.file]
        done = format_size(newest.offset + newest.nbytes)
        return f"{spec.name}, {done} of {format_size(spec.nbytes)}"

    def snapshot(self, workers: dict[int, WorkerState]) -> Snapshot:
        """This rank's progress; `workers` by their heartbeats, on the sender."""
        done = min((worker.nbytes for worker in workers.values()), default=self.nbytes_done())
        return Snapshot(
            nbytes_done=done,
            nbytes_total=self._offer.nbytes,
            stages={name: total.nbytes for name, total in self.counters.totals().items()},
            workers=workers,
            stage=self.counters.standing or "",
        )

    def nbytes_done(self) -> int:
        """Bytes that this rank has written, compared or dropped; on the sender, broadcast."""
        return self.counters.nbytes(self._landing.stage if self._landing else "broadcast")

    def progress(self) -> Progress:
        """What this rank's heartbeats carry."""
        moved = sum(total.nbytes for total in self.counters.totals().values())
        moved += self.counters.num_pauses  # or the others would take a pause for a stall
        return Progress(self.nbytes_done(), moved, stage=self.counters.standing or "")

    def _digests(self) -> list[str] | None:
        if self._landing is not None:
            return self._landing.digests().of_files()
        if self._source is not None and len(self._offer.readers) == 1:
            return self._source.digests().of_files()
        return None

    def _peak_device_nbytes(self) -> int:
        """The ring, the tables of sums, and incomplete tensors; 0 on a CPU.

        Counted from what was made here, since the process may hold a model too.
        """
        if self._device.type == "cpu":
            return 0
        nbytes = self._ring.memory.nbytes
        if self._checksummed is not None:
            nbytes += self._checksummed.device_nbytes
        if isinstance(self._landing, DeviceLanding):
            nbytes += self._landing.device_nbytes
        if isinstance(self._sink, TensorSink):
            nbytes += self._sink.peak_nbytes
        return nbytes


def _for_others(error: BaseException) -> PackcastError:
    """The error as other ranks receive it."""
    return error if isinstance(error, PackcastError) else TransferError(repr(error))
