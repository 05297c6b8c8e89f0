"""What cannot travel is refused by name; what callers raise comes out as it is, and all goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from packcast.errors import UsageError
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer
from tests.helpers.wrapper import Wrapper
from tests.packed.replays import Failing
from tests.packed.wire_model import Item, Player, Recorder, assert_same, wire_of

CPU = torch.device("cpu")


class LikeDTensor(torch.Tensor):
    """Sharded, as far as anybody can see from outside."""

    def full_tensor(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def quietly(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Without torch's warnings about prototypes and deprecations."""

    def made() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return made


def freed() -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.data.untyped_storage().resize_(0)
    return parameter


def part_of_freed() -> torch.Tensor:
    flat = torch.ones(9)
    part = flat[6:]
    flat.untyped_storage().resize_(0)
    assert part.data_ptr(), "its address alone would not tell"
    return part


def cut_short() -> torch.Tensor:
    flat = torch.ones(6)
    flat.untyped_storage().resize_(20)
    return flat


def column_of_cut_short() -> torch.Tensor:
    column = torch.ones(3, 2)[:, 1]
    column.untyped_storage().resize_(20)
    return column


REFUSED = {
    "DTensor": (lambda: torch.zeros(3).as_subclass(LikeDTensor), "DTensor", "full_tensor"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta device", None),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo", "to_dense"),
    "compressed": (
        quietly(lambda: torch.eye(3).to_sparse_csr()),
        "layout torch.sparse_csr",
        "to_dense",
    ),
    "conjugate": (lambda: torch.tensor([1 + 2j]).conj(), "conjugate", "resolve_conj"),
    "negative": (lambda: torch.tensor([1 + 2j]).conj().imag, "negative", "resolve_neg"),
    "quantized": (
        quietly(lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)),
        "quantized",
        "int_repr",
    ),
    "nested": (quietly(lambda: torch.nested.nested_tensor([torch.zeros(2)])), "nested", "unbind"),
    "empty meta": (lambda: torch.empty(0, device="meta"), "meta device", None),
    "nothing": (lambda: None, "NoneType", None),
    "wrapper": (lambda: Wrapper(torch.ones(3)), "Wrapper", "plain tensors"),
    "lazy": (lambda: torch.nn.LazyLinear(3).weight, "lazy parameter", "run the module"),
    "lazy buffer": (lambda: torch.nn.UninitializedBuffer(), "lazy parameter", "run the module"),
    "implicit zeros": (lambda: torch._efficientzerotensor(3), "no memory of its own", "clone"),
    "freed": (freed, "lost its memory: its storage has 0 bytes, of 12 needed", "gather"),
    "part of freed": (part_of_freed, "lost its memory: .* 0 bytes, of 36 needed", "gather"),
    "cut short": (cut_short, "lost its memory: .* 20 bytes, of 24 needed", "gather"),
    "column": (column_of_cut_short, "lost its memory: .* 20 bytes, of 24 needed", "gather"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("made_by", ["iterator", "post_iter_func"])
def test_what_has_no_plain_bytes_is_refused_by_name(kind: str, made_by: str) -> None:
    make, what, hint = REFUSED[kind]
    refused = make()
    first = torch.ones(4, dtype=torch.uint8)
    recorder = Recorder()
    by_iterator = made_by == "iterator"
    pairs = [("fine", first), ("layer.3.weight", refused if by_iterator else torch.zeros(3))]

    def post_iter_func(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
        return refused if pair[0] == "layer.3.weight" else pair[1]

    with pytest.raises(UsageError, match=rf"layer\.3\.weight .*{what}") as caught:
        packed_broadcast_producer(iter(pairs), recorder, 0, post_iter_func, 3, 2)
    assert hint is None or hint in str(caught.value.hint)
    assert recorder.wire == [b"\1\1\1\1"], "what went before it was sent"


def test_a_tensor_inside_vmap_is_refused_by_name() -> None:
    def send(tensor: torch.Tensor) -> torch.Tensor:
        packed_broadcast_producer(iter([("w", tensor)]), Recorder(), 0, lambda pair: pair[1])
        return tensor

    with pytest.raises(UsageError, match="tensor w has no memory of its own"):
        torch.vmap(send)(torch.ones(2, 3))


def test_what_has_its_memory_back_travels() -> None:
    flat = torch.ones(4)
    parts = [("a", flat[:1]), ("b", flat[1:])]
    storage, recorder = flat.untyped_storage(), Recorder()
    nbytes = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(UsageError, match="tensor a has lost its memory"):
        packed_broadcast_producer(iter(parts), recorder, 0, lambda pair: pair[1])
    assert recorder.wire == []
    storage.resize_(nbytes)
    flat.fill_(7.0)
    packed_broadcast_producer(iter(parts), recorder, 0, lambda pair: pair[1])
    assert recorder.wire == [torch.full((4,), 7.0).numpy().tobytes()]


def test_resolved_views_and_parameters_travel() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    pairs: list[tuple[str, torch.Tensor]] = [
        ("conjugate", value.conj().resolve_conj()),
        ("parameter", torch.nn.Parameter(torch.ones(2))),
        ("expanded", torch.tensor([7], dtype=torch.uint8).expand(3)),
    ]
    recorder = Recorder()
    packed_broadcast_producer(iter(pairs), recorder, 0, lambda pair: pair[1], 100, 2)
    conjugate = torch.tensor([1 - 2j, 3 + 4j]).numpy().tobytes()
    assert recorder.wire == [conjugate + torch.ones(2).numpy().tobytes() + b"\7\7\7"]


@pytest.mark.parametrize("num_buffers", [0, -1])
def test_a_ring_without_buffers_is_refused(num_buffers: int) -> None:
    with pytest.raises(UsageError, match="num_buffers"):
        packed_broadcast_producer(
            iter([("w", torch.zeros(1))]), Recorder(), 0, lambda pair: pair[1], 1, num_buffers
        )
    with pytest.raises(UsageError, match="num_buffers"):
        packed_broadcast_consumer(iter([]), Player([]), 0, print, 1, num_buffers)


ITEMS = [Item(f"t{i}", torch.uint8, (4,), bytes([i]) * 4) for i in range(6)]


def pairs_of(items: list[Item]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((item.name, item.tensor()) for item in items)


def assert_usable() -> None:
    """Both ends work, as if nothing had been."""
    recorder = Recorder()
    packed_broadcast_producer(pairs_of(ITEMS), recorder, 0, lambda pair: pair[1], 3, 2)
    assert recorder.wire == wire_of(ITEMS, 3)
    received: list[tuple[str, torch.Tensor]] = []
    described = (item.described for item in ITEMS)
    packed_broadcast_consumer(described, Player(recorder.wire), 0, received.extend, 3, 2)
    assert_same(ITEMS, received)


def producer_fails_in(place: str, fail: Callable[[], None]) -> None:
    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for pair in pairs_of(ITEMS):
            if place == "iterator":
                fail()
            yield pair

    def post_iter_func(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
        if place == "post_iter_func":
            fail()
        return pair[1]

    class Group(Recorder):
        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            if place == "group":
                fail()
            super().broadcast(tensor, src)

    group = Group()
    try:
        packed_broadcast_producer(pairs(), group, 0, post_iter_func, 3, 2)
    finally:
        assert group.wire == wire_of(ITEMS, 3)[:2], "what came before it was sent, and no more"


def consumer_fails_in(place: str, fail: Callable[[], None]) -> None:
    received: list[tuple[str, torch.Tensor]] = []

    def described() -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
        for item in ITEMS:
            if place == "iterator":
                fail()
            yield item.name, (item.shape, item.dtype)

    def post_unpack_func(tensors: list[tuple[str, torch.Tensor]]) -> None:
        if place == "post_unpack_func":
            fail()
        received.extend(tensors)

    class Group(Player):
        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            if place == "group":
                fail()
            super().broadcast(tensor, src)

    try:
        packed_broadcast_consumer(described(), Group(wire_of(ITEMS, 3)), 0, post_unpack_func, 3, 2)
    finally:
        assert_same(ITEMS[:2], received)


PLACES = [
    (producer_fails_in, "iterator"),
    (producer_fails_in, "post_iter_func"),
    (producer_fails_in, "group"),
    (consumer_fails_in, "iterator"),
    (consumer_fails_in, "post_unpack_func"),
    (consumer_fails_in, "group"),
]


@pytest.mark.parametrize(
    "error",
    [ValueError("mine"), KeyboardInterrupt(), UsageError("ours")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(("run", "place"), PLACES)
def test_an_exception_is_raised_as_it_is_and_the_library_is_usable_again(
    run: Callable[[str, Callable[[], None]], None], place: str, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        run(place, Failing(error))
    assert caught.value is error
    assert_usable()


def test_a_callback_may_send_and_receive_itself() -> None:
    """Nothing is kept between calls, so one may run inside another."""
    inner: list[tuple[str, torch.Tensor]] = []

    def post_unpack_func(tensors: list[tuple[str, torch.Tensor]]) -> None:
        described = (item.described for item in ITEMS)
        packed_broadcast_consumer(
            described, Player(wire_of(ITEMS, 3)), 0, inner.extend, 3, 2, borrow=False
        )

    packed_broadcast_consumer(
        iter([ITEMS[0].described]), Player([ITEMS[0].payload]), 0, post_unpack_func, 3, 2
    )
    assert_same(ITEMS, inner)
