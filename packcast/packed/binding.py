"""A replay's tensors bound to its plan: the address of each chunk's bytes, found once.

A chunk then costs one call for all its copies, or none if it is broadcast in place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from packcast.errors import UsageError
from packcast.packed.counters import Stage
from packcast.packed.gather import Move, tables_of
from packcast.packed.layout import Part, ReplayChunk, TensorSpec
from packcast.packed.overlap import check_apart
from packcast.packed.ring import Ring, Slot
from packcast.packed.streams import make_caller_wait, record_caller_stream
from packcast.packed.tensor_bytes import alias_of, as_bytes, check_plain
from packcast.packed.tensor_map import Rows

Tensors = Mapping[str, torch.Tensor]

_DTYPE = operator.attrgetter("dtype")
_WORD = 16  # copies and broadcasts of a tensor at another address than its multiples are slow


@dataclass(frozen=True, slots=True, eq=False)
class BoundChunk(ReplayChunk):
    """A chunk of the plan with the memory that its bytes come from, or go to.

    That is `own`, which needs no copy; else the `table` for the kernel; else `memory` by part.
    """

    own: torch.Tensor | None = None
    table: torch.Tensor | None = None
    memory: Sequence[torch.Tensor] = ()
    is_last: bool = False  # no broadcast runs beside its copies out of the slot


class _Subset(NamedTuple):
    """Some of the plan's tensors, by their indices, with their addresses when they were bound."""

    indices: Sequence[int]
    tensors: Sequence[torch.Tensor]
    addresses: Sequence[int]


