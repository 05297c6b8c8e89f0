"""Plan once, send often: the same tensors, every step, with the work per tensor done once.

A pair of objects over one group. The sender's plan travels in band when the pair is made, so a
receiver can start from nothing, and every rank has compared it before the first tensor moves.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch

from packcast.errors import TransferError, UsageError
from packcast.packed.binding import Bound, Copier, Tensors
from packcast.packed.communicator import Communicator, communicator_of
from packcast.packed.counters import Counters
from packcast.packed.layout import (
    TensorSpec,
    check_plan,
    describe,
    digest_of,
    lay_out,
    specs_of,
    understand,
)
from packcast.packed.pipeline import run_pipeline
from packcast.packed.ring import NOBODY, Ring, host_view
from packcast.packed.tensors import check_plain

DEFAULT_REPLAY_BUFFER_SIZE = 64 << 20
DEFAULT_REPLAY_NUM_BUFFERS = 4
_MAX_DESCRIPTION = 1 << 30
_HELLO = struct.Struct("<8sQ")
_MAGIC = b"packrep1"
_OTHER_PLAN = bytes(16)  # in a digest's place

Look = tuple[str, tuple[int, ...], torch.dtype]

OnTensor = Callable[[str, torch.Tensor], object]


class ReplaySender:
    """The end on rank `src` of `group`; all other ranks make a ReplayReceiver at the same time.

    `tensors` maps names to tensors (their values do not matter yet) or is a list of TensorSpec.
    Tensors that are one in memory travel once. `group` is a torch process group, or any object
    with `broadcast(tensor, src=...)` on the current stream. Device memory, for as long as the
    object lives: `num_buffers` x `buffer_size` bytes (a slot is no larger than the largest chunk),
    and a copy of each tensor that is not contiguous or not on the group's device. The object holds
    on to the tensors that it was last given.

    Raises UsageError for tensors that have no plain bytes, and TransferError on every rank if a
    receiver expects another plan (over a bare communicator that does not tell `rank` and
    `world_size` only the receivers can know).
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
        description = describe(self.specs, buffer_size, num_buffers)
        _tell(communicator, src, description)
        agree(communicator, src, digest_of(description))
        self._replay = _Replay(communicator, self.specs, buffer_size, num_buffers, src)

    def send(self, tensors: Tensors) -> None:
        """Send the values that `tensors` have now; every receiver calls `receive` meanwhile.

        `tensors` are those of the plan by name, of the same shapes and dtypes, on any device;
        others beside them are ignored. Ordered after the caller's current stream, over when this
        returns. Giving the same tensors each time saves looking at each of them again.
        """
        self._replay.run(self._replay.src, tensors, fill=True)


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

    def receive(
        self, into: Tensors | None = None, *, callback: OnTensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Take part in one `send`; returns the received tensors by name.

        With `into`, values are written into these tensors (all of the plan's names, same shapes
        and dtypes, on any device), and they are what is returned. Without, new tensors are made;
        tied ones are one tensor under two names. `callback(name, tensor)` is called for each
        in order, at the end, on the caller's stream. Ordered after the caller's current stream,
        over when this returns.
        """
        tensors = into
        if tensors is None:
            self._replay.forget()
            tensors = self._replay.new_tensors()
        self._replay.run(NOBODY, tensors, fill=False)
        if into is None:
            self._replay.forget()  # they are the caller's, and may be many
        received = {spec.name: tensors[spec.name] for spec in self.specs}
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
        largest = max((chunk.nbytes for chunk in self._chunks), default=0)
        self._ring = Ring(communicator.device, largest, num_buffers, Counters())
        self._bound: Bound | None = None
        self._views: dict[int, list[torch.Tensor]] = {}

    def run(self, rank: int, tensors: Tensors, *, fill: bool) -> None:
        """One send, or one receive."""
        bound, ring = self._bound, self._ring
        if bound is None or not bound.is_of(tensors):
            bound = Bound(self._specs, self._chunks, tensors, self._communicator.device)
            if fill:
                bound.check_ties()
            self._bound = bound
        if fill:
            bound.refresh()
        ring.rewind()
        copier = Copier(ring, bound, self._views)
        try:
            run_pipeline(
                self._chunks,
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

    def forget(self) -> None:
        """Let go of the tensors of the last run."""
        self._bound = None

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
