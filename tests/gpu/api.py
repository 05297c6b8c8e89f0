"""One rank of the library's tests: both wires over both kinds of groups, every value compared.

Run by torchrun, one rank per GPU: `library rounds N`, or `library table GIB N`. `test_library.py`
does. Without a GPU it runs the same over gloo. Exits 1 if anything was wrong on any rank.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from packcast import (
    ReplayReceiver,
    ReplaySender,
    packed_broadcast_consumer,
    packed_broadcast_producer,
)
from tests.gpu.nccl_ctypes import NcclCommunicator
from tests.gpu.table import print_table

CALLS = 50
GARBAGE = 0xA5
SHAPES = ((), (0, 3), (1,), (7,), (3, 1, 2), (129,), (64, 65), (1000, 33), (1 << 17,))
DTYPES = (
    *(torch.bool, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32),
    *(torch.int64, torch.float64, torch.complex64, torch.complex128),
)

Tensors = dict[str, torch.Tensor]


class OverTorch:
    """A bare communicator where there is no GPU, and what the original is given elsewhere."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.device = device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        dist.broadcast(tensor, dist.get_global_rank(self._group, src), group=self._group)

    def destroy(self) -> None:
        """The group goes with all others."""


Bare = NcclCommunicator | OverTorch


class Slow:
    """A bare communicator whose stream is busy before and after, now and then."""

    def __init__(self, bare: Bare, delay: Callable[[], None]) -> None:
        self.device, self.rank, self.world_size = bare.device, bare.rank, bare.world_size
        self._bare, self._delay = bare, delay

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self._delay()
        self._bare.broadcast(tensor, src)
        self._delay()


@dataclass(slots=True)
class Rank:
    """This rank: what it knows, and whether all has been right so far."""

    rank: int
    world_size: int
    device: torch.device
    dice: random.Random  # its own: delays differ between ranks
    wrong: int = 0

    @property
    def src(self) -> int:
        """Who sends: not rank 0, which would hide a root that is taken for granted."""
        return self.world_size - 1

    @property
    def sends(self) -> bool:
        return self.rank == self.src

    def delay(self) -> None:
        """Keep the current stream busy for a while, now and then; the host goes on."""
        if self.device.type == "cuda" and self.dice.random() < 0.5:
            torch.cuda._sleep(self.dice.randint(1, 5_000_000))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def on_a_stream(self) -> AbstractContextManager[object]:
        """The caller's stream: the default one, or another."""
        if self.device.type == "cuda" and self.dice.random() < 0.5:
            return torch.cuda.stream(torch.cuda.Stream(self.device))
        return nullcontext()

    def compare(self, received: Tensors, sent: Tensors, what: str) -> None:
        """Byte for byte, in order, on the current stream; says what is wrong."""
        if list(received) != list(sent):
            self.say_wrong(f"{what}: {list(received)} instead of {list(sent)}")
        for name in set(received) & set(sent):
            got, want = received[name], sent[name]
            if (got.shape, got.dtype) != (want.shape, want.dtype):
                self.say_wrong(f"{what}: {name} is {got.dtype} {tuple(got.shape)}")
            elif not torch.equal(_bytes_of(got.cpu()), _bytes_of(want)):
                self.say_wrong(f"{what}: the values of {name}, {got.dtype} {tuple(got.shape)}")

    def say_wrong(self, what: str) -> None:
        self.wrong += 1
        print(f"rank {self.rank} WRONG, {what}\n", end="", flush=True)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def values(seed: int) -> Tensors:
    """A mix of tensors on the CPU, the same on every rank; shapes and dtypes for all seeds."""
    fixed, generator = random.Random(0), torch.Generator().manual_seed(seed)
    mix = {}
    for i in range(40):
        dtype, shape = fixed.choice(DTYPES), fixed.choice(SHAPES)
        count = torch.Size(shape).numel() * dtype.itemsize
        top = 2 if dtype == torch.bool else 256
        flat = torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator)
        mix[f"t{i}"] = flat.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    return mix


def spoil(tensors: Tensors) -> None:
    """Overwrite on the current stream, for whoever looks too early or too late."""
    for tensor in tensors.values():
        if not tensor.is_contiguous():
            tensor.fill_(GARBAGE)
        elif tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(GARBAGE)


def refill(tensors: Tensors, staged: Tensors) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(staged[name])


def compat_round(me: Rank, group: object, seed: int, *, borrow: bool) -> None:
    """Send or receive once; buffers, limit and values by `seed`."""
    shared = random.Random(seed)
    limit, num_buffers = shared.choice((1, 4096, 100_000, 1 << 20, 1 << 30)), shared.randint(1, 4)
    sent = values(seed)
    what = f"compat {seed}, {num_buffers} x {limit}, {'borrow' if borrow else 'copy'}"
    staged = {name: tensor.to(me.device) for name, tensor in sent.items()}
    resident = {name: torch.empty_like(tensor) for name, tensor in staged.items()}
    me.synchronize()
    with me.on_a_stream():
        if not me.sends:
            described = [(name, (t.shape, t.dtype)) for name, t in sent.items()]
            kept: Tensors = {}

            def keep(received: list[tuple[str, torch.Tensor]]) -> None:
                me.delay()
                for name, tensor in received:
                    kept[name] = tensor.clone() if borrow else tensor

            packed_broadcast_consumer(
                iter(described), group, me.src, keep, limit, num_buffers, borrow=borrow
            )
            me.compare(kept, sent, what)
        else:
            me.delay()
            refill(resident, staged)

            def pairs() -> Iterator[tuple[str, torch.Tensor]]:
                for i, (name, tensor) in enumerate(resident.items()):
                    if i % 8 == 0:
                        me.delay()
                    # Every other one is made on the way, and nobody else keeps it.
                    yield name, tensor if i % 2 else tensor.clone()

            packed_broadcast_producer(
                pairs(), group, me.src, lambda pair: pair[1], limit, num_buffers
            )
            spoil(resident)
    me.synchronize()


