"""Plan once, send often: the same tensors, every step, with the work per tensor done once.

A pair of objects over one group. The sender's plan travels in band when the pair is made, so a
receiver can start from nothing, and every rank has compared it before the first tensor moves.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress

import torch

from packcast.errors import TransferError, UsageError
from packcast.packed.binding import Bound, Copier, Tensors
from packcast.packed.communicator import Communicator, communicator_of
from packcast.packed.counters import wanted_counters
from packcast.packed.gather import move_on
from packcast.packed.layout import (
    TensorSpec,
    check_plan,
    describe,
    digest_of,
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
_MAGIC = b"packrep3"  # the digit counts up with what a plan means: here its layout
_OTHER_PLAN = bytes(16)  # in a digest's place

Look = tuple[str, tuple[int, ...], torch.dtype]

OnTensor = Callable[[str, torch.Tensor], object]


class ReplaySender:
    """The end on rank `src` of `group`; all other ranks make a ReplayReceiver at the same time.

    `tensors` maps names to tensors (their values do not matter yet) or is a list of TensorSpec.
    Tensors that are one in memory travel once. `group` is a torch process group, or any object
    with `broadcast(tensor, src=...)` on the current stream. A pair may be made and used inside
    `torch.inference_mode` and outside, in any order.

    Device memory, for as long as the object lives: `num_buffers` x `buffer_size` bytes (a slot is
    no larger than the largest chunk that needs one, and there are no more of them than chunks), a
    copy of each tensor that is not contiguous or not on the group's device, and 24 bytes for every
    tensor below `buffer_size`, or every 64 KiB of one. A tensor of `buffer_size` or more is sent
    from where it lies, or from a copy if that is not at a multiple of 16 bytes. The object holds on
    to the tensors that it was last given, and to those that are bound.

    Raises UsageError for tensors that have no plain bytes, for a `src` that is not this rank and
    for a group that is disabled, and TransferError on every rank if a receiver expects another
    plan (over a bare communicator that does not tell `rank` and `world_size` only the receivers
    can know).
    """

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
        except ValueError as error:
            raise UsageError(str(error)) from error
        communicator = communicator_of(group)
        communicator.check_src(src, sends=True)
        description = describe(self.specs, buffer_size, num_buffers)
        _tell(communicator, src, description)
        agree(communicator, src, digest_of(description))
        self._replay = _Replay(communicator, self.specs, buffer_size, num_buffers, src)

    def bind(self, tensors: Tensors) -> None:
        """Look at the tensors once, for every `send` without an argument; local to this rank.

        Each such `send` sends what this memory holds then. Values may change in between, the
        tensors' memory and shape must not: on a CPU memory that was freed is a UsageError, on a
        GPU, and where a `.data` was swapped, it is not noticed.
        """
        self._replay.bind(tensors, fill=True)

    def send(self, tensors: Tensors | None = None) -> None:
        """Send the values that `tensors` have now; every receiver calls `receive` meanwhile.

        `tensors` are those of the plan by name, of the same shapes and dtypes, on any device;
        others beside them are ignored. Ordered after the caller's current stream, over when this
        returns. Giving the same tensors each time only compares where they lie, about half a
        microsecond for each; `bind` them, and give none, to save that too.
        """
        replay = self._replay
        bound = replay.bound if tensors is None else replay.look_at(tensors, fill=True)
        if bound is None:
            raise UsageError("no tensors are bound", hint="give them to send(), or to bind() first")
        replay.run(replay.src, bound, fill=True)


class ReplayReceiver:
    """The end on every rank but `src`; see ReplaySender.

    `expected`, if given, must be the sender's plan: tensors or specs by name, in its order.
    `specs` tells the names, shapes and dtypes that the sender announced.
    """

    def __init__(
        self, group: object, src: int, expected: Tensors | Sequence[TensorSpec] | None = None
    ) -> None:
        wanted = None if expected is None else _looks_of(expected)
        communicator = communicator_of(group)
        communicator.check_src(src, sends=False)
        description = _hear(communicator, src)
        try:
            self.specs, buffer_size, num_buffers = understand(description)
            if wanted is not None:
                _compare(_looks_of(self.specs), wanted)
        except TransferError:
            with suppress(TransferError):  # the others have to hear of it first
                agree(communicator, src, _OTHER_PLAN)
            raise
        agree(communicator, src, digest_of(description))
        self._replay = _Replay(communicator, self.specs, buffer_size, num_buffers, src)

    def bind(self, into: Tensors) -> None:
        """Look at the tensors once, for every `receive` without `into`; local to this rank.

        From now on those land in this memory, and return one and the same dict. The tensors'
        memory and shape must stay as they are: on a CPU memory that was freed is a UsageError, on
        a GPU, and where a `.data` was swapped, it is not noticed. Nor is autograd told there of
        what a run has written. Raises UsageError for tensors that overlap.
        """
        self._replay.bind(into, fill=False)

    def receive(
        self, into: Tensors | None = None, *, callback: OnTensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Take part in one `send`; returns the received tensors by name.

        With `into`, values are written into these tensors (all of the plan's names, same shapes
        and dtypes, on any device, none overlapping), and they are what is returned; for autograd
        they count as changed in place. Without, those that are bound
        are, and if none are, new tensors are made; tied ones are one tensor under two names.
        `callback(name, tensor)` is called for each in order, at the end, on the caller's stream.
        Ordered after the caller's current stream, over when this returns.
        """
        replay = self._replay
        if into is not None:
            bound = replay.look_at(into, fill=False)
            received = bound.named(into)
            mark_changed(received.values())
        elif replay.bound is not None:
            bound, received = replay.bound, replay.named
        else:
            received = replay.new_tensors()
            bound = replay.bound_to(received)  # the caller's, and may be many: not kept
        replay.run(NOBODY, bound, fill=False)
        if callback is not None:
            for name, tensor in received.items():
                callback(name, tensor)
        return received


