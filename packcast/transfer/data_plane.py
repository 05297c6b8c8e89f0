"""The data phase on one rank: buffers made before it says READY, then the loop over the chunks.

Knows the control channel only as the one to ask for the true cause when a collective breaks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from torch._C._distributed_c10d import Store

from packcast.control.channel import Channel
from packcast.control.frames import Progress
from packcast.errors import PackcastError, RendezvousError, TransferError
from packcast.io.checksummed import ChecksummedSource
from packcast.io.device_landing import DeviceLanding
from packcast.io.landing import Landing, Sink
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.tensors import TensorSink
from packcast.io.source import FileReader, FileSource
from packcast.io.staging import Buffers
from packcast.launch.hops import open_chain
from packcast.launch.processgroup import (
    Group,
    begin_abort,
    begin_close,
    broadcast_over,
    open_process_group,
)
from packcast.packed.chain import Chain
from packcast.packed.counters import Counters
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import Chunk, slot_nbytes
from packcast.packed.ratelimit import RateLimit
from packcast.packed.ring import Broadcast, Ring, Slot
from packcast.packed.streams import Completion
from packcast.packed.trailer import transfer_tag
from packcast.transfer.host_share import num_io_threads, staging_bound
from packcast.transfer.offer import Offer
from packcast.units import format_exact_size, format_size
from packcast.view import Snapshot, WorkerState

# Backstops only: the control channel is faster in every case it was made for, and the stall watch
# in all others. But what is left behind in a library's process ends by it.
_GROUP_TIMEOUT_BEYOND_STALL_S = 60.0
_CLOSE_LIMIT_S = 15.0
_ABORT_LIMIT_S = 2.0
# For broadcasts that others have to take part in; longer than a lost rank takes to be known.
_DRY_PATIENCE_S = 4.0
_FAILURE_WAIT_S = 5.0

_left_behind: list[DataPlane] = []  # that failed, with a collective that would not end


@dataclass(frozen=True, slots=True)
class DataPhaseResult:
    """What the data phase left: when it began (`time.perf_counter()`), and proof of each file.

    `ended` is when the last byte was through on this rank, before its buffers were let go. The
    memory is what packcast took, not the whole process.
    """

    began: float
    digests: list[str] | None  # of every file, if this rank saw every block
    peak_device_nbytes: int
    pinned_nbytes: int
    ended: float


class DataPlane:
    """This rank's buffers and threads, made from an offer; a reader reads from `read_ahead` on."""

    def __init__(
        self,
        offer: Offer,
        chunks: Sequence[Chunk],
        transfer_id: str,
        *,
        reader: FileReader | None,
        sink: Sink | None,
        tolerant: bool = False,
    ) -> None:
        self.counters = Counters()
        self._is_moved = False
        self._survives = False
        self._outside = threading.Event()  # of the loop
        self._outside.set()
        self._group: Group | Chain | None = None
        self._offer = offer
        self._sink = sink
        self._chunks = chunks
        self._device = torch.device(offer.device)
        self._ring = self._make_ring()
        staged = (reader is not None) + (sink is not None and not self._stays_on_device(sink))
        self._buffers = Buffers(
            self._ring,
            offer.buffer_size,
            staging_nbytes=staging_bound(offer) // max(1, staged),
            tag=transfer_tag(transfer_id),
        )
        self._landing: Landing | DeviceLanding | None = None
        self._source: FileSource | None = None
        self._checksummed: ChecksummedSource | None = None
        try:
            self._make_ends(reader, sink, tolerant=tolerant)
        except BaseException:
            self.close()
            raise

    def _make_ends(self, reader: FileReader | None, sink: Sink | None, *, tolerant: bool) -> None:
        offer, buffers = self._offer, self._buffers
        if self._stays_on_device(sink):
            with self._room_told():
                self._landing = DeviceLanding(
                    sink, offer.files, self._chunks, buffers, tolerant=tolerant
                )
        elif sink is not None:
            self._landing = Landing(
                self._chunks,
                sink,
                offer.files,
                buffers,
                num_threads=num_io_threads(offer.assignment.ranks_on_host),
                tolerant=tolerant,
            )
        if reader is not None:
            mine = [chunk for chunk in self._chunks if chunk.root == offer.rank]
            threads = num_io_threads(offer.assignment.readers_on_host)
            self._source = FileSource(mine, reader, buffers, num_threads=threads)

    def _stays_on_device(self, sink: Sink | None) -> TypeGuard[TensorSink | DiscardSink]:
        return self._device.type == "cuda" and isinstance(sink, (TensorSink, DiscardSink))

    @property
    def needs_sums(self) -> bool:
        """Whether the roots have to prove their chunks by sums on the device."""
        return isinstance(self._landing, DeviceLanding)

    def move(
        self,
        store: Store,
        interface: str | None,
        channel: Channel,
        *,
        stall_timeout_s: float,
        sums: bool,
        survives: bool,
        max_rate: float | None = None,
    ) -> DataPhaseResult:
        """Make the process group and send or receive every chunk. All ranks.

        `sums` if some rank needs them: all readers must be told alike. `survives` if this process
        goes on after a failure. `max_rate`, in bytes per second, on the sender.
        """
        self._survives = survives and self._device.type == "cuda"
        timeout_s = stall_timeout_s + _GROUP_TIMEOUT_BEYOND_STALL_S
        try:
            if sums:
                self.prove_by_sums()
            self._group = self._open_group(store, interface, channel, timeout_s)
        except PackcastError:
            self.close()
            raise
        if not isinstance(self._group, Chain):
            self._connect(self._group, channel)
        channel.be_patient(0.0)  # what may hold the interpreter for long is over
        return self.run(self._group, channel, max_rate)

    def prove_by_sums(self) -> None:
        """Before `run`, on all ranks: who needs sums of what the roots send shall have them."""
        if self._source is not None:
            with self._room_told():
                self._checksummed = ChecksummedSource(self._source, self._buffers)

    def run(
        self, group: Group | Chain, channel: Channel, max_rate: float | None = None
    ) -> DataPhaseResult:
        """Send or receive every chunk over a group that is there. All ranks, once per DataPlane."""
        self._group = group
        with self._closed_on_error(group, channel), self._cause_told(channel), self._inside():
            began = time.perf_counter()
            ended = run_pipeline(
                self._chunks,
                rank=self._offer.rank,
                ring=self._ring,
                broadcast=self._limited(self._broadcast(group, channel), channel, max_rate),
                source=self._checksummed or self._source,
                drain=self._landing,
                begin=partial(self._begin, group),
                on_failure=partial(self._run_dry, group, channel) if self._survives else None,
            )
        self._is_moved = True
        return DataPhaseResult(
            began=began,
            ended=ended,
            digests=self._digests(),
            peak_device_nbytes=self._peak_device_nbytes(),
            pinned_nbytes=sum(end.pinned_nbytes for end in (self._source, self._landing) if end),
        )

    def read_ahead(self) -> None:
        """Before `run`: a reader begins to fill its staging."""
        if self._source is not None:
            self._source.read_ahead()

    def overwrite_buffers(self, byte: int) -> None:
        """Leave nothing of an earlier use in them; before `move` or `run`."""
        self._ring.overwrite(byte)

    def block_digests(self) -> list[bytes]:
        """For each file the digests of the blocks that this rank took; after `move` or `run`."""
        assert self._landing is not None, "this rank takes nothing"
        return self._landing.digests().of_blocks()

    def _begin(self, group: Group | Chain, chunk: Chunk, slot: Slot) -> None:
        """On a CPU: the chunk has its slot, ahead of its turn."""
        if self._source is not None and chunk.root == self._offer.rank:
            self._source.begin(chunk)
        if isinstance(group, Chain):
            group.begin(slot.memory[: chunk.wire_nbytes], chunk.root)

    def _broadcast(self, group: Group | Chain, channel: Channel) -> Broadcast:
        """The group's, which raises the failure once there is one; see `_run_dry`."""
        if isinstance(group, Chain):
            return group.carry
        broadcast = broadcast_over(group, lambda: channel.failure)
        if not self._survives:
            return broadcast

        def broadcast_until_failure(tensor: torch.Tensor, root: int) -> None:
            channel.check()
            broadcast(tensor, root)

        return broadcast_until_failure

    def _limited(self, broadcast: Broadcast, channel: Channel, max_rate: float | None) -> Broadcast:
        """Every chunk waits until the rate allows it, whoever its root is.

        The broadcasts come in one order on all ranks, so other readers wait for the sender here.
        """
        if max_rate is None:
            return broadcast
        limit = RateLimit(max_rate)

        def pause(seconds: float) -> None:
            if failure := channel.wait_failure(seconds):
                raise failure
            self.counters.num_pauses += 1

        def broadcast_at_rate(tensor: torch.Tensor, root: int) -> Completion | None:
            limit.take(tensor.nbytes, pause)
            return broadcast(tensor, root)

        return broadcast_at_rate

    def _run_dry(self, group: Group | Chain, channel: Channel, error: BaseException) -> None:
        """This rank has failed, or heard that another has, and its process will go on: nobody's
        memory may go while others' GPUs still read it. Whoever hears of it does the same."""
        assert not isinstance(group, Chain), "no GPU passes chunks on along a chain"
        channel.fail(_told(error))
        with suppress(RuntimeError):
            self._ring.run_dry(
                self._chunks,
                self._offer.world_size,
                broadcast_over(group, lambda: None),
                _DRY_PATIENCE_S,
            )

    def abandon(self) -> None:
        """The transfer has failed, and some thread may be stuck in `move`: free what can be.

        Its memory is not, as long as a GPU may still be writing there.
        """
        self.close()  # which wakes the loop, where it waits for an end
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
        """End the threads and helpers of a rank that will not run; `run` ends them itself."""
        for end in (self._checksummed or self._source, self._landing):
            if end is not None:
                end.close()

    def begin_close(self) -> Callable[[], bool]:
        """Take the process group down, once every rank has moved all: some backends break the
        last collective of those that are behind.

        Call what is returned to wait for its end; False: the process must leave by os._exit.
        """
        group, self._group = self._group, None
        assert group is not None, "close comes after move"
        if isinstance(group, Chain):
            group.close()  # nothing is under way any more
            return lambda: True
        closed = begin_close(group, self._device)
        return lambda: closed.wait(_CLOSE_LIMIT_S)

    def _open_group(
        self, store: Store, interface: str | None, channel: Channel, timeout_s: float
    ) -> Group | Chain:
        offer = self._offer
        try:
            if offer.backend == "gloo":
                return open_chain(
                    offer.order,
                    offer.readers,
                    rank=offer.rank,
                    store=store,
                    timeout_s=timeout_s,
                    interface=interface,
                    # No closure: the frames of an error would keep it, and the buffers with it.
                    check=channel.check,
                )
            return open_process_group(
                "nccl",
                rank=offer.rank,
                world_size=offer.world_size,
                store=store,
                device=self._device,
                timeout_s=timeout_s,
                interface=interface,
            )
        except RendezvousError as error:
            raise channel.wait_failure(_FAILURE_WAIT_S) or error from error

    def _connect(self, group: Group, channel: Channel) -> None:
        """NCCL's first broadcast, a quarter of a second, while readers fill the staging."""
        if self._device.type == "cuda":
            with self._cause_told(channel):
                broadcast_over(group, lambda: channel.failure)(torch.zeros(1).to(self._device), 0)
                torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._outside.clear()
        try:
            yield
        finally:
            self._outside.set()

    @contextmanager
    def _closed_on_error(self, group: Group | Chain, channel: Channel) -> Iterator[None]:
        """A chain's neighbours fail where it is closed: they are told why before."""
        try:
            yield
        except BaseException as error:
            if isinstance(group, Chain):
                channel.fail(_told(error))
                group.close()
            raise

    @contextmanager
    def _cause_told(self, channel: Channel) -> Iterator[None]:
        """torch's own errors, of a collective or a copy, in our words."""
        try:
            yield
        except PackcastError:
            raise
        except RuntimeError as error:
            # What broke it is often known on the control channel a moment later, by name.
            raise channel.wait_failure(_FAILURE_WAIT_S) or TransferError(
                f"{self._offer.backend} failed at {self.position()}: {str(error).splitlines()[0]}"
            ) from error

    def position(self) -> str:
        """How far this rank is, for a sentence: the newest file and its bytes so far."""
        newest = self.counters.newest
        if self._is_moved:
            return "the end, with all bytes sent"
        if newest is None:
            return "the beginning"
        spec = self._offer.files[newest.file]
        done = format_size(newest.offset + newest.nbytes)
        return f"{spec.name}, {done} of {format_size(spec.nbytes)}"

    def snapshot(self, workers: dict[int, WorkerState]) -> Snapshot:
        """Where this rank is; on the sender `workers` are what their heartbeats said."""
        newest = self.counters.newest
        done = min((worker.nbytes for worker in workers.values()), default=self.nbytes_done())
        return Snapshot(
            nbytes_done=done,
            nbytes_total=self._offer.nbytes,
            stages={name: total.nbytes for name, total in self.counters.totals().items()},
            workers=workers,
            at="" if newest is None else self._offer.files[newest.file].name,
            stage=self.counters.standing or "",
        )

    def nbytes_done(self) -> int:
        """Bytes that are where they belong on this rank."""
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
        """Of what was made here, since the process may have a model beside it: the ring, the
        tables of sums, and tensors that were not whole. 0 on a CPU."""
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

    def _make_ring(self) -> Ring:
        offer = self._offer
        with self._room_told():
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            return Ring(
                self._device, slot_nbytes(offer.buffer_size), offer.num_buffers, self.counters
            )

    @contextmanager
    def _room_told(self) -> Iterator[None]:
        """torch's own errors, of making the ring or what proves its chunks, in our words."""
        offer = self._offer
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one, the CPU's is a plain one
            raise TransferError(
                f"{offer.device} is not available, or has no memory for {offer.num_buffers} buffers"
                f" of {format_exact_size(offer.buffer_size)}",
                hint="reduce --buffer-size or --num-buffers on the sender",
            ) from error


def _told(error: BaseException) -> PackcastError:
    """What the other ranks hear of an error."""
    return error if isinstance(error, PackcastError) else TransferError(repr(error))
