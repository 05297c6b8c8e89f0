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


class Bound:
    """The plan's tensors as bytes on the ring's device, cut into each chunk's parts.

    A tensor that is not contiguous, or elsewhere, has a stand-in there that is copied before a
    send and after a receive.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        chunks: Sequence[ReplayChunk],
        tensors: Tensors,
        device: torch.device,
    ) -> None:
        self._tensors = [self._checked(spec, tensors) for spec in specs]
        self._pointers = list(map(torch.Tensor.data_ptr, self._tensors))
        self._names = [spec.name for spec in specs]
        self._stand_ins: list[tuple[torch.Tensor, torch.Tensor]] = []
        whole = []
        for spec, tensor in zip(specs, self._tensors, strict=True):
            data = as_bytes(spec.name, tensor, device)
            if data.numel() and data.data_ptr() != tensor.data_ptr():
                stand_in = data.view(tensor.dtype).view(tensor.shape)
                self._stand_ins.append((tensor, stand_in))
            whole.append(data)
        self.parts = [
            [whole[part.tensor][part.offset : part.offset + part.nbytes] for part in chunk.parts]
            for chunk in chunks
        ]
        position = {spec.name: i for i, spec in enumerate(specs)}
        self._ties = [
            (self._tensors[i], self._tensors[position[spec.same_as]])
            for i, spec in enumerate(specs)
            if spec.same_as
        ]

    def is_of(self, tensors: Tensors) -> bool:
        """Whether these are the very tensors that this was made for, still in their places.

        Asked before every send, of every tensor: so without a line of Python for each.
        """
        return all(map(operator.is_, map(tensors.get, self._names), self._tensors)) and (
            list(map(torch.Tensor.data_ptr, self._tensors)) == self._pointers
        )

    def refresh(self) -> None:
        """Before a send: the stand-ins take the tensors' values of now."""
        for tensor, stand_in in self._stand_ins:
            stand_in.copy_(tensor.detach())

    @torch.no_grad()
    def deliver(self) -> None:
        """After a receive: stand-ins and ties hand their values on."""
        for tensor, stand_in in self._stand_ins:
            tensor.copy_(stand_in)
        for tensor, original in self._ties:
            if tensor is not original and tensor.data_ptr() != original.data_ptr():
                tensor.copy_(original)

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
    """Copies a chunk's parts into its slot, or out of it: one call for all of them."""

    stage: Stage = "unpack"

    def __init__(self, ring: Ring, bound: Bound) -> None:
        self._ring = ring
        self._bound = bound
        # The tensors are the caller's: what it has given its stream comes first. Once is enough,
        # since nothing of the caller's runs between here and the end.
        ring.fill.wait_for_caller(ring.device)
        ring.drain.wait_for_caller(ring.device)

    def fill(self, chunk: ReplayChunk, slot: Slot) -> None:
        """Give the copies into the slot to the fill lane."""
        ring = self._ring
        with ring.fill:
            begin = ring.fill.mark()
            torch._foreach_copy_(self._views(chunk, slot), self._bound.parts[chunk.index])
            slot.filled = ring.fill.mark()
        ring.clock.span("pack", chunk.index, chunk.nbytes, begin, slot.filled)

    def drain(self, chunk: ReplayChunk, slot: Slot) -> None:
        """Give the copies out of the slot to the drain lane."""
        ring = self._ring
        ring.drain.wait(slot.arrived)
        with ring.drain:
            begin = ring.drain.mark()
            torch._foreach_copy_(self._bound.parts[chunk.index], self._views(chunk, slot))
            slot.drained = ring.drain.mark()
        ring.clock.span("unpack", chunk.index, chunk.nbytes, begin, slot.drained)

    def finish(self) -> None:
        """The caller's stream goes on after the last copy."""
        hold_caller(self._ring.device, self._ring.drain.mark())

    def close(self) -> None:
        """It has no threads."""

    def _views(self, chunk: ReplayChunk, slot: Slot) -> list[torch.Tensor]:
        return [slot.memory[p.slot_offset : p.slot_offset + p.nbytes] for p in chunk.parts]