def replay_values(seed: int) -> Tensors:
    """The same with one that is split, a tie to it, and one that is not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(3 << 20, generator=generator)
    turned = torch.randn((33, 70), generator=generator).t()
    return {**values(seed), "large": large, "tied": large, "turned": turned}


def replay_rounds(me: Rank, group: object, num_buffers: int, rounds: int) -> None:
    """Rounds over one pair: given tensors, into new ones and into given ones by turns; then bound.

    The large tensor rides alone, and is broadcast where it lies.
    """
    tensors = {name: t.to(me.device, copy=True) for name, t in replay_values(0).items()}
    if me.sends:
        tensors["tied"] = tensors["large"]
        sender = ReplaySender(tensors, group, me.src, buffer_size=1 << 20, num_buffers=num_buffers)
    else:
        receiver = ReplayReceiver(group, me.src, tensors)
    for seed in range(rounds + max(1, rounds // 2)):
        is_bound = seed >= rounds
        sent = replay_values(seed)
        staged = {name: tensor.to(me.device) for name, tensor in sent.items()}
        me.synchronize()
        with me.on_a_stream():
            if seed == rounds:
                (sender if me.sends else receiver).bind(tensors)
            me.delay()
            if me.sends:
                refill(tensors, staged)
                sender.send(None if is_bound else tensors)
                spoil(tensors)
            else:
                spoil(tensors)
                received = receiver.receive(None if is_bound or seed % 2 else tensors)
                me.compare(received, sent, f"replay {seed}, {num_buffers} buffers")
        me.synchronize()


def memory_is_flat(me: Rank, group: object, name: str) -> None:
    """Reserved memory after two calls is that after fifty more."""
    if me.device.type != "cuda":
        return
    tensors = {name: tensor.to(me.device) for name, tensor in replay_values(0).items()}
    described = [(name, (t.shape, t.dtype)) for name, t in tensors.items()]
    if me.sends:
        sender = ReplaySender(tensors, group, me.src, buffer_size=1 << 20, num_buffers=2)
    else:
        receiver = ReplayReceiver(group, me.src)
    (sender if me.sends else receiver).bind(tensors)

    def call() -> None:
        if me.sends:
            packed_broadcast_producer(
                tensors.items(), group, me.src, lambda pair: pair[1], 1 << 20, 2
            )
            sender.send()
        else:
            packed_broadcast_consumer(described, group, me.src, lambda _: None, 1 << 20, 2)
            receiver.receive()

    for _ in range(2):
        call()
    me.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(CALLS):
        call()
    me.synchronize()
    growth = torch.cuda.memory_reserved() - before
    print(f"rank {me.rank}: {name}: {CALLS} calls, reserved memory +{growth}\n", end="", flush=True)
    if growth:
        me.say_wrong(f"{name}: reserved memory grew by {growth} bytes over {CALLS} calls")


def all_rounds(me: Rank, groups: dict[str, object], rounds: int) -> None:
    for name, group in groups.items():
        for seed in range(rounds):
            for borrow in (False, True):
                compat_round(me, group, seed, borrow=borrow)
        for num_buffers in (1, 2, 3, 4):
            replay_rounds(me, group, num_buffers, rounds)
        memory_is_flat(me, group, name)
        verdict = "right" if not me.wrong else "WRONG"
        print(f"rank {me.rank} {verdict}, {name}\n", end="", flush=True)


def main(what: str, *numbers: str) -> int:
    """`rounds` or `table`, on every rank."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("gloo")
    rendezvous = dist.group.WORLD
    assert rendezvous is not None
    group = dist.new_group(backend="nccl" if on_gpu else "gloo")
    bare: Bare = NcclCommunicator(rendezvous) if on_gpu else OverTorch(rendezvous, device)
    rank = dist.get_rank()
    me = Rank(rank, dist.get_world_size(), device, random.Random(rank))
    if what == "rounds":
        groups = {"process group": group, "bare": bare, "slow bare": Slow(bare, me.delay)}
        all_rounds(me, groups, int(numbers[0]))
    else:
        over_both = {"process group": (group, OverTorch(group, device)), "bare": (bare, bare)}
        print_table(over_both, me.src, float(numbers[0]), int(numbers[1]))
    wrong = torch.tensor([me.wrong])
    dist.all_reduce(wrong)
    bare.destroy()
    dist.destroy_process_group()
    return int(wrong.item() > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