class _Replay:
    """What both ends hold: the plan, the ring, and the copies of each chunk, worked out once."""

    def __init__(
        self,
        communicator: Communicator,
        specs: tuple[TensorSpec, ...],
        buffer_size: int,
        num_buffers: int,
        src: int,
    ) -> None:
        self.src = src
        self._communicator = communicator
        self._specs = specs
        self._chunks = lay_out(specs, buffer_size, src)
        slot_nbytes = slot_nbytes_of(self._chunks)
        with _any_mode():
            num_slots = max(1, min(num_buffers, len(self._chunks)))
            self._ring = Ring(communicator.device, slot_nbytes, num_slots)
            self._move = move_on(communicator.device)
            self._rows = rows_of(self._chunks) if self._move is not None else None
        self._views: dict[int, list[torch.Tensor]] = {}
        self._seen: Bound | None = None  # of the tensors that were last given
        self.bound: Bound | None = None
        self.named: dict[str, torch.Tensor] = {}

    def bind(self, tensors: Tensors, *, fill: bool) -> None:
        """Keep the tensors for runs that are given none."""
        self.bound = self._checked(tensors, fill=fill)
        self.named = self.bound.named(tensors)

    def look_at(self, tensors: Tensors, *, fill: bool) -> Bound:
        """The tensors bound; again as they were last time if they are the same."""
        if self._seen is None or not self._seen.is_of(tensors):
            self._seen = None  # its stand-ins' memory may be wanted for the next ones'
            self._seen = self._checked(tensors, fill=fill)
        return self._seen

    def bound_to(self, tensors: Tensors) -> Bound:
        """The tensors bound; raises UsageError for those that are not the plan's."""
        device = self._communicator.device
        with _any_mode():
            return Bound(self._specs, self._chunks, tensors, device, self._rows)

    def _checked(self, tensors: Tensors, *, fill: bool) -> Bound:
        bound = self.bound_to(tensors)
        if fill:
            bound.check_ties()
        else:
            bound.check_apart()
        return bound

    def run(self, rank: int, bound: Bound, *, fill: bool) -> None:
        """One send, or one receive."""
        with _any_mode():
            self._run(rank, bound, fill=fill)

    def _run(self, rank: int, bound: Bound, *, fill: bool) -> None:
        ring = self._ring
        again = bound is self.bound  # who gives tensors has just had them looked at
        if again:
            bound.check_is_there()
        bound.follow()
        if fill:
            bound.refresh()
        ring.rewind(wanted_counters())
        copier = Copier(ring, self._move, self._views)
        try:
            run_pipeline(
                bound.chunks_again(write=not fill) if again else bound.chunks,
                rank=rank,
                ring=ring,
                broadcast=self._communicator.broadcast,
                source=copier if fill else None,
                drain=None if fill else copier,
            )
        except BaseException:
            ring.synchronize()
            raise
        if not fill:
            bound.deliver()

    def new_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors to receive into; tied ones are one."""
        made: dict[str, torch.Tensor] = {}
        device = self._communicator.device
        for spec in self._specs:
            made[spec.name] = (
                made[spec.same_as]
                if spec.same_as
                else torch.empty(spec.shape, dtype=spec.dtype, device=device)
            )
        return made


def _any_mode() -> AbstractContextManager[object]:
    """What a pair keeps is made outside inference mode, and used there: then it does not matter
    in which mode the caller is, now and the next time.
    """
    return torch.inference_mode(False)


def agree(communicator: Communicator, src: int, mine: bytes) -> None:
    """Compare plans' digests before anything moves; all ranks call it.

    Every rank shows its own in turn where the communicator tells ranks, so that all of them
    raise TransferError together; else only the sender shows, and only the receivers compare.
    """
    shown = range(communicator.world_size) if communicator.world_size else (src,)
    seen = {rank: _exchange(communicator, rank, mine) for rank in shown}
    differing = [str(rank) for rank, digest in seen.items() if digest != mine]
    if len(differing) == 1:
        raise TransferError(f"rank {differing[0]} expects another plan")
    if differing:
        raise TransferError(f"ranks {', '.join(differing)} expect another plan")


def _tell(communicator: Communicator, src: int, description: bytes) -> None:
    _exchange(communicator, src, _HELLO.pack(_MAGIC, len(description)))
    _exchange(communicator, src, description)


def _hear(communicator: Communicator, src: int) -> bytes:
    magic, length = _HELLO.unpack(_exchange(communicator, src, bytes(_HELLO.size)))
    if magic != _MAGIC or not 0 < length <= _MAX_DESCRIPTION:
        raise TransferError(f"rank {src} is no replay sender, or one of another version")
    return _exchange(communicator, src, bytes(length))


def _exchange(communicator: Communicator, root: int, mine: bytes) -> bytes:
    """What `root` shows, in as many bytes as `mine`; on the root itself that is `mine`."""
    data = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(communicator.device)
    communicator.broadcast(data, root)
    landed = data.cpu()  # named, since a view does not keep it alive
    return bytes(host_view(landed))


def _looks_of(tensors: Tensors | Sequence[TensorSpec]) -> list[Look]:
    """What has to be alike on both ends; ties may differ, and the tensors may be on meta."""
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