class Bound:
    """The plan's tensors as bytes on the ring's device, cut into each chunk's parts.

    A tensor that is not contiguous, not on the device, or unaligned and too large for a slot has a
    stand-in there that is copied before a send and after a receive. With the plan's `rows`, chunks
    have tables for the kernel. Keeps the tensors' memory.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        chunks: Sequence[ReplayChunk],
        tensors: Tensors,
        device: torch.device,
        rows: Rows | None,
    ) -> None:
        self._specs = specs
        self._names = [spec.name for spec in specs]
        # Aliases, since the caller's own objects may get other memory.
        self._tensors = [alias_of(self._checked(spec, tensors)) for spec in specs]
        self._dtypes = [spec.dtype for spec in specs]
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        self._stand_ins: dict[int, torch.Tensor] = {}
        alone = {chunk.parts[0].tensor for chunk in chunks if not chunk.needs_slot}
        self._whole = [
            self._bytes_of(i, spec, device, alone=i in alone) for i, spec in enumerate(specs)
        ]
        self.chunks = self._bound(chunks, rows, device)
        position = {spec.name: i for i, spec in enumerate(specs)}
        self._ties = [(i, position[spec.same_as]) for i, spec in enumerate(specs) if spec.same_as]
        self._by_chunk = [self._subset(part.tensor for part in chunk.parts) for chunk in chunks]
        self._device = device
        # After the newest copies (of tables and stand-ins) on a caller's stream.
        self._newest = record_caller_stream(device)

    def named(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The plan's tensors, in its order."""
        return dict(zip(self._names, map(tensors.__getitem__, self._names), strict=True))

    def is_of(self, tensors: Tensors) -> bool:
        """Whether these have the bound memory, shapes and strides.

        Called before every send for all tensors, so without a Python loop. Objects may differ: a
        model's `state_dict()` makes new ones each time. Addresses are compared too: a storage that
        was freed and filled again (offloaded weights, FSDP's) is the same storage elsewhere.
        """
        try:
            planned = list(map(tensors.__getitem__, self._names))
            return (
                list(map(_DTYPE, planned)) == self._dtypes
                and list(map(torch.Tensor.data_ptr, planned)) == self._addresses
                and all(map(torch.Tensor.is_set_to, planned, self._tensors))
            )
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError):  # no plain bytes
            return False

    def check_ties(self) -> None:
        """Before a send: raise UsageError if tied tensors no longer share their memory."""
        for i, original in self._ties:
            if not self._tensors[i].is_set_to(self._tensors[original]):
                spec = self._specs[i]
                raise UsageError(
                    f"tensor {spec.name} shares the memory of {spec.same_as} in the plan, but"
                    " no longer does",
                    hint="make a new pair from the tensors as they are now",
                )

    def check_apart(self) -> None:
        """Before a receive: raise UsageError if two elements share memory."""
        check_apart(dict(zip(self._names, self._tensors, strict=True)))

    def check_is_there(self) -> None:
        """Before another run: raise UsageError if memory of stand-ins' or tied tensors moved."""
        self._check(self._subset([*self._stand_ins, *(i for i, _ in self._ties)]))

    def chunks_again(self, *, write: bool) -> Iterator[BoundChunk]:
        """The chunks for another run.

        On a CPU this raises UsageError for a tensor whose memory has moved since it was bound, and
        with `write` the tensors count as changed for autograd. On a GPU both would take longer than
        the run and are the caller's responsibility.
        """
        if self._device.type == "cuda":
            yield from self.chunks
            return
        for chunk, subset in zip(self.chunks, self._by_chunk, strict=True):
            self._check(subset)
            if write:
                increment_version(subset.tensors)
            yield chunk

    def follow(self) -> None:
        """Before a run: make the caller's stream wait for copies made on another stream."""
        make_caller_wait(self._device, self._newest)

    def refresh(self) -> None:
        """Before a send: copy the tensors' current values to the stand-ins."""
        for i, stand_in in self._stand_ins.items():
            stand_in.copy_(self._tensors[i])

    def deliver(self) -> None:
        """After a receive: copy from stand-ins, and to tied tensors with memory of their own."""
        for i, stand_in in self._stand_ins.items():
            self._tensors[i].copy_(stand_in)
        for i, original in self._ties:
            if self._tensors[i].data_ptr() != self._tensors[original].data_ptr():
                self._tensors[i].copy_(self._tensors[original])
        increment_version([self._tensors[i] for i, _ in self._ties])
        self._newest = record_caller_stream(self._device)

    def _bound(
        self, chunks: Sequence[ReplayChunk], rows: Rows | None, device: torch.device
    ) -> list[BoundChunk]:
        owns = [self._own(chunk) for chunk in chunks]
        tables: Sequence[torch.Tensor] | None = None
        if rows is not None:
            starts = torch.tensor([data.data_ptr() for data in self._whole], dtype=torch.int64)
            tables = tables_of(rows, starts, device, [own is None for own in owns])
        bound = []
        for chunk, own in zip(chunks, owns, strict=True):
            table, memory = None, []
            if own is None and tables is not None:
                table = tables[chunk.index]
            elif own is None:
                memory = [self._run(part) for part in chunk.parts]
            plan = (chunk.index, chunk.root, chunk.nbytes, chunk.parts, chunk.needs_slot)
            is_last = chunk.index == len(chunks) - 1
            bound.append(BoundChunk(*plan, own, table, memory, is_last))
        return bound

    def _own(self, chunk: ReplayChunk) -> torch.Tensor | None:
        """The chunk's bytes if they are one aligned run, which needs no copy.

        The other ranks may use a slot, since the chunk's bytes are the same.
        """
        if len(chunk.parts) > 1:
            return None
        run = self._run(chunk.parts[0])
        return run if run.data_ptr() % _WORD == 0 else None

    def _run(self, part: Part) -> torch.Tensor:
        return self._whole[part.tensor][part.offset : part.offset + part.nbytes]

    def _bytes_of(
        self, index: int, spec: TensorSpec, device: torch.device, *, alone: bool
    ) -> torch.Tensor:
        """The tensor's bytes or its stand-in's; a tied tensor's are not used."""
        if not spec.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        tensor = self._tensors[index]
        data = as_bytes(spec.name, tensor, device)
        if alone and data.data_ptr() % _WORD:
            data = data.clone()
        if data.device != tensor.device or data.data_ptr() != tensor.data_ptr():
            self._stand_ins[index] = data.view(tensor.dtype).view(tensor.shape)
        return data

    def _subset(self, indices: Iterable[int]) -> _Subset:
        chosen = list(indices)
        tensors = [self._tensors[i] for i in chosen]
        return _Subset(chosen, tensors, [self._addresses[i] for i in chosen])

    def _check(self, subset: _Subset) -> None:
        now = list(map(torch.Tensor.data_ptr, subset.tensors))
        if now != subset.addresses:
            pairs = zip(subset.indices, now, subset.addresses, strict=True)
            moved = next(self._names[i] for i, address, bound in pairs if address != bound)
            raise UsageError(
                f"the memory of tensor {moved} was freed or moved since it was bound",
                hint="bind the tensors again once they have their memory back",
            )

    @staticmethod
    def _checked(spec: TensorSpec, tensors: Tensors) -> torch.Tensor:
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise UsageError(f"tensor {spec.name} of the plan is not given")
        check_plain(spec.name, tensor)
        if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
            raise UsageError(
                f"tensor {spec.name} is {tensor.dtype} {tuple(tensor.shape)}, but"
                f" {spec.dtype} {spec.shape} in the plan"
            )
        return tensor


