"""A replay's tensors bound to its plan: as bytes on the ring's device, cut into chunks' parts once.

Then a chunk costs one call, whatever it holds.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch

from packcast.errors import UsageError
from packcast.packed.counters import Stage
from packcast.packed.lanes import hold_caller
from packcast.packed.layout import ReplayChunk, TensorSpec
from packcast.packed.ring import Ring, Slot
from packcast.packed.tensors import as_bytes, check_plain

Tensors = Mapping[str, torch.Tensor]

_DTYPE = operator.attrgetter("dtype")


class Bound:
    """The plan's tensors as bytes on the ring's device, cut into each chunk's parts.

    A tensor that is not contiguous, or elsewhere, has a stand-in there that is copied before a
    send and after a receive. Holds on to the tensors' memory.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        chunks: Sequence[ReplayChunk],
        tensors: Tensors,
        device: torch.device,
    ) -> None:
        self._specs = specs
        self._names = [spec.name for spec in specs]
        # Not the caller's own objects: those may be given other memory.
        self._tensors = [self._checked(spec, tensors).detach() for spec in specs]
        self._dtypes = [spec.dtype for spec in specs]
        self._stand_ins: list[tuple[torch.Tensor, torch.Tensor]] = []
        whole = [
            self._whole(spec, tensor, device)
            for spec, tensor in zip(specs, self._tensors, strict=True)
        ]
        self.parts = [
            [whole[part.tensor][part.offset : part.offset + part.nbytes] for part in chunk.parts]
            for chunk in chunks
        ]
        position = {spec.name: i for i, spec in enumerate(specs)}
        self._ties = [(i, position[spec.same_as]) for i, spec in enumerate(specs) if spec.same_as]

    def is_of(self, tensors: Tensors) -> bool:
        """Whether these are the memory that this was made for, of the same shape and strides.

        Asked before every send, of every tensor: so without a line of Python for each. The
        objects may be others: a model's `state_dict()` makes new ones each time.
        """
        try:
            given = list(map(tensors.__getitem__, self._names))
            return list(map(_DTYPE, given)) == self._dtypes and all(
                map(torch.Tensor.is_set_to, given, self._tensors)
            )
        except (KeyError, AttributeError, TypeError, RuntimeError):  # missing, or no plain bytes
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

    def refresh(self) -> None:
        """Before a send: the stand-ins take the tensors' values of now."""
        for tensor, stand_in in self._stand_ins:
            stand_in.copy_(tensor)

    def deliver(self) -> None:
        """After a receive: stand-ins and ties hand their values on."""
        for tensor, stand_in in self._stand_ins:
            tensor.copy_(stand_in)
        for i, original in self._ties:
            if self._tensors[i].data_ptr() != self._tensors[original].data_ptr():
                self._tensors[i].copy_(self._tensors[original])

    def _whole(self, spec: TensorSpec, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The tensor's bytes, its own or a stand-in's; a tied one's are never asked for."""
        if not spec.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        data = as_bytes(spec.name, tensor, device)
        if data.device != tensor.device or data.data_ptr() != tensor.data_ptr():
            self._stand_ins.append((tensor, data.view(tensor.dtype).view(tensor.shape)))
        return data

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

    def __init__(self, ring: Ring, bound: Bound, views: dict[int, list[torch.Tensor]]) -> None:
        self._ring = ring
        self._bound = bound
        self._views = views
        # The tensors are the caller's: what it has given its stream comes first. Once is enough,
        # since nothing of the caller's runs between here and the end.
        ring.fill.wait_for_caller(ring.device)
        ring.drain.wait_for_caller(ring.device)

    def fill(self, chunk: ReplayChunk, slot: Slot) -> None:
        """Give the copies into the slot to the fill lane."""
        ring = self._ring
        with ring.fill:
            begin = ring.fill.mark()
            torch._foreach_copy_(self._places(chunk, slot), self._bound.parts[chunk.index])
            slot.filled = ring.fill.mark()
        ring.clock.span("pack", chunk.index, chunk.nbytes, begin, slot.filled)

    def drain(self, chunk: ReplayChunk, slot: Slot) -> None:
        """Give the copies out of the slot to the drain lane."""
        ring = self._ring
        ring.drain.wait(slot.arrived)
        with ring.drain:
            begin = ring.drain.mark()
            torch._foreach_copy_(self._bound.parts[chunk.index], self._places(chunk, slot))
            slot.drained = ring.drain.mark()
        ring.clock.span("unpack", chunk.index, chunk.nbytes, begin, slot.drained)

    def finish(self) -> None:
        """The caller's stream goes on after the last copy."""
        hold_caller(self._ring.device, self._ring.drain.mark())

    def close(self) -> None:
        """It has no threads."""

    def _places(self, chunk: ReplayChunk, slot: Slot) -> list[torch.Tensor]:
        if chunk.index not in self._views:
            self._views[chunk.index] = [
                slot.memory[part.slot_offset : part.slot_offset + part.nbytes]
                for part in chunk.parts
            ]
        return self._views[chunk.index]
