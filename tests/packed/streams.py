"""Groups that enqueue on the current stream, slowly, as engines' communicators do; and both ends.

A wrapper around torch.distributed would hide what these show: it orders streams by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from packcast.bench.baselines import original_consumer, original_producer
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer

PAUSE = 200_000_000  # cycles of a GPU's clock: about a tenth of a second
MIB = 1 << 20

Pair = tuple[str, torch.Tensor]
Post = Callable[[Pair], torch.Tensor]
Described = tuple[str, tuple[Sequence[int], torch.dtype]]
Unpack = Callable[[list[Pair]], object]


NBYTES = 4096
OWN_BUFFER = NBYTES - 1  # a limit that gives each tensor of NBYTES a buffer of its own

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def given(pair: Pair) -> torch.Tensor:
    return pair[1]


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def pause(cycles: int = PAUSE) -> None:
    """Keep the current stream busy; the host goes on."""
    if cycles:
        torch.cuda._sleep(cycles)


class SlowGroup:
    """Each broadcast takes a while on the current stream, and leaves an event at its end."""

    def __init__(self, cycles: int = PAUSE, device: torch.device | None = None) -> None:
        self.device = device or gpu()
        self.cycles = cycles
        self.fail: Callable[[], None] = lambda: None
        self._ends: list[torch.cuda.Event] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.fail()
        assert tensor.device == self.device
        pause(self.cycles)
        self.carry(tensor)
        self._ends.append(torch.cuda.Event())
        self._ends[-1].record()

    def carry(self, tensor: torch.Tensor) -> None:
        """Copy from or to the tensor, on the current stream."""
        raise NotImplementedError

    def is_busy(self) -> bool:
        """Is any broadcast under way? Does not wait."""
        assert self._ends
        return not all(end.query() for end in self._ends)


class Sending(SlowGroup):
    """Copies what is broadcast to memory of its own."""

    def __init__(
        self, cycles: int = PAUSE, device: torch.device | None = None, nbytes: int = MIB
    ) -> None:
        super().__init__(cycles, device)
        self._arena = torch.full((nbytes,), 0xA5, dtype=torch.uint8, device=self.device)
        self._sizes: list[int] = []
        torch.cuda.synchronize(self.device)

    def carry(self, tensor: torch.Tensor) -> None:
        begin = sum(self._sizes) % self._arena.numel()
        self._arena[begin : begin + tensor.numel()].copy_(tensor)
        self._sizes.append(tensor.numel())

    def wire(self) -> list[bytes]:
        """What went over the wire, once all is over everywhere."""
        return [bytes(part.tolist()) for part in self.buffers()]

    def buffers(self) -> Sequence[torch.Tensor]:
        """The same, where it lies."""
        torch.cuda.synchronize(self.device)
        return self._arena[: sum(self._sizes)].split(self._sizes)


class Receiving(SlowGroup):
    """Fills in what a producer would have sent, over and over."""

    def __init__(
        self,
        sent: Sequence[torch.Tensor],
        cycles: int = PAUSE,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(cycles, device)
        self._sent = list(sent)
        self._turn = 0
        torch.cuda.synchronize(self.device)

    def carry(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self._sent[self._turn % len(self._sent)])
        self._turn += 1


# Both ends of both implementations, called alike: with pairs or descriptions, group and limit.
Producer = Callable[..., None]
Consumer = Callable[..., None]


def theirs_sends(
    pairs: Iterable[Pair], group: Any, limit: int, num_buffers: int = 2, post: Post = given
) -> None:
    original_producer(iter(pairs), group, 0, post, limit, num_buffers, group.device)


def ours_sends(
    pairs: Iterable[Pair], group: Any, limit: int, num_buffers: int = 2, post: Post = given
) -> None:
    packed_broadcast_producer(pairs, group, 0, post, limit, num_buffers)


def _receiving_by(call: Callable[..., object], **options: bool) -> Consumer:
    def receive(
        described: Iterable[Described],
        group: SlowGroup,
        unpack: Unpack,
        limit: int,
        num_buffers: int = 2,
    ) -> None:
        call(iter(described), group, 0, unpack, limit, num_buffers, group.device, **options)

    return receive


theirs_receives = _receiving_by(original_consumer)
ours_receives = _receiving_by(packed_broadcast_consumer)
ours_borrows = _receiving_by(packed_broadcast_consumer, borrow=True)


def flat(value: int, nbytes: int) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8, device=gpu())


def flats(count: int, nbytes: int) -> tuple[list[Pair], list[Described]]:
    """Tensors of 1s, of 2s and so on, and their descriptions; ready on return."""
    pairs = [(f"t{i}", flat(i, nbytes)) for i in range(1, count + 1)]
    torch.cuda.synchronize()
    return pairs, [(name, (tensor.shape, tensor.dtype)) for name, tensor in pairs]


def wire_of(pairs: Iterable[Pair]) -> list[bytes]:
    """What goes over the wire if each has a buffer of its own."""
    return [bytes(tensor.tolist()) for _, tensor in pairs]


def warm_up() -> None:
    """Load every kernel and give every pooled stream memory, so that no call waits for either."""
    pairs, described = flats(3, 4096)
    sent = [tensor for _, tensor in pairs]
    for _ in range(20):
        for send in (theirs_sends, ours_sends):
            send(pairs, Sending(0), 1)
        for receive in (theirs_receives, ours_receives, ours_borrows):
            receive(described, Receiving(sent, 0), lambda received: received[0][1].clone(), 1)
    pause(1)
    torch.cuda.synchronize()