class Copier:
    """Copies a chunk's parts into its slot, or out of it, with one call for all of them."""

    stage: Stage = "unpack"

    def __init__(self, ring: Ring, move: Move | None) -> None:
        self._ring = ring
        self._move = move
        self._views: dict[int, list[torch.Tensor]] = {}  # of the slots, by chunk

    def wait_for_caller(self) -> None:
        """Before a run: make the streams wait for the caller's, which may still use the tensors.

        Once per run is enough, since no code of the caller runs in between. The communication
        stream waits too, for chunks that are broadcast in place.
        """
        given = record_caller_stream(self._ring.device)
        for stream in (self._ring.fill, self._ring.comm, self._ring.drain):
            stream.wait(given)

    def fill(self, chunk: BoundChunk, slot: Slot) -> None:
        """Enqueue the copies into the slot on the fill stream."""
        ring = self._ring
        if chunk.own is not None:
            return
        with ring.fill:
            begin = ring.fill.begin()
            if chunk.table is not None and self._move is not None:
                self._move(chunk.table, slot.memory, into_slot=True, alone=chunk.index == 0)
            else:
                torch._foreach_copy_(self._views_of(chunk, slot), list(chunk.memory))
            slot.filled = ring.fill.record()
        ring.clock.span("pack", chunk.index, chunk.nbytes, begin, slot.filled)

    def drain(self, chunk: BoundChunk, slot: Slot) -> None:
        """Enqueue the copies out of the slot on the drain stream."""
        ring = self._ring
        if chunk.own is not None:
            return
        ring.drain.wait(slot.arrived)
        with ring.drain:
            begin = ring.drain.begin()
            if chunk.table is not None and self._move is not None:
                self._move(chunk.table, slot.memory, into_slot=False, alone=chunk.is_last)
            else:
                torch._foreach_copy_(list(chunk.memory), self._views_of(chunk, slot))
            slot.drained = ring.drain.record()
        ring.clock.span("unpack", chunk.index, chunk.nbytes, begin, slot.drained)

    def finish(self) -> None:
        """Make the caller's stream wait for the last broadcast and the last copy."""
        for stream in (self._ring.comm, self._ring.drain):
            make_caller_wait(self._ring.device, stream.record())

    def close(self) -> None:
        """It has no threads."""

    def _views_of(self, chunk: BoundChunk, slot: Slot) -> list[torch.Tensor]:
        if chunk.index not in self._views:
            self._views[chunk.index] = [
                slot.memory[part.slot_offset : part.slot_offset + part.nbytes]
                for part in chunk.parts
            ]
        return self._views[chunk.index]
