"""Plan once, send often: the same tensors every step, with the work per tensor done once.

A pair of objects over one group. The sender's plan travels in band when the pair is made, so a
receiver needs to know nothing, and all ranks compare plans before the first tensor moves.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import ClassVar

import torch
import xxhash

from packcast.errors import TransferError, UsageError
from packcast.packed.binding import Bound, Copier, Tensors
from packcast.packed.communicator import Communicator, communicator_of
from packcast.packed.counters import wanted_counters
from packcast.packed.gather import move_on
from packcast.packed.layout import (
    TensorSpec,
    check_plan,
    describe,
    lay_out,
    rows_of,
    slot_nbytes_of,
    specs_of,
    understand,
)
from packcast.packed.pipeline import run_pipeline
from packcast.packed.ring import NOBODY, Ring, host_view
from packcast.packed.tensor_bytes import check_plain, check_shaped, mark_changed

DEFAULT_REPLAY_BUFFER_SIZE = 64 << 20
DEFAULT_REPLAY_NUM_BUFFERS = 4
_MAX_DESCRIPTION = 1 << 30
_HELLO = struct.Struct("<8sQ")
_MAGIC = b"packrep3"  # the digit is the version of the layout

Look = tuple[str, tuple[int, ...], torch.dtype]

OnTensor = Callable[[str, torch.Tensor], object]


class _ReplayEnd:
    """What both ends hold: the plan, the ring and the tensors bound to them."""

    specs: tuple[TensorSpec, ...]
    _sends: ClassVar[bool]

    def _set_up(
        self, communicator: Communicator, src: int, buffer_size: int, num_buffers: int
    ) -> None:
        self._communicator = communicator
        self._rank = src if self._sends else NOBODY
        self._chunks = lay_out(self.specs, buffer_size, src)
        with _any_mode():
            num_slots = max(1, min(num_buffers, len(self._chunks)))
            self._ring = Ring(communicator.device, slot_nbytes_of(self._chunks), num_slots)
            move = move_on(communicator.device)
            self._rows = None if move is None else rows_of(self._chunks)
            self._copier = Copier(self._ring, move)
        self._seen: Bound | None = None  # of the tensors last given to a run
        self._bound: Bound | None = None
        self._named: dict[str, torch.Tensor] = {}

    def _bind(self, tensors: Tensors) -> None:
        self._bound = self._checked(tensors)
        self._named = self._bound.named(tensors)

    def _look_at(self, tensors: Tensors) -> Bound:
        """The tensors bound; reused if they are those of the last time."""
        if self._seen is None or not self._seen.is_of(tensors):
            self._seen = None  # first free the memory of its stand-ins
            self._seen = self._checked(tensors)
        return self._seen

    def _checked(self, tensors: Tensors) -> Bound:
        bound = self._bound_to(tensors)
        if self._sends:
            bound.check_ties()
        else:
            bound.check_apart()
        return bound

    def _bound_to(self, tensors: Tensors) -> Bound:
        device = self._communicator.device
        with _any_mode():
            return Bound(self.specs, self._chunks, tensors, device, self._rows)

    def _run(self, bound: Bound) -> None:
        """One send, or one receive."""
        ring, copier = self._ring, self._copier
        again = bound is self._bound  # else its tensors have just been looked at
        with _any_mode():
            if again:
                bound.check_is_there()
            bound.follow()
            if self._sends:
                bound.refresh()
            ring.rewind(wanted_counters())
            copier.wait_for_caller()
            run_pipeline(
                bound.chunks_again(write=not self._sends) if again else bound.chunks,
                rank=self._rank,
                ring=ring,
                broadcast=self._communicator.broadcast,
                source=copier if self._sends else None,
                drain=None if self._sends else copier,
                on_failure=lambda _error: ring.synchronize(),
            )
            if not self._sends:
                bound.deliver()


class ReplaySender(_ReplayEnd):
    """The end on rank `src` of `group`; all other ranks make a ReplayReceiver at the same time.

    `tensors` maps names to tensors (their values do not matter yet) or is a list of TensorSpec.
    Tensors that share all their memory travel once. `group` is a torch process group, or any object
    with `broadcast(tensor, src=...)` on the current stream. A pair may be made and used inside and
    outside `torch.inference_mode`, in any order.

    Device memory while the object lives: `num_buffers` x `buffer_size` bytes (a slot is no larger
    than the largest chunk that needs one, and there are no more slots than chunks), a copy of each
    tensor that is not contiguous or not on the group's device, and 24 bytes for every tensor below
    `buffer_size`, or every 64 KiB of one. A tensor of `buffer_size` or more is sent in place, or
    from a copy if its address is not a multiple of 16 bytes. The object keeps references to the
    tensors given last and to those that are bound.

    Raises UsageError for tensors that have no plain bytes, for a `src` that is not this rank and
    for a group that is disabled, and TransferError on every rank if a receiver expects another
    plan (only on receivers, over a bare communicator without `rank` and `world_size`).
    """

    _sends = True

    def __init__(
        self,
        tensors: Tensors | Sequence[TensorSpec],
        group: object,
        src: int,
        *,
        buffer_size: int = DEFAULT_REPLAY_BUFFER_SIZE,
        num_buffers: int = DEFAULT_REPLAY_NUM_BUFFERS,
    ) -> None:
        if isinstance(tensors, Mapping):
            for name, tensor in tensors.items():
                check_plain(name, tensor)
        self.specs = specs_of(tensors) if isinstance(tensors, Mapping) else tuple(tensors)
        try:
            check_plan(self.specs, buffer_size, num_buffers)
            description = describe(self.specs, buffer_size, num_buffers)
        except ValueError as error:
            raise UsageError(str(error)) from error
        communicator = communicator_of(group)
        communicator.check_src(src, sends=True)
        _exchange(communicator, src, _HELLO.pack(_MAGIC, len(description)))
        _exchange(communicator, src, description)
        _agree(communicator, src, description)
        self._set_up(communicator, src, buffer_size, num_buffers)

    def bind(self, tensors: Tensors) -> None:
        """Look at the tensors once, for every `send()` without an argument; local to this rank.

        Each such `send` sends the current values of this memory. Values may change in between, the
        tensors' memory and shape must not: on a CPU, freed memory is a UsageError; on a GPU, and
        after `.data` was replaced, it is not noticed.
        """
        self._bind(tensors)

    def send(self, tensors: Tensors | None = None) -> None:
        """Send the current values of `tensors`; every receiver calls `receive` meanwhile.

        `tensors` are the plan's by name, of the same shapes and dtypes, on any device; others are
        ignored. Ordered after the caller's current stream, complete on return. With the same
        tensors each time, `send` only compares their addresses, about half a microsecond for each;
        `bind` them and give none to save that too.
        """
        bound = self._bound if tensors is None else self._look_at(tensors)
        if bound is None:
            raise UsageError("no tensors are bound", hint="give them to send(), or to bind() first")
        self._run(bound)


class ReplayReceiver(_ReplayEnd):
    """The end on every rank but `src`; see ReplaySender.

    `expected`, if given, must be the sender's plan: tensors or specs by name, in its order.
    `specs` has the names, shapes and dtypes that the sender announced.
    """

    _sends = False

    def __init__(
        self, group: object, src: int, expected: Tensors | Sequence[TensorSpec] | None = None
    ) -> None:
        wanted = None if expected is None else _looks_of(expected)
        communicator = communicator_of(group)
        communicator.check_src(src, sends=False)
        magic, length = _HELLO.unpack(_exchange(communicator, src, bytes(_HELLO.size)))
        if magic != _MAGIC or not 0 < length <= _MAX_DESCRIPTION:
            raise TransferError(f"rank {src} is no replay sender, or one of another version")
        description = _exchange(communicator, src, bytes(length))
        try:
            self.specs, buffer_size, num_buffers = understand(description)
            if wanted is not None:
                _compare(_looks_of(self.specs), wanted)
        except TransferError:
            with suppress(TransferError):  # first notify the other ranks
                _agree(communicator, src, None)
            raise
        _agree(communicator, src, description)
        self._set_up(communicator, src, buffer_size, num_buffers)

    def bind(self, into: Tensors) -> None:
        """Look at the tensors once, for every `receive()` without `into`; local to this rank.

        Each such `receive` writes into this memory and returns the same dict. The tensors' memory
        and shape must stay as they are: on a CPU, freed memory is a UsageError; on a GPU, and after
        `.data` was replaced, it is not noticed. On a GPU, autograd is not notified of the writes
        either. Raises UsageError for tensors that overlap.
        """
        self._bind(into)

    def receive(
        self, into: Tensors | None = None, *, callback: OnTensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Take part in one `send`; returns the received tensors by name.

        With `into`, values are written into these tensors (all of the plan's names, same shapes
        and dtypes, on any device, none overlapping), which are returned; for autograd they count as
        changed in place. Without, values are written into the bound tensors, or into new ones if
        none are bound; tied ones are then one tensor under two names. `callback(name, tensor)` is
        called for each in order, at the end, on the caller's stream. Ordered after the caller's
        current stream, complete on return.
        """
        if into is not None:
            bound = self._look_at(into)
            received = bound.named(into)
            mark_changed(received.values())
        elif self._bound is not None:
            bound, received = self._bound, self._named
        else:
            received = self._new_tensors()
            bound = self._bound_to(received)  # not kept: the tensors are the caller's
        self._run(bound)
        if callback is not None:
            for name, tensor in received.items():
                callback(name, tensor)
        return received

    def _new_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        device = self._communicator.device
        for spec in self.specs:
            tensors[spec.name] = (
                tensors[spec.same_as]
                if spec.same_as
                else torch.empty(spec.shape, dtype=spec.dtype, device=device)
            )
        return tensors


