"""A replay's tensors bound to its plan: where each chunk's bytes are, worked out once.

Then a chunk costs one call, whatever it holds, or none where it is broadcast as it lies.
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
_WORD = (
    16  # what copies and broadcasts move at once; a tensor elsewhere than at its multiples is slow
)


@dataclass(frozen=True, slots=True)
class BoundChunk:
    """A chunk of the plan with the memory that its bytes come from, or go to.

    That is `own`, which needs no copy; else the `table` for the kernel; else `parts`.
    """

    plan: ReplayChunk
    own: torch.Tensor | None = None
    table: torch.Tensor | None = None
    parts: Sequence[torch.Tensor] = ()
    is_last: bool = False  # no broadcast runs beside its copies out of the slot

    @property
    def index(self) -> int:
        return self.plan.index

    @property
    def root(self) -> int:
        return self.plan.root

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes

    @property
    def wire_nbytes(self) -> int:
        return self.plan.nbytes


class _Looked(NamedTuple):
    """Some of the plan's tensors, by their indices, and where each lay when it was bound."""

    indices: Sequence[int]
    tensors: Sequence[torch.Tensor]
    addresses: Sequence[int]


class Bound:
    """The plan's tensors as bytes on the ring's device, cut into each chunk's parts.

    A tensor that is not contiguous, or elsewhere, has a stand-in there that is copied before a
    send and after a receive; so has one that a slot is too small for and that lies askew. With the
    plan's `rows`, chunks have tables for the kernel. Holds on to the tensors' memory.
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
        # Not the caller's own objects: those may be given other memory.
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
        self._by_chunk = [self._look(part.tensor for part in chunk.parts) for chunk in chunks]
        self._device = device
        self._newest = record_caller_stream(
            device
        )  # of its copies on callers' streams: tables, stand-ins

    def named(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Those of the plan, in its order."""
        return dict(zip(self._names, map(tensors.__getitem__, self._names), strict=True))

    def is_of(self, tensors: Tensors) -> bool:
        """Whether these are the memory that this was made for, of the same shape and strides.

        Asked before every send, of every tensor: so without a line of Python for each. The
        objects may be others: a model's `state_dict()` makes new ones each time. Addresses too: a
        storage that was freed and filled again (offloaded weights, FSDP's) is the same storage
        elsewhere, where the tables do not lead.
        """
        try:
            given = list(map(tensors.__getitem__, self._names))
            return (
                list(map(_DTYPE, given)) == self._dtypes
                and list(map(torch.Tensor.data_ptr, given)) == self._addresses
                and all(map(torch.Tensor.is_set_to, given, self._tensors))
            )
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError):  # no plain bytes
            return False

    def check_ties(self) -> None:
        """Before a send: raise UsageError where ties have come apart, or one would be lost."""
        for i, original in self._ties:
            if not self._tensors[i].is_set_to(self._tensors[original]):
                spec = self._specs[i]
                raise UsageError(
                    f"tensor {spec.name} shares the memory of {spec.same_as} in the plan, but"
                    " no longer does",
                    hint="make a new pair from the tensors as they are now",
                )

    def check_apart(self) -> None:
        """Before a receive: raise UsageError where two elements would land at one place."""
        check_apart(dict(zip(self._names, self._tensors, strict=True)))

    def check_is_there(self) -> None:
        """Before another run: raise UsageError where memory went that a stand-in or tie needs."""
        self._check(self._look([*self._stand_ins, *(i for i, _ in self._ties)]))

    def chunks_again(self, *, write: bool) -> Iterator[BoundChunk]:
        """The chunks for another run, each as the loop comes to it.

        On a CPU this raises UsageError for a tensor whose memory is no longer where it was bound,
        and with `write` the tensors count as changed, which autograd looks at. On a GPU that would
        take longer than the run: who binds tensors there answers for both.
        """
        if self._device.type == "cuda":
            yield from self.chunks
            return
        for chunk, looked in zip(self.chunks, self._by_chunk, strict=True):
            self._check(looked)
            if write:
                increment_version(looked.tensors)
            yield chunk

    def follow(self) -> None:
        """Before a run: what was copied on another stream, as when it was bound, comes first."""
        make_caller_wait(self._device, self._newest)

    def refresh(self) -> None:
        """Before a send: the stand-ins take the tensors' values of now."""
        for i, stand_in in self._stand_ins.items():
            stand_in.copy_(self._tensors[i])

    def deliver(self) -> None:
        """After a receive: stand-ins and ties hand their values on."""
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
        bound = [BoundChunk(chunk, own=self._own(chunk)) for chunk in chunks]
        copied = [chunk for chunk in bound if chunk.own is None]
        if rows is not None:
            starts = torch.tensor([data.data_ptr() for data in self._whole], dtype=torch.int64)
            tables = tables_of(rows, starts, device, [chunk.own is None for chunk in bound])
            for chunk in copied:
                index = chunk.index
                is_last = index == len(bound) - 1
                bound[index] = BoundChunk(chunk.plan, table=tables[index], is_last=is_last)
        else:
            for chunk in copied:
                parts = [self._run(part) for part in chunk.plan.parts]
                bound[chunk.index] = BoundChunk(chunk.plan, parts=parts)
        return bound

    def _own(self, chunk: ReplayChunk) -> torch.Tensor | None:
        """The chunk's bytes where they lie in one piece, and well: that needs no copy.

        The other ends need not do the same, since a chunk's bytes are the same in a slot.
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
        """The tensor's bytes, its own or a stand-in's; a tied one's are never asked for."""
        if not spec.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        tensor = self._tensors[index]
        data = as_bytes(spec.name, tensor, device)
        if alone and data.data_ptr() % _WORD:
            data = data.clone()
        if data.device != tensor.device or data.data_ptr() != tensor.data_ptr():
            self._stand_ins[index] = data.view(tensor.dtype).view(tensor.shape)
        return data

    def _look(self, indices: Iterable[int]) -> _Looked:
        chosen = list(indices)
        tensors = [self._tensors[i] for i in chosen]
        return _Looked(chosen, tensors, [self._addresses[i] for i in chosen])

    def _check(self, looked: _Looked) -> None:
        now = list(map(torch.Tensor.data_ptr, looked.tensors))
        if now != looked.addresses:
            pairs = zip(looked.indices, now, looked.addresses, strict=True)
            moved = next(self._names[i] for i, address, bound in pairs if address != bound)
            raise UsageError(
                f"the memory of tensor {moved} was freed, or is elsewhere, since it was bound",
                hint="bind the tensors again when they have their memory back",
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
    """Copies a chunk's parts into its slot, or out of it: one call for all of them.

    `views` keeps the places in the slots from one run to the next; it is the ring's own.
    """

    stage: Stage = "unpack"

    def __init__(self, ring: Ring, move: Move | None, views: dict[int, list[torch.Tensor]]) -> None:
        self._ring = ring
        self._move = move
        self._views = views
        # The tensors are the caller's: what it has given its stream comes first. Once is enough,
        # since nothing of the caller's runs between here and the end. The communication stream, for
        # the chunks that are broadcast as they lie.
        given = record_caller_stream(ring.device)
        for stream in (ring.fill, ring.comm, ring.drain):
            stream.wait(given)

    def fill(self, chunk: BoundChunk, slot: Slot) -> None:
        """Give the copies into the slot to the fill stream."""
        ring = self._ring
        if chunk.own is not None:
            return
        with ring.fill:
            begin = ring.fill.begin()
            if chunk.table is not None and self._move is not None:
                self._move(chunk.table, slot.memory, into_slot=True, alone=chunk.index == 0)
            else:
                torch._foreach_copy_(self._places(chunk, slot), list(chunk.parts))
            slot.filled = ring.fill.record()
        ring.clock.span("pack", chunk.index, chunk.nbytes, begin, slot.filled)

    def drain(self, chunk: BoundChunk, slot: Slot) -> None:
        """Give the copies out of the slot to the drain stream."""
        ring = self._ring
        if chunk.own is not None:
            return
        ring.drain.wait(slot.arrived)
        with ring.drain:
            begin = ring.drain.begin()
            if chunk.table is not None and self._move is not None:
                self._move(chunk.table, slot.memory, into_slot=False, alone=chunk.is_last)
            else:
                torch._foreach_copy_(list(chunk.parts), self._places(chunk, slot))
            slot.drained = ring.drain.record()
        ring.clock.span("unpack", chunk.index, chunk.nbytes, begin, slot.drained)

    def finish(self) -> None:
        """The caller's stream goes on after the last copy, and the last broadcast."""
        for stream in (self._ring.comm, self._ring.drain):
            make_caller_wait(self._ring.device, stream.record())

    def close(self) -> None:
        """It has no threads."""

    def _places(self, chunk: BoundChunk, slot: Slot) -> list[torch.Tensor]:
        if chunk.index not in self._views:
            self._views[chunk.index] = [
                slot.memory[part.slot_offset : part.slot_offset + part.nbytes]
                for part in chunk.plan.parts
            ]
        return self._views[chunk.index]
