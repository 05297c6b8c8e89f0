"""The compatible wire, byte for byte: against a model of it, against the original, over gloo."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packcast.bench.baselines import original_consumer, original_producer
from packcast.packed import compat
from packcast.packed.compat import (
    DEFAULT_PACKED_BUFFER_SIZE_BYTES,
    DEFAULT_PACKED_NUM_BUFFERS,
    packed_broadcast_consumer,
    packed_broadcast_producer,
)
from packcast.packed.ring import Broadcast
from tests.helpers.ranks import run_ranks
from tests.packed.replays import Bare
from tests.packed.tables import move_by_rows
from tests.packed.wire_model import (
    DTYPES,
    LAYOUTS,
    Item,
    Player,
    Recorder,
    assert_same,
    items_and_limits,
    model_of,
    wire_of,
)

CPU = torch.device("cpu")
Received = list[list[tuple[str, torch.Tensor]]]


def produce(items: Sequence[Item], group: object, limit: int, num_buffers: int = 2) -> None:
    pairs = [(item.name, item.tensor()) for item in items]
    packed_broadcast_producer(iter(pairs), group, 0, lambda pair: pair[1], limit, num_buffers)


def consume(
    items: Sequence[Item], group: object, limit: int, num_buffers: int = 2, *, borrow: bool = False
) -> Received:
    """What the callback got, as it was when the callback was called."""
    received: Received = []

    def keep(tensors: list[tuple[str, torch.Tensor]]) -> None:
        received.append([(name, t.clone() if borrow else t) for name, t in tensors])

    packed_broadcast_consumer(
        (item.described for item in items), group, 0, keep, limit, num_buffers, borrow=borrow
    )
    return received


def assert_received(items: Sequence[Item], limit: int, received: Received) -> None:
    """One call for each buffer of the model, with its tensors."""
    buffers = model_of(items, limit)
    assert len(received) == len(buffers)
    for buffer, tensors in zip(buffers, received, strict=True):
        assert_same(buffer, tensors)


def item(name: str, nbytes: int) -> Item:
    return Item(name, torch.uint8, (nbytes,), bytes((len(name) + i) % 251 for i in range(nbytes)))


@settings(max_examples=100, deadline=None)
@given(items_and_limits(), st.integers(1, 4), st.booleans())
@example(([], 10), 2, False)
@example(([Item("e", torch.float64, (0, 3), b"")] * 3, 10), 1, True)
@example(([item("large", 200_000), item("odd", 3), item("even", 70_000)], 250_000), 1, True)
def test_the_producer_puts_the_models_bytes_on_the_wire(
    mix: tuple[list[Item], int], num_buffers: int, by_table: bool
) -> None:
    items, limit = mix
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "move_on", lambda device: move_by_rows if by_table else None)
        produce(items, recorder, limit, num_buffers)
    assert recorder.wire == wire_of(items, limit)
    assert set(recorder.roots) <= {0}


@pytest.mark.parametrize("by_table", [False, True])
def test_what_was_handed_over_is_sent_also_where_its_object_is_given_other_memory(
    by_table: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As offloading does, once the iterator is asked for the next one."""
    monkeypatch.setattr(compat, "move_on", lambda device: move_by_rows if by_table else None)
    weights = [torch.nn.Parameter(torch.full((50,), float(i))) for i in range(4)]
    expected = b"".join(weight.detach().numpy().tobytes() for weight in weights)

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for i, weight in enumerate(weights):
            yield f"w{i}", weight
            weight.data = torch.empty(0)

    recorder = Recorder()
    packed_broadcast_producer(pairs(), recorder, 0, lambda pair: pair[1], 1 << 20, 2)
    assert recorder.wire == [expected]


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (0, 3)])
def test_neighbours_of_one_shape_are_unpacked_each_for_itself(
    shape: tuple[int, ...], borrow: bool
) -> None:
    """Also where odd sizes before them leave them unaligned, or they differ in dtype only."""
    dtypes = [torch.float32] * 4 + [torch.uint8] * 3 + [torch.float32] * 3 + [torch.int32] * 2
    items = []
    for i, dtype in enumerate(dtypes):
        nbytes = math.prod(shape) * dtype.itemsize
        items.append(
            Item(f"t{i}", dtype, shape, bytes((17 * i + at) % 251 for at in range(nbytes)))
        )
    for limit in (1 << 20, 20):
        received = consume(items, Player(wire_of(items, limit)), limit, borrow=borrow)
        assert_received(items, limit, received)


@settings(max_examples=100, deadline=None)
@given(items_and_limits(), st.integers(1, 4), st.booleans())
@example(([], 10), 2, False)
@example(([Item("e", torch.float64, (0, 3), b"")] * 3, 10), 1, True)
def test_the_consumer_gets_from_the_models_bytes_the_tensors_they_were(
    mix: tuple[list[Item], int], num_buffers: int, borrow: bool
) -> None:
    items, limit = mix
    player = Player(wire_of(items, limit))
    received = consume(items, player, limit, num_buffers, borrow=borrow)
    assert not player.left
    assert_received(items, limit, received)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_travels_in_every_layout(dtype: torch.dtype, layout: str) -> None:
    payload = bytes(i % 2 for i in range(6 * dtype.itemsize))
    items = [item("odd", 1), Item("t", dtype, (3, 1, 2), payload, layout), item("odd", 3)]
    recorder = Recorder()
    produce(items, recorder, 1 << 20)
    assert recorder.wire == wire_of(items, 1 << 20)
    assert_received(items, 1 << 20, consume(items, Player(recorder.wire), 1 << 20))


