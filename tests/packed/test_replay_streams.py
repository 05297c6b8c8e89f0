"""Replays whose calls come on different streams, which only a GPU shows."""

from __future__ import annotations

import pytest
import torch

from packcast.packed import replay
from packcast.packed.gather import move_on
from packcast.packed.replay import ReplayReceiver, ReplaySender
from tests.packed.replays import AGREEMENT
from tests.packed.streams import Receiving, Sending, gpu, needs_gpu, pause

pytestmark = needs_gpu


@pytest.fixture(params=["table", "plain"], autouse=True)
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies by table and plain ones."""
    if request.param == "plain":
        monkeypatch.setattr(replay, "move_on", lambda device: None)
    elif move_on(gpu()) is None:
        pytest.skip("no Triton")


def weights(value: int) -> dict[str, torch.Tensor]:
    """One that lies well, and one that needs a stand-in."""
    turned = torch.full((30, 50), value, dtype=torch.uint8, device=gpu()).t()
    return {"flat": torch.full((700,), value, dtype=torch.uint8, device=gpu()), "turned": turned}


def test_what_was_bound_on_a_busy_stream_is_sent_on_another() -> None:
    group, tensors = Sending(0), weights(1)
    sender = ReplaySender(tensors, group, 0, buffer_size=4096)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    pause()
    sender.bind(tensors)
    with torch.cuda.stream(side):
        for tensor in tensors.values():
            tensor.fill_(7)
        sender.send()
    (sent,) = group.wire()[AGREEMENT:]
    assert (set(sent[:700]), set(sent[768:])) == ({7}, {7})  # at multiples of 256
    assert len(sent) == 768 + 1500


def test_what_was_bound_on_a_busy_stream_is_received_into_on_another() -> None:
    sending = Sending(0)
    sender = ReplaySender(weights(5), sending, 0, buffer_size=4096)
    sender.send(weights(5))
    sent = [torch.tensor(list(part), dtype=torch.uint8, device=gpu()) for part in sending.wire()]
    receiver = ReplayReceiver(Receiving(sent, 0), 0)
    into = weights(1)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    pause()
    receiver.bind(into)
    with torch.cuda.stream(side):
        receiver.receive()
        landed = [tensor.unique().tolist() for tensor in into.values()]
    assert landed == [[5], [5]]
