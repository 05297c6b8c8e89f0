"""The two library functions, on the wire of the packed broadcasts that engines already speak.

That wire: tensors in iteration order, each as its bytes; a buffer is closed after the tensor that
takes it over `buffer_size_bytes` (equal does not close it); one broadcast of uint8 per buffer; no
header, no padding, nothing for an empty iterator. Either end may be another implementation of it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from packcast.errors import UsageError
from packcast.packed.communicator import Communicator, communicator_of
from packcast.packed.counters import Stage, wanted_counters
from packcast.packed.gather import PIECE_NBYTES, move_on, on_device, pieces_of
from packcast.packed.pipeline import run_pipeline
from packcast.packed.ring import NOBODY, Ring, Slot
from packcast.packed.streams import StreamEvent, make_caller_wait, record_caller_stream
from packcast.packed.tensor_bytes import as_bytes, from_bytes, is_simple, nbytes_of

DEFAULT_PACKED_BUFFER_SIZE_BYTES = 1 << 30
DEFAULT_PACKED_NUM_BUFFERS = 2

# Tables are made anew for each buffer, and while one is made nothing is sent: they are kept short,
# with enough pieces for all programs of the kernel to end together.
_ENOUGH_PIECES = 4096
# Parts that are larger on average are joined at once, without a table, where nothing is under way.
_LARGE = 1 << 20
_LARGEST = 1 << 62  # more than any buffer

_COPIED_AS_BYTES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8)  # by a GPU's cat

_NBYTES = operator.attrgetter("nbytes")
_NAME = operator.attrgetter("name")
_KIND = operator.attrgetter("shape", "dtype")

T = TypeVar("T")
PostIter = Callable[[tuple[str, torch.Tensor]], torch.Tensor]
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

    `iterator` yields (name, tensor) of any shape, stride and plain dtype, on any device;
    `post_iter_func` is called once with each pair, on the caller's stream, and returns the tensor
    to send: it may cast, gather or reshape. The consumer has to be told the shapes and dtypes that
    it returns, not the iterator's; with `strict` those must be the same. `group` is a process group
    or backend of `torch.distributed`, whether or not torch's tables know it, or any object with
    `broadcast(tensor, src=...)` that works on the current stream. `src` is this rank, counted
    within the group.

    Work is ordered after the caller's current stream, and over when this returns; also when it
    raises, provided the other ranks took part in what was begun. Errors of the iterator,
    `post_iter_func` and `group` are raised as they are. Raises UsageError naming the tensor that
    cannot travel (no buffer that it would be in is sent), for a `src` that is not this rank, and
    for a group that is disabled.

    Memory: `num_buffers` buffers, each as large as the largest that it has to carry and at most an
    eighth of that more, or of `buffer_size_bytes` if that is less; on a GPU also 24 bytes for every
    tensor of a buffer, or every 64 KiB of one. Tensors that `post_iter_func` or the iterator make
    on the way live until they are packed: those of two buffers at most.

    Three things are the wire's own, and no implementation can mend them: a buffer exceeds
    `buffer_size_bytes` by up to one tensor; ends that disagree on order, shapes or sizes are not
    noticed, and may hang or take wrong bytes; and over a bare communicator there is no time-out.
    """
    communicator = communicator_of(group)
    communicator.check_src(src, sends=True)
    packs = _packs_to_send(
        iter(iterator), post_iter_func, buffer_size_bytes, src, communicator.device, strict=strict
    )
    ring = _growing_ring(communicator, num_buffers, buffer_size_bytes)
    _run(packs, communicator, ring, rank=src, source=_Packer(ring), drain=None)


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

    `iterator` yields (name, (shape, dtype)) in the producer's order, of the tensors that its
    `post_iter_func` returns, and `buffer_size_bytes` must be the producer's. `device` is where the
    group's tensors belong; only for a communicator that has no `device` of its own it decides.
    `post_unpack_func` gets a list of (name, tensor) for each buffer, in the caller's thread, with
    the tensors ready on its current stream.

    The tensors are the callback's own and stay right when they are kept. With `borrow` they are
    views of the buffer instead (but for a few that are not aligned), which costs no copy: they
    must not be used after the callback has returned, nor on other streams than the current one.

    Work, errors, memory and the wire's own limits are as for the producer.
    """
    communicator = communicator_of(group, device)
    communicator.check_src(src, sends=False)
    packs = _packs_to_receive(iter(iterator), buffer_size_bytes, src)
    ring = _growing_ring(communicator, num_buffers, buffer_size_bytes)
    unpacker = _Unpacker(ring, post_unpack_func, borrow=borrow)
    _run(packs, communicator, ring, rank=NOBODY, source=None, drain=unpacker)


# As vLLM calls the two since 0.22.
packed_nccl_broadcast_producer = packed_broadcast_producer
packed_nccl_broadcast_consumer = packed_broadcast_consumer


class _Entry(NamedTuple):
    """A tensor's place in the order: all that a receiver knows of it. Made once per tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Pack:
    """A buffer of the wire: a chunk whose size is known once the iterator has been pulled."""

    index: int
    root: int
    nbytes: int
    entries: tuple[_Entry, ...]  # on the consumer only
    parts: tuple[torch.Tensor, ...]  # contiguous on the device, on the producer only
    own: None = None

    @property
    def wire_nbytes(self) -> int:
        return self.nbytes


