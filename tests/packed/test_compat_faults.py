"""What the original gets wrong and shows on a CPU: each fault next to ours, which has it not.

`test_compat_streams.py` has those that only a GPU shows. Three are the wire itself and stay:
`test_compat_wire.py` has the overshoot; sizes that differ and lost peers are in the docstrings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from packcast.bench.baselines import original_consumer, original_producer
from packcast.errors import UsageError
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer
from tests.packed.wire_model import Item, Player, Recorder, assert_same, wire_of

CPU = torch.device("cpu")
MIB = 1 << 20

Pairs = list[tuple[str, torch.Tensor]]
Post = Callable[[tuple[str, torch.Tensor]], torch.Tensor]


def produce(pairs: Pairs, limit: int = MIB, post: Post = lambda pair: pair[1]) -> list[bytes]:
    recorder = Recorder()
    packed_broadcast_producer(iter(pairs), recorder, 0, post, limit, 2)
    return recorder.wire


def originals_produce(
    pairs: Pairs, limit: int = MIB, post: Post = lambda pair: pair[1]
) -> list[bytes]:
    recorder = Recorder()
    original_producer(iter(pairs), recorder, 0, post, limit, 2, CPU)
    return recorder.wire


def consume(items: Sequence[Item], limit: int = MIB, *, borrow: bool = False) -> None:
    """Ours; compares inside the callback."""

    def compare(received: Pairs) -> None:
        assert_same([next(expected) for _ in received], received)

    expected = iter(items)
    packed_broadcast_consumer(
        (item.described for item in items),
        Player(wire_of(items, limit)),
        *(0, compare, limit, 2),
        borrow=borrow,
    )
    assert next(expected, None) is None


def originals_consume(items: Sequence[Item], limit: int = MIB) -> list[Pairs]:
    received: list[Pairs] = []
    original_consumer(
        (item.described for item in items),
        Player(wire_of(items, limit)),
        *(0, received.append, limit, 2, CPU),
    )
    return received


FLOATS = Item("floats", torch.float32, (2, 2), bytes(range(16)))
ODD = Item("odd", torch.uint8, (3,), b"abc")


SCALAR = Item("scalar", torch.float32, (), b"\0\0\x80\x3f")


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize(
    ("items", "error"),
    [
        ([ODD, FLOATS], "must be divisible"),
        ([ODD, Item("empty", torch.float32, (0, 2), b"")], "must be divisible"),
        ([SCALAR], "invalid combination|must be tuple|argument"),
    ],
    ids=["unaligned", "unaligned and empty", "0-dim"],
)
def test_what_the_original_cannot_unpack_is_unpacked(
    items: list[Item], error: str, borrow: bool
) -> None:
    with pytest.raises((RuntimeError, TypeError), match=error):
        originals_consume(items)
    consume(items, borrow=borrow)


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (SCALAR.tensor(), "cannot be 0"),
        (torch.arange(4, dtype=torch.float32).as_strided((4, 1), (1, 7)), "stride"),
    ],
    ids=["0-dim", "odd stride"],
)
def test_what_the_original_cannot_pack_is_packed(tensor: torch.Tensor, error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        originals_produce([("t", tensor)])
    assert produce([("t", tensor)]) == [tensor.numpy().tobytes()]


@pytest.mark.parametrize(
    ("post", "made"),
    [
        (lambda pair: pair[1].to(torch.float16), r"torch.float16 \(2, 3\)"),
        (lambda pair: pair[1].t(), r"torch.float32 \(3, 2\)"),
        (lambda pair: pair[1][:1], r"torch.float32 \(1, 3\)"),
        (lambda pair: pair[1].view(torch.int32), r"torch.int32 \(2, 3\)"),
    ],
    ids=["dtype", "order", "size", "dtype of the same size"],
)
def test_what_post_iter_func_makes_is_sent_and_with_strict_it_must_be_of_the_same_kind(
    post: Post, made: str
) -> None:
    pairs = [("fine", torch.zeros(0)), ("layer.7", torch.arange(6.0).view(2, 3))]

    def change(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
        return post(pair) if pair[0] == "layer.7" else pair[1]

    assert produce(pairs, post=change) == originals_produce(pairs, post=change)
    with pytest.raises(UsageError, match=rf"layer\.7, torch.float32 \(2, 3\), into {made}") as e:
        packed_broadcast_producer(iter(pairs), Recorder(), 0, change, strict=True)
    assert "strict" in str(e.value.hint)


def test_a_consumer_that_is_told_what_post_iter_func_makes_receives_that() -> None:
    given = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.5), "i": torch.arange(5)}
    expected = {name: tensor.to(torch.bfloat16).flatten() for name, tensor in given.items()}
    wire = produce(list(given.items()), 5, lambda pair: expected[pair[0]])
    described = [(name, (tensor.shape, tensor.dtype)) for name, tensor in expected.items()]
    got: Pairs = []
    packed_broadcast_consumer(iter(described), Player(wire), 0, got.extend, 5, 2)
    assert [name for name, _ in got] == list(given)
    for name, tensor in got:
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name])


class Keeper:
    """Keeps the buffers themselves, so that no two share an address by accident."""

    device = CPU

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.storages: list[tuple[int, int]] = []  # address and size

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        storage = tensor.untyped_storage()
        self.buffers.append(tensor)
        self.storages.append((storage.data_ptr(), storage.nbytes()))

    @property
    def num_storages(self) -> int:
        return len({address for address, _ in self.storages})


def test_slots_are_used_again_instead_of_a_new_buffer_each_time() -> None:
    pairs = [(f"t{i}", torch.zeros(100, dtype=torch.uint8)) for i in range(30)]
    described = [(name, (tensor.shape, tensor.dtype)) for name, tensor in pairs]
    theirs, ours = Keeper(), Keeper()
    original_producer(iter(pairs), theirs, 0, lambda pair: pair[1], 99, 3, CPU)
    packed_broadcast_producer(iter(pairs), ours, 0, lambda pair: pair[1], 99, 3)
    assert (len(theirs.buffers), len(ours.buffers)) == (30, 30)
    assert (theirs.num_storages, ours.num_storages) == (30, 3)

    theirs, ours = Keeper(), Keeper()
    original_consumer(iter(described), theirs, 0, lambda received: None, 99, 3, CPU)
    packed_broadcast_consumer(iter(described), ours, 0, lambda received: None, 99, 3)
    assert (theirs.num_storages, ours.num_storages) == (30, 3)


def test_a_slot_grows_only_to_the_largest_buffer_that_it_carries() -> None:
    sizes = [10, 500, 20, 30, 40, 700, 50, 60]
    group = Keeper()
    pairs = ((f"t{i}", torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes))
    packed_broadcast_producer(pairs, group, 0, lambda pair: pair[1], 1, 2)
    assert [nbytes for _, nbytes in group.storages] == [10, 500, 20, 500, 40, 700, 50, 700]


@pytest.mark.parametrize("limit", [1 << 36, 1 << 62, 1 << 80, float("inf")])
@pytest.mark.parametrize("sizes", [[12], [1], [0], [3000, 500]])
def test_a_limit_far_beyond_the_weights_takes_no_more_memory_than_they_need(
    limit: int, sizes: list[int]
) -> None:
    sent, received = Keeper(), Keeper()
    pairs = [(f"t{i}", torch.ones(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    packed_broadcast_producer(iter(pairs), sent, 0, lambda pair: pair[1], limit, 2)
    described = [(name, (tensor.shape, tensor.dtype)) for name, tensor in pairs]
    packed_broadcast_consumer(iter(described), received, 0, lambda got: None, limit, 2)
    total = sum(sizes)
    for group in (sent, received):
        assert [buffer.numel() for buffer in group.buffers] == [total]
        assert all(total <= room <= total + total // 8 for _, room in group.storages)


def test_a_slot_does_not_grow_a_little_with_every_buffer() -> None:
    limit, group = 1 << 16, Keeper()
    pairs = [(f"t{i}", torch.zeros(limit + 1 + 500 * i, dtype=torch.uint8)) for i in range(10)]
    packed_broadcast_producer(iter(pairs), group, 0, lambda pair: pair[1], limit, 1)
    assert group.storages == [(group.buffers[0].data_ptr(), limit + limit // 8)] * 10


def test_a_kept_tensor_stays_right_and_does_not_pin_its_whole_buffer() -> None:
    small = Item("small", torch.float32, (2,), bytes(range(8)))
    items = [small, Item("large", torch.uint8, (4000,), bytes(4000))]
    theirs = originals_consume(items)[0][0][1]
    assert theirs.untyped_storage().nbytes() == 4008, "8 bytes pin all of it"

    kept: list[torch.Tensor] = []
    packed_broadcast_consumer(
        (item.described for item in items),
        Player(wire_of(items, MIB)),
        *(0, lambda received: kept.append(received[0][1]), MIB, 1),
    )
    assert kept[0].untyped_storage().nbytes() == 8


@pytest.mark.parametrize("borrow", [False, True])
def test_kept_tensors_outlive_the_reuse_of_their_slots_unless_borrowed(borrow: bool) -> None:
    items = [Item(f"t{i}", torch.uint8, (50,), bytes([i]) * 50) for i in range(9)]
    kept: Pairs = []
    packed_broadcast_consumer(
        (item.described for item in items),
        Player(wire_of(items, 0)),
        *(0, kept.extend, 0, 2),
        borrow=borrow,
    )
    assert len({tensor.data_ptr() for _, tensor in kept}) == (2 if borrow else 9)
    last = [8, 7, 8, 7, 8, 7, 8, 7, 8]  # the slots' contents at the end
    assert [int(tensor[0]) for _, tensor in kept] == (last if borrow else list(range(9)))


def test_borrowing_copies_only_what_is_not_aligned() -> None:
    items = [FLOATS, ODD, FLOATS, Item("bytes", torch.int8, (5,), b"12345")]
    addresses: list[bool] = []
    slots: list[int] = []

    class Watcher(Player):
        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            slots.append(tensor.untyped_storage().data_ptr())
            super().broadcast(tensor, src)

    def compare(received: Pairs) -> None:
        assert_same(items, received)
        addresses.extend(t.untyped_storage().data_ptr() == slots[0] for _, t in received)

    packed_broadcast_consumer(
        (item.described for item in items),
        Watcher(wire_of(items, MIB)),
        *(0, compare, MIB, 2),
        borrow=True,
    )
    assert addresses == [True, True, False, True]
