"""What the tests of replays share: communicators, tensors that change, and recordings.

Ranks are threads over real gloo; where only one end matters, the other is a recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch

from packcast.packed import replay
from packcast.packed.layout import TensorSpec
from packcast.packed.replay import ReplayReceiver, ReplaySender
from packcast.packed.ring import Broadcast
from tests.packed.tables import move_by_rows
from tests.packed.wire_model import DTYPES, LAYOUTS, Item, Player, Recorder

BUFFER = 512
AGREEMENT = 3  # broadcasts before the first chunk, where only the sender shows its plan

Tensors = dict[str, torch.Tensor]

A, B = torch.zeros(2, 3), torch.zeros(5, dtype=torch.int64)


class Bare:
    """A communicator as engines have it, over gloo, that counts what it carries."""

    device = torch.device("cpu")

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self.sizes: list[int] = []
        self.fail_at: int | None = None

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        if len(self.sizes) == self.fail_at:
            self.fail_at = None
            raise OSError("the network is down")
        self.sizes.append(tensor.numel())
        self._broadcast(tensor, src)


class Knowing(Bare):
    """One that also tells ranks."""

    def __init__(self, broadcast: Broadcast, rank: int, world_size: int) -> None:
        super().__init__(broadcast)
        self.rank, self.world_size = rank, world_size


class Failing:
    """Raises `error` at the third call."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 3:
            raise self.error


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, however they lie."""
    dense = tensor.clone(memory_format=torch.contiguous_format)
    return bytes(dense.flatten().view(torch.uint8).tolist()) if dense.numel() else b""


def kept(items: Sequence[Item]) -> Tensors:
    return {item.name: item.tensor() for item in items}


def blank(items: Sequence[Item]) -> Tensors:
    """Tensors to receive into, laid out alike, of other values."""
    poison = [Item(i.name, i.dtype, i.shape, bytes(len(i.payload)), i.layout) for i in items]
    return kept(poison)


def flipped(item: Item, turn: int) -> Item:
    """The same with other values, whichever the turn."""
    mask = turn & 1 if item.dtype == torch.bool else turn & 0xFF
    payload = bytes(byte ^ mask for byte in item.payload)
    return Item(item.name, item.dtype, item.shape, payload, item.layout)


def change(tensors: Mapping[str, torch.Tensor], items: Sequence[Item]) -> None:
    """Give the tensors, in place, the items' values."""
    for item in items:
        if item.payload:
            tensors[item.name].copy_(item.tensor())


def mixed() -> list[Item]:
    """Every width, 0-dim, empty, odd sizes, odd layouts, and some larger than a buffer."""
    shapes = ((3, 1, 2), (), (0, 3), (7,), (9, 31), (1,), (400, 2))
    items = []
    for i, dtype in enumerate(DTYPES):
        shape = shapes[i % len(shapes)]
        payload = bytes((i + at) % 2 for at in range(math.prod(shape) * dtype.itemsize))
        items.append(Item(f"t{i}", dtype, shape, payload, LAYOUTS[i % len(LAYOUTS)]))
    return items


def record(
    tensors: Mapping[str, torch.Tensor] | Sequence[TensorSpec], num_buffers: int = 2
) -> tuple[ReplaySender, Recorder]:
    recorder = Recorder()
    return ReplaySender(tensors, recorder, 0, buffer_size=BUFFER, num_buffers=num_buffers), recorder


def last_values(recorder: Recorder, name: str) -> list[float]:
    """What a receiver has after everything that was sent."""
    receiver = ReplayReceiver(player := Player(recorder.wire), 0)
    received: Tensors = {}
    while player.left:
        received = receiver.receive()
    return [float(value) for value in received[name].flatten()]


@contextmanager
def copying(how: str) -> Iterator[None]:
    """Pairs made meanwhile copy as they do on a GPU with Triton, by tables, or plainly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "move_on", lambda device: move_by_rows if how == "table" else None)
        yield
