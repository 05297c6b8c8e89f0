"""The two library functions, on the wire of the packed broadcasts that engines already use.

The wire: tensors in iteration order, each as its bytes; a buffer is closed after the tensor that
takes it over `buffer_size_bytes` (equal does not close it); one broadcast of uint8 per buffer; no
header, no padding, nothing for an empty iterator. Either end may be another implementation.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence

import torch

from packcast.errors import UsageError
from packcast.packed.communicator import Communicator, communicator_of
from packcast.packed.counters import Stage, wanted_counters
from packcast.packed.gather import PIECE_NBYTES, move_on, on_device, pieces_of
from packcast.packed.pipeline import run_pipeline
from packcast.packed.ring import NOBODY, Ring, Slot
from packcast.packed.streams import StreamEvent, make_caller_wait, record_caller_stream
from packcast.packed.tensor_bytes import from_bytes, nbytes_of
from packcast.packed.wire import ExpectedTensor, Pack, PostIter, packs_to_receive, packs_to_send

DEFAULT_PACKED_BUFFER_SIZE_BYTES = 1 << 30
DEFAULT_PACKED_NUM_BUFFERS = 2

# Nothing is sent while a buffer's table is made, so tables are short, with just enough pieces for
# all programs of the kernel to end together.
_ENOUGH_PIECES = 4096
_LARGE = 1 << 20  # the average size of parts from which the first buffer is packed without a table
_LARGEST = 1 << 62  # more than any buffer

_COPIED_AS_BYTES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8)  # by a GPU's cat

_NBYTES = operator.attrgetter("nbytes")
_NAME = operator.attrgetter("name")
_KIND = operator.attrgetter("shape", "dtype")

PostUnpack = Callable[[list[tuple[str, torch.Tensor]]], object]


def packed_broadcast_producer(
    iterator: Iterable[tuple[str, torch.Tensor]],
    group: object,
    src: int,
    post_iter_func: PostIter,
    buffer_size_bytes: int = DEFAULT_PACKED_BUFFER_SIZE_BYTES,
    num_buffers: int = DEFAULT_PACKED_NUM_BUFFERS,
    *,
    strict: bool = False,
) -> None:
    """Broadcast tensors from rank `src` of `group`; only that rank calls this, the others consume.

    `iterator` yields (name, tensor) of any shape, strides and plain dtype, on any device;
    `post_iter_func` is called once with each pair, on the caller's stream, and returns the tensor
    to send: it may cast, gather or reshape. The consumer needs the shapes and dtypes that it
    returns, not the iterator's; with `strict` they must be the same. `group` is any process group
    or backend of `torch.distributed`, or an object with `broadcast(tensor, src=...)` that works on
    the current stream. `src` is this rank within the group.

    Ordered after the caller's current stream, complete on return; also on an error, provided the
    other ranks take part in the broadcasts begun. Errors of the iterator, `post_iter_func` and
    `group` are raised unchanged. Raises UsageError for a tensor that cannot be sent, by name
    (before its buffer is sent), for a `src` that is not this rank, and for a disabled group.

    Memory: `num_buffers` buffers, each as large as the largest that it carries plus at most an
    eighth of it, or of `buffer_size_bytes` if that is less; on a GPU also 24 bytes for every tensor
    of a buffer, or every 64 KiB of one. Tensors made by `post_iter_func` or the iterator live until
    they are packed: those of at most two buffers.

    Limits of the wire itself: a buffer exceeds `buffer_size_bytes` by up to one tensor; ends that
    disagree on order, shapes or sizes are not detected and may hang or receive wrong bytes; a bare
    communicator has no timeout.
    """
    communicator = communicator_of(group)
    communicator.check_src(src, sends=True)
    packs = packs_to_send(
        iter(iterator), post_iter_func, buffer_size_bytes, src, communicator.device, strict=strict
    )
    ring = _growing_ring(communicator, num_buffers, buffer_size_bytes)
    run_pipeline(
        packs,
        rank=src,
        ring=ring,
        broadcast=communicator.broadcast,
        source=_Packer(ring),
        drain=None,
        on_failure=lambda _error: ring.synchronize(),  # before the slots are freed
    )


def packed_broadcast_consumer(
    iterator: Iterable[tuple[str, tuple[Sequence[int], torch.dtype]]],
    group: object,
    src: int,
    post_unpack_func: PostUnpack,
    buffer_size_bytes: int = DEFAULT_PACKED_BUFFER_SIZE_BYTES,
    num_buffers: int = DEFAULT_PACKED_NUM_BUFFERS,
    device: torch.device | str | int | None = None,
    *,
    borrow: bool = False,
) -> None:
    """Receive what the producer on rank `src` of `group` broadcasts; every other rank calls this.

    `iterator` yields (name, (shape, dtype)) of the tensors that the producer's `post_iter_func`
    returns, in its order; `buffer_size_bytes` must be the producer's. `device` is the device of the
    group's tensors, needed only for a communicator without `device`. `post_unpack_func` receives a
    list of (name, tensor) for each buffer, in the caller's thread, ready on its current stream.

    The tensors belong to the callback, which may keep them. With `borrow` they are views of the
    buffer (except for a few unaligned ones), which saves the copy: they must not be used after the
    callback has returned, nor on other streams than the current one.

    Order, errors, memory and limits are as for the producer.
    """
    communicator = communicator_of(group, device)
    communicator.check_src(src, sends=False)
    packs = packs_to_receive(iter(iterator), buffer_size_bytes, src)
    ring = _growing_ring(communicator, num_buffers, buffer_size_bytes)
    run_pipeline(
        packs,
        rank=NOBODY,
        ring=ring,
        broadcast=communicator.broadcast,
        source=None,
        drain=_Unpacker(ring, post_unpack_func, borrow=borrow),
        on_failure=lambda _error: ring.synchronize(),  # before the slots are freed
    )


# vLLM's names since 0.22.
packed_nccl_broadcast_producer = packed_broadcast_producer
packed_nccl_broadcast_consumer = packed_broadcast_consumer


def _growing_ring(communicator: Communicator, num_buffers: int, limit: int) -> Ring:
    """Slots without memory; each grows to the largest buffer that it carries."""
    if num_buffers < 1:
        raise UsageError(f"num_buffers is {num_buffers}", hint="give at least 1")
    # A slot is idle while it grows, and each buffer exceeds the limit by a different amount: in
    # steps of a sixteenth to an eighth of the limit most slots grow once. The limit may be any
    # number, to mean "all in one buffer".
    step_nbytes = 1 << max(0, (int(min(limit, _LARGEST)) // 8).bit_length() - 1)
    return Ring(communicator.device, 0, num_buffers, wanted_counters(), step_nbytes=step_nbytes)


class _Packer:
    """Packs a buffer's tensors into its slot."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._move = move_on(ring.device)
        self._packed: StreamEvent | None = None  # of the previous buffer
        self._in_use: Sequence[torch.Tensor | None] = ()  # kept alive until then

    def fill(self, pack: Pack, slot: Slot) -> None:
        """Enqueue the copies on the fill stream, after the caller's stream."""
        ring = self._ring
        if self._packed is not None:
            # Tensors of earlier buffers live until they are packed, whatever stream they were made
            # on. Without this wait, an iterator ahead of a slow group would fill the memory.
            self._packed.synchronize()
        # All ranks wait for the first buffer, so it is packed without making a table. Such copies
        # fill the GPU and would delay a broadcast, but none is running yet.
        joins = pack.index == 0 and pack.nbytes >= _LARGE * len(pack.parts)
        # Allocated on the caller's stream, since the allocator does not share between streams.
        table = _table_of(pack.parts, ring.device) if self._move and not joins else None
        # The previous ones are freed on return, after the copies below are enqueued.
        _before, self._in_use = self._in_use, (*pack.parts, table)
        ring.fill.wait_for_caller(ring.device)
        with ring.fill:
            begin = ring.fill.record()
            if table is not None and self._move is not None:
                self._move(table, slot.memory, into_slot=True, alone=pack.index == 0)
            elif pack.parts:
                _join(pack.parts, slot.memory[: pack.nbytes])
            slot.filled = self._packed = ring.fill.record()
        ring.clock.span("pack", pack.index, pack.nbytes, begin, slot.filled)

    def close(self) -> None:
        """It has no threads."""