def _any_mode() -> AbstractContextManager[object]:
    """Outside inference mode, where all that a pair keeps is made and used."""
    return torch.inference_mode(False)


def _agree(communicator: Communicator, src: int, description: bytes | None) -> None:
    """Compare plans before anything moves; all ranks call it, with None for "another plan".

    If the communicator has ranks, each broadcasts its plan's digest, so that all of them raise
    TransferError together; else only the sender does, and only the receivers compare.
    """
    mine = bytes(16) if description is None else xxhash.xxh3_128_digest(description)
    roots = range(communicator.world_size) if communicator.world_size else (src,)
    digests = {rank: _exchange(communicator, rank, mine) for rank in roots}
    differing = [str(rank) for rank, digest in digests.items() if digest != mine]
    if len(differing) == 1:
        raise TransferError(f"rank {differing[0]} expects another plan")
    if differing:
        raise TransferError(f"ranks {', '.join(differing)} expect another plan")


def _exchange(communicator: Communicator, root: int, mine: bytes) -> bytes:
    """What `root` broadcasts, as many bytes as `mine`; on the root itself that is `mine`."""
    data = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(communicator.device)
    communicator.broadcast(data, root)
    landed = data.cpu()  # named, since the view does not keep it alive
    return bytes(host_view(landed))


def _looks_of(tensors: Tensors | Sequence[TensorSpec]) -> list[Look]:
    """What both ends must have in common; ties may differ, and tensors may be on meta."""
    if isinstance(tensors, Mapping):
        for name, tensor in tensors.items():
            check_shaped(name, tensor)
        return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    return [(spec.name, tuple(spec.shape), spec.dtype) for spec in tensors]


def _compare(theirs: Sequence[Look], mine: Sequence[Look]) -> None:
    """Raise TransferError naming the first difference."""
    for sent, wanted in zip(theirs, mine, strict=False):
        if sent != wanted:
            raise TransferError(
                f"this receiver expects another plan: {wanted[0]} {wanted[2]} {wanted[1]} where"
                f" the sender has {sent[0]} {sent[2]} {sent[1]}"
            )
    if len(theirs) != len(mine):
        raise TransferError(
            f"this receiver expects another plan: {len(mine)} tensors where the sender has"
            f" {len(theirs)}"
        )