@pytest.mark.parametrize(
    ("nbytes", "sizes"),
    [
        ((99,), [99]),  # one below: stays open until the end
        ((99, 5), [104]),
        ((100, 5), [105]),  # equal does not close
        ((100, 0, 5), [105]),
        ((101, 5), [101, 5]),  # one above does
        ((60, 40, 1, 7), [101, 7]),
        ((5, 1000, 5), [1005, 5]),  # a tensor larger than the buffer rides whole
        ((1000, 1000), [1000, 1000]),
        ((101, 0, 0), [101, 0]),  # only empty tensors: one broadcast of nothing
        ((0, 0), [0]),
        ((), []),
    ],
)
@pytest.mark.parametrize("num_buffers", [1, 2, 3, 4])
def test_a_buffer_of_100_bytes_closes_after_the_tensor_that_exceeds_it(
    nbytes: tuple[int, ...], sizes: list[int], num_buffers: int
) -> None:
    items = [item(f"t{i}", size) for i, size in enumerate(nbytes)]
    recorder = Recorder()
    produce(items, recorder, 100, num_buffers)
    assert [len(sent) for sent in recorder.wire] == sizes
    assert recorder.wire == wire_of(items, 100)


def test_a_limit_of_nothing_puts_every_tensor_in_a_buffer_of_its_own_with_the_empty_before_it() -> (
    None
):
    items = [item("a", 3), item("b", 0), item("c", 1), item("d", 0)]
    recorder = Recorder()
    produce(items, recorder, 0)
    assert [len(sent) for sent in recorder.wire] == [3, 1, 0]
    received = consume(items, Player(recorder.wire), 0)
    assert [[name for name, _ in tensors] for tensors in received] == [["a"], ["b", "c"], ["d"]]


def test_the_defaults_are_one_gib_twice() -> None:
    assert DEFAULT_PACKED_BUFFER_SIZE_BYTES == 1 << 30
    assert DEFAULT_PACKED_NUM_BUFFERS == 2


def test_post_iter_func_gets_each_pair_once_in_order_and_what_it_returns_is_sent() -> None:
    given_pairs = [(f"t{i}", torch.tensor([i], dtype=torch.uint8)) for i in range(5)]
    seen: list[tuple[str, torch.Tensor]] = []

    def post_iter_func(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
        seen.append(pair)
        return pair[1] + 100

    recorder = Recorder()
    packed_broadcast_producer(iter(given_pairs), recorder, 3, post_iter_func, 1, 2)
    assert seen == given_pairs
    assert recorder.wire == [bytes([100, 101]), bytes([102, 103]), bytes([104])]
    assert recorder.roots == [3, 3, 3]


def over_gloo(producer: Callable[[Bare], object], consumer: Callable[[Bare], Received]) -> Received:
    """What a consumer on rank 1 gets from a producer on rank 0."""

    def body(rank: int, broadcast: Broadcast) -> Received:
        group = Bare(broadcast)
        if rank == 1:
            return consumer(group)
        producer(group)
        return []

    return run_ranks(2, body, timeout_s=20)[1]


@settings(max_examples=12, deadline=None)
@given(items_and_limits(), st.integers(1, 4), st.integers(1, 4), st.booleans())
@example(([Item("e", torch.float64, (0, 3), b""), item("a", 1)], 0), 1, 2, False)
@example(([Item("e", torch.float64, (0, 3), b"")] * 2, 10), 2, 1, False)
def test_over_gloo_every_mix_arrives_also_with_other_numbers_of_buffers(
    mix: tuple[list[Item], int], sending: int, receiving: int, borrow: bool
) -> None:
    items, limit = mix
    received = over_gloo(
        lambda group: produce(items, group, limit, sending),
        lambda group: consume(items, group, limit, receiving, borrow=borrow),
    )
    assert_received(items, limit, received)


def flat_items(sizes: Sequence[int]) -> list[Item]:
    """Tensors that the original can send too: flat, of bytes."""
    return [item(f"t{i}", size) for i, size in enumerate(sizes)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 120), max_size=20).map(flat_items),
    st.integers(0, 250),
    st.integers(1, 3),
    st.booleans(),
)
def test_either_end_may_be_the_originals(
    items: list[Item], limit: int, num_buffers: int, it_sends: bool
) -> None:
    def original_receives(group: Bare) -> Received:
        received: Received = []
        described = (item.described for item in items)
        original_consumer(described, group, 0, received.append, limit, num_buffers, CPU)
        return received

    def original_sends(group: Bare) -> None:
        pairs = ((item.name, item.tensor()) for item in items)
        original_producer(pairs, group, 0, lambda pair: pair[1], limit, num_buffers, CPU)

    if it_sends:
        received = over_gloo(original_sends, lambda group: consume(items, group, limit))
    else:
        received = over_gloo(lambda group: produce(items, group, limit), original_receives)
    assert_received(items, limit, received)


def test_pairs_over_gloo_do_not_disturb_one_another() -> None:
    """Two transfers at once in one process, on groups of their own."""
    mixes = {seed: flat_items([seed * 7 + i for i in range(30)]) for seed in (1, 2)}
    received: dict[int, Received] = {}

    def transfer(seed: int) -> None:
        items = mixes[seed]
        received[seed] = over_gloo(
            lambda group: produce(items, group, 64), lambda group: consume(items, group, 64)
        )

    threads = [threading.Thread(target=transfer, args=(seed,)) for seed in mixes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, items in mixes.items():
        assert_received(items, 64, received[seed])