def _join(parts: tuple[torch.Tensor, ...], memory: torch.Tensor) -> None:
    """Copy contiguous parts, one after the other, as bytes. Parts of one dtype and shape need no
    views, which would take longer than everything else."""
    looks = {(part.dtype, part.shape[1:]) for part in parts} if memory.is_cuda else set()
    if len(looks) == 1 and (look := looks.pop())[0] in _COPIED_AS_BYTES:
        dtype, shape = look
        torch.cat(parts, out=memory.view(dtype).view(-1, *shape))
    else:
        torch.cat([part.view(-1).view(torch.uint8) for part in parts], out=memory)


def _table_of(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """The kernel's table of contiguous parts, one after the other; None if they have no bytes."""
    nbytes = torch.tensor(list(map(_NBYTES, parts)), dtype=torch.int64)
    addresses = torch.tensor(list(map(torch.Tensor.data_ptr, parts)), dtype=torch.int64)
    ends = nbytes.cumsum(0)
    share = int(ends[-1]) // _ENOUGH_PIECES if parts else 0
    piece_nbytes = max(PIECE_NBYTES, 1 << share.bit_length())
    table, _ = pieces_of(addresses, ends - nbytes, nbytes, piece_nbytes)
    return on_device(table, device) if len(table) else None


class _Unpacker:
    """Calls back with a buffer's tensors, as copies or as views."""

    def __init__(self, ring: Ring, post_unpack_func: PostUnpack, *, borrow: bool) -> None:
        self._ring = ring
        self._move = move_on(ring.device)
        self._post_unpack_func = post_unpack_func
        self._borrow = borrow
        self.stage: Stage = "unpack"

    def drain(self, pack: Pack, slot: Slot) -> None:
        """Call back with the tensors, ready on the caller's stream."""
        device = self._ring.device
        if self._borrow:
            make_caller_wait(device, slot.arrived)
            tensors = _views(pack.entries, slot.memory)
        else:
            tensors = self._copies(pack, slot)
        self._post_unpack_func(list(zip(map(_NAME, pack.entries), tensors, strict=True)))
        if self._borrow:
            slot.drained = record_caller_stream(device)

    def finish(self) -> None:
        """Every callback has returned."""

    def close(self) -> None:
        """It has no threads."""

    def _copies(self, pack: Pack, slot: Slot) -> list[torch.Tensor]:
        ring = self._ring
        # Each has its own memory: views of one copy would keep all of it alive.
        tensors = [
            torch.empty(entry.shape, dtype=entry.dtype, device=ring.device)
            for entry in pack.entries
        ]
        # Allocated and freed on the caller's stream, which waits for the copies below.
        table = _table_of(tensors, ring.device) if self._move is not None else None
        ring.drain.wait_for_caller(ring.device)
        ring.drain.wait(slot.arrived)
        with ring.drain:
            begin = ring.drain.record()
            if table is not None and self._move is not None:
                self._move(table, slot.memory, into_slot=False)
            else:
                _copy_out(tensors, slot.memory)
            slot.drained = ring.drain.record()
        make_caller_wait(ring.device, slot.drained)
        ring.clock.span("unpack", pack.index, pack.nbytes, begin, slot.drained)
        return tensors


def _copy_out(tensors: Sequence[torch.Tensor], memory: torch.Tensor) -> None:
    """Copy without the kernel, as bytes: copies of floats on a GPU may change a NaN."""
    data = [tensor.view(-1).view(torch.uint8) for tensor in tensors if tensor.nbytes]
    sizes = [len(part) for part in data]
    if data:
        torch._foreach_copy_(data, memory[: sum(sizes)].split(sizes))


def _views(entries: Sequence[ExpectedTensor], memory: torch.Tensor) -> list[torch.Tensor]:
    """The tensors one after the other in the memory: views of it, copies of unaligned ones.

    Views of consecutive tensors of one shape and dtype, which models have many of, are made at
    once.
    """
    views: list[torch.Tensor] = []
    at = 0
    for (shape, dtype), group in itertools.groupby(entries, _KIND):
        count, nbytes = sum(1 for _ in group), nbytes_of(shape, dtype)
        run = memory[at : at + count * nbytes]
        at += count * nbytes
        if count == 1:
            views.append(from_bytes(run, shape, dtype))
        elif nbytes and run.storage_offset() % dtype.itemsize == 0:
            views.extend(run.view(dtype).view(count, *shape).unbind())
        else:
            parts = run.view(count, -1).unbind() if nbytes else [run] * count
            views.extend(from_bytes(part, shape, dtype) for part in parts)
    return views