def _growing_ring(communicator: Communicator, num_buffers: int, limit: int) -> Ring:
    """Slots without memory yet; each grows to the largest buffer that it has to carry."""
    if num_buffers < 1:
        raise UsageError(f"num_buffers is {num_buffers}", hint="give at least 1")
    # A slot is idle while it grows, and buffers exceed the limit by a little more or less each
    # time: in steps of a sixteenth to an eighth of it most slots grow once. A limit may be any
    # number, as "all in one buffer".
    step_nbytes = 1 << max(0, (int(min(limit, _LARGEST)) // 8).bit_length() - 1)
    return Ring(communicator.device, 0, num_buffers, wanted_counters(), step_nbytes=step_nbytes)


def _packs_to_send(
    pairs: Iterator[tuple[str, torch.Tensor]],
    post_iter_func: PostIter,
    limit: int,
    root: int,
    device: torch.device,
    *,
    strict: bool,
) -> Iterator[_Pack]:
    def parts() -> Iterator[tuple[int, torch.Tensor]]:
        for name, given in pairs:
            tensor = post_iter_func((name, given))
            # Detached, so as to have its memory also when the caller's object is given other.
            part = tensor.detach() if is_simple(tensor, device) else as_bytes(name, tensor, device)
            if strict and (tensor.shape, tensor.dtype) != (given.shape, given.dtype):
                raise UsageError(
                    f"post_iter_func made {name}, {given.dtype} {tuple(given.shape)}, into"
                    f" {tensor.dtype} {tuple(tensor.shape)}",
                    hint="with strict, receivers count on what the iterator names",
                )
            yield part.nbytes, part

    for index, (nbytes, items) in enumerate(_closed_after_exceeding(parts(), limit)):
        yield _Pack(index, root, nbytes, (), tuple(items))


def _packs_to_receive(
    pairs: Iterator[tuple[str, tuple[Sequence[int], torch.dtype]]], limit: int, root: int
) -> Iterator[_Pack]:
    def entries() -> Iterator[tuple[int, _Entry]]:
        for name, (shape, dtype) in pairs:
            nbytes = nbytes_of(shape, dtype)
            yield nbytes, _Entry(name, tuple(shape), dtype, nbytes)

    for index, (nbytes, items) in enumerate(_closed_after_exceeding(entries(), limit)):
        yield _Pack(index, root, nbytes, tuple(items), ())


def _closed_after_exceeding(
    items: Iterator[tuple[int, T]], limit: int
) -> Iterator[tuple[int, list[T]]]:
    """The wire's one rule: a buffer ends with the tensor that takes it over the limit.

    Items come with their sizes in bytes, and go as buffers with theirs.
    """
    pack: list[T] = []
    used = 0
    for nbytes, item in items:
        pack.append(item)
        used += nbytes
        if used > limit:
            yield used, pack
            pack, used = [], 0
    if pack:
        yield used, pack


def _run(
    packs: Iterator[_Pack],
    communicator: Communicator,
    ring: Ring,
    *,
    rank: int,
    source: _Packer | None,
    drain: _Unpacker | None,
) -> None:
    try:
        run_pipeline(
            packs,
            rank=rank,
            ring=ring,
            broadcast=communicator.broadcast,
            source=source,
            drain=drain,
        )
    except BaseException:
        ring.synchronize()  # nothing stays in flight when the slots are freed
        raise


class _Packer:
    """Packs a buffer's tensors into its slot."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._move = move_on(ring.device)
        self._packed: StreamEvent | None = None  # of the buffer before
        self._in_use: Sequence[torch.Tensor | None] = ()  # what is kept alive until then

    def fill(self, pack: _Pack, slot: Slot) -> None:
        """Give the copies to the fill stream, behind what the caller's stream has made of them."""
        ring = self._ring
        if self._packed is not None:
            # Tensors made on the way live until they are packed: far ahead of a slow group the
            # iterator would fill the memory with them. And until then nobody may free them,
            # whichever stream they were made on.
            self._packed.synchronize()
        # All wait for the first one, so it takes the shortest way; copies of this kind fill the
        # GPU, though, which would hold up a broadcast beside them.
        joins = pack.index == 0 and pack.nbytes >= _LARGE * len(pack.parts)
        # On the caller's stream: what is allocated on a stream is lost to other calls' streams.
        table = _table_of(pack.parts, ring.device) if self._move and not joins else None
        # Those before are let go when this returns: that takes time, for which nobody should wait.
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
    """Contiguous parts, one after the other, as bytes; without a view of each where they are alike,
    since views take longer than the rest of it."""
    looks = {(part.dtype, part.shape[1:]) for part in parts} if memory.is_cuda else set()
    if len(looks) == 1 and (look := looks.pop())[0] in _COPIED_AS_BYTES:
        dtype, shape = look
        torch.cat(parts, out=memory.view(dtype).view(-1, *shape))
    else:
        torch.cat([part.view(-1).view(torch.uint8) for part in parts], out=memory)


def _table_of(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """For the kernel: contiguous parts, one after the other; None if they have no bytes."""
    nbytes = torch.tensor(list(map(_NBYTES, parts)), dtype=torch.int64)
    addresses = torch.tensor(list(map(torch.Tensor.data_ptr, parts)), dtype=torch.int64)
    ends = nbytes.cumsum(0)
    share = int(ends[-1]) // _ENOUGH_PIECES if parts else 0
    piece_nbytes = max(PIECE_NBYTES, 1 << share.bit_length())
    table, _ = pieces_of(addresses, ends - nbytes, nbytes, piece_nbytes)
    return on_device(table, device) if len(table) else None


class _Unpacker:
    """Hands a buffer's tensors to the callback, as copies or on loan."""

    def __init__(self, ring: Ring, post_unpack_func: PostUnpack, *, borrow: bool) -> None:
        self._ring = ring
        self._move = move_on(ring.device)
        self._post_unpack_func = post_unpack_func
        self._borrow = borrow
        self.stage: Stage = "unpack"

    def drain(self, pack: _Pack, slot: Slot) -> None:
        """Call back with the tensors, in order after their arrival on the caller's stream."""
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
        """Everything was called back already."""

    def close(self) -> None:
        """It has no threads."""

    def _copies(self, pack: _Pack, slot: Slot) -> list[torch.Tensor]:
        ring = self._ring
        # Each has memory of its own: views of one copy would keep all of it alive.
        tensors = [
            torch.empty(entry.shape, dtype=entry.dtype, device=ring.device)
            for entry in pack.entries
        ]
        # On the caller's stream, and back to it when this returns: it then waits for the copies.
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
    """Without the kernel. As bytes: copies of floats between GPU tensors may quiet a NaN."""
    data = [tensor.view(-1).view(torch.uint8) for tensor in tensors if tensor.nbytes]
    sizes = [len(part) for part in data]
    if data:
        torch._foreach_copy_(data, memory[: sum(sizes)].split(sizes))


def _views(entries: Sequence[_Entry], memory: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that lie one after the other in the memory, from its beginning: views of it, but
    for those that are not aligned.

    Neighbours of one shape and dtype, of which models have many, are made all at once.
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
            views.extend(from_bytes(part, shape, dtype) for part in _cut(run, count))
    return views


def _cut(run: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    return run.view(count, -1).unbind() if len(run) else [run] * count
