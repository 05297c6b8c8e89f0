"""What the original gets wrong and only a GPU shows: each fault next to ours, which has it not.

Bare groups that enqueue on the current stream and take their time; the host never waits for them,
so that whatever is not ordered comes out wrong each time, not now and then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
import torch

from tests.packed.streams import (
    MIB,
    NBYTES,
    OWN_BUFFER,
    Consumer,
    Pair,
    Producer,
    Receiving,
    Sending,
    flats,
    gpu,
    needs_gpu,
    ours_borrows,
    ours_receives,
    ours_sends,
    pause,
    theirs_receives,
    theirs_sends,
    wire_of,
)
from tests.packed.wire_model import Recorder

pytestmark = [*needs_gpu, pytest.mark.usefixtures("warm")]


@pytest.fixture(params=["default stream", "another stream"])
def on_stream(request: pytest.FixtureRequest) -> AbstractContextManager[object]:
    """The stream of the caller, to be entered."""
    is_default = request.param == "default stream"
    return torch.cuda.stream(torch.cuda.current_stream() if is_default else torch.cuda.Stream())


def values_of(tensor: torch.Tensor) -> list[int]:
    """The values that are in it once all is over everywhere."""
    torch.cuda.synchronize()
    values: list[int] = tensor.unique().tolist()
    return values


def test_all_is_over_when_the_producer_returns() -> None:
    pairs, _ = flats(3, NBYTES)

    def is_busy_after(send: Producer) -> bool:
        group = Sending()
        send(pairs, group, OWN_BUFFER)
        is_busy = group.is_busy()
        assert group.wire() == wire_of(pairs)
        return is_busy

    assert is_busy_after(theirs_sends)
    assert not is_busy_after(ours_sends)


def test_all_is_over_when_the_consumer_returns() -> None:
    pairs, described = flats(3, NBYTES)

    def is_busy_after(receive: Consumer) -> bool:
        group = Receiving([tensor for _, tensor in pairs])
        receive(described, group, lambda received: None, OWN_BUFFER)
        is_busy = group.is_busy()
        torch.cuda.synchronize()
        return is_busy

    assert is_busy_after(theirs_receives)
    assert not is_busy_after(ours_receives)
    assert not is_busy_after(ours_borrows)


def test_packing_comes_after_what_the_callers_stream_was_given(
    on_stream: AbstractContextManager[object],
) -> None:
    def sent_by(send: Producer) -> set[int]:
        [(name, weight)], _ = flats(1, NBYTES)
        group = Sending(0)
        with on_stream:
            pause()
            weight.fill_(77)
            send([(name, weight)], group, OWN_BUFFER)
        return set(group.wire()[0])

    assert sent_by(theirs_sends) == {1}, "the weight before its update"
    assert sent_by(ours_sends) == {77}


def test_the_callback_comes_after_what_the_callers_stream_was_given(
    on_stream: AbstractContextManager[object],
) -> None:
    [(_, sent)], described = flats(1, NBYTES)

    def seen_before(receive: Consumer) -> list[int]:
        weight, before = torch.zeros_like(sent), torch.zeros_like(sent)
        group = Receiving([sent])
        with on_stream:
            pause(3 * group.cycles)
            before.copy_(weight)
            receive(described, group, lambda received: weight.copy_(received[0][1]), OWN_BUFFER)
        return values_of(before)

    assert seen_before(theirs_receives) == [1], "overwritten while it was in use"
    assert seen_before(ours_receives) == [0]
    assert seen_before(ours_borrows) == [0]


def test_what_the_callback_loads_is_there_for_the_callers_stream(
    on_stream: AbstractContextManager[object],
) -> None:
    [(_, sent)], described = flats(1, NBYTES)

    def seen_after(receive: Consumer) -> list[int]:
        weight, after = torch.zeros_like(sent), torch.zeros_like(sent)
        group = Receiving([sent])
        with on_stream:
            receive(described, group, lambda received: weight.copy_(received[0][1]), OWN_BUFFER)
            after.copy_(weight)
        return values_of(after)

    assert seen_after(theirs_receives) == [0], "used before it was loaded"
    assert seen_after(ours_receives) == [1]
    assert seen_after(ours_borrows) == [1]


@pytest.mark.parametrize("receive", [ours_receives, ours_borrows])
@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_a_slot_is_not_filled_again_before_the_callbacks_work_on_the_current_stream_is_done(
    receive: Consumer, num_buffers: int, on_stream: AbstractContextManager[object]
) -> None:
    pairs, described = flats(7, NBYTES)
    copies: list[torch.Tensor] = []
    with on_stream:
        caller = torch.cuda.current_stream()

        def copy_late(received: list[Pair]) -> None:
            assert torch.cuda.current_stream() == caller
            pause(20_000_000)
            copies.extend(tensor.clone() for _, tensor in received)

        group = Receiving([tensor for _, tensor in pairs], 0)
        receive(described, group, copy_late, OWN_BUFFER, num_buffers)
    assert [values_of(copy) for copy in copies] == [[i] for i in range(1, 8)]


def test_kept_tensors_stay_right_through_later_transfers() -> None:
    pairs, described = flats(9, NBYTES)
    kept: list[Pair] = []
    for _ in range(2):
        group = Receiving([tensor for _, tensor in pairs], 1_000_000)
        ours_receives(described, group, kept.extend, OWN_BUFFER)
    assert [values_of(tensor) for _, tensor in kept] == [[i] for i in range(1, 10)] * 2
    assert {tensor.untyped_storage().nbytes() for _, tensor in kept} == {NBYTES}


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_tensor_made_on_another_stream_may_be_dropped_once_it_was_handed_over(
    layout: str,
) -> None:
    """Its memory goes back to the stream that made it, which writes the next tensor there."""
    side = torch.cuda.Stream()
    shape = (512, 1024)

    def made(value: int) -> torch.Tensor:
        with torch.cuda.stream(side):
            tensor = torch.full(shape, value, dtype=torch.uint8, device=gpu())
        torch.cuda.current_stream().wait_stream(side)
        return tensor if layout == "contiguous" else tensor.t()

    def pairs() -> Iterator[Pair]:
        for value in range(1, 6):
            pause()
            yield f"t{value}", made(value)

    # What is copied when it comes is in danger while its buffer is still open.
    limit = 512 * 1024 - 1 if layout == "contiguous" else 1 << 30
    right = b"".join(bytes([value]) * (512 * 1024) for value in range(1, 6))

    def sent_by(send: Producer) -> bytes:
        group = Sending(0, nbytes=8 << 20)
        send(pairs(), group, limit, 3)
        return b"".join(group.wire())

    is_right = [sent_by(send) == right for send in (theirs_sends, ours_sends)]
    assert is_right == [False, True]


def test_tensors_from_other_devices_are_brought_to_the_groups() -> None:
    here = torch.arange(100, dtype=torch.float32, device=gpu())
    pairs = [
        ("host", here.cpu() + 1),
        ("gpu", here),
        ("pinned", (here.cpu() + 2).pin_memory()),
        ("strided", (here.cpu() + 3).view(10, 10).t()),
    ]
    if torch.cuda.device_count() > 1:
        pairs.append(("neighbour", here.to("cuda:1") + 4))
    with pytest.raises(RuntimeError, match="device"):
        theirs_sends(pairs, Sending(0), 1 << 20)
    group = Sending(0)
    ours_sends(pairs, group, 1 << 20)
    assert group.wire() == [b"".join(tensor.cpu().numpy().tobytes() for _, tensor in pairs)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.bool])
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("columns", [1, 2])
def test_large_tensors_are_packed_whole_in_the_first_buffer_and_in_later_ones(
    dtype: torch.dtype, odd: int, columns: int
) -> None:
    sizes = [3 * MIB, 5 * MIB, 2 * MIB, 4 * MIB]
    if dtype.itemsize == 1 and columns == 1:
        sizes = [size + odd for size in sizes]
    high = 2 if dtype == torch.bool else 256  # of floats NaNs of all kinds are among them
    raw = [torch.randint(0, high, (n,), dtype=torch.uint8, device=gpu()) for n in sizes * 3]
    data = [part.view(dtype).view(-1, columns) for part in raw]
    if odd:
        data[1] = data[1].view(1, -1)  # not like the others
    pairs = [(f"t{i}", tensor) for i, tensor in enumerate(data)]
    group = Sending(1_000_000, nbytes=64 * MIB)
    ours_sends(pairs, group, 17 * MIB // 2)
    buffers = group.buffers()
    assert len(buffers) == 4  # of three tensors each
    expected = [torch.cat(raw[i : i + 3]) for i in range(0, len(raw), 3)]
    assert all(map(torch.equal, buffers, expected))


def test_gpu_tensors_are_staged_for_a_group_on_the_cpu() -> None:
    class OnHost(Recorder):
        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            if tensor.device != self.device:
                raise RuntimeError("not on this device")
            super().broadcast(tensor, src)

    pairs, _ = flats(5, NBYTES)
    group = OnHost()
    with pytest.raises(RuntimeError, match="not on this device"):
        theirs_sends(pairs, group, OWN_BUFFER)
    pause()
    for _, tensor in pairs:
        tensor.add_(10)
    ours_sends(pairs, group, OWN_BUFFER)
    assert group.wire == [bytes([i + 10]) * NBYTES for i in range(1, 6)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_group_may_be_on_another_gpu_than_the_current_one() -> None:
    pairs, described = flats(5, NBYTES)
    there = torch.device("cuda", 1 - torch.cuda.current_device())
    sending = Sending(1_000_000, there)
    ours_sends(pairs, sending, OWN_BUFFER)
    assert sending.wire() == wire_of(pairs)
    for receive in (ours_receives, ours_borrows):
        copies: list[torch.Tensor] = []
        receiving = Receiving([tensor.to(there) for _, tensor in pairs], 1_000_000, there)
        receive(
            described,
            receiving,
            lambda got, into=copies: into.append(got[0][1].clone()),
            OWN_BUFFER,
        )
        assert {copy.device for copy in copies} == {there}
        assert [bytes(copy.tolist()) for copy in copies] == wire_of(pairs)
