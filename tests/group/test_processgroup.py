"""The process group: two real ranks over gloo, and a way down that has a bound."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

import pytest

from packcast.group.processgroup import begin_abort, begin_close
from tests.group.two_ranks import run_program

TWO_RANKS = """
import os, sys, time
import torch
from packcast.errors import RendezvousError
from packcast.group.addresses import interface_of
from packcast.group.processgroup import begin_close, broadcast_over, open_process_group
from packcast.group.store import serve_store
from tests.group.two_ranks import become_two

two = become_two(10.0)
rank, store = two.rank, two.store
before = dict(os.environ)
group = open_process_group(
    "gloo", rank=rank, world_size=2, store=store, device=torch.device("cpu"), timeout_s=20.0,
    interface=interface_of("127.0.0.1"),
)
tensor = torch.full((4,), rank)
broadcast_over(group, lambda: None)(tensor, 0)
assert tensor.tolist() == [0, 0, 0, 0]
assert dict(os.environ) == before
assert not torch.distributed.is_initialized()
started = time.monotonic()
assert begin_close(group, torch.device("cpu")).wait(5.0)
assert time.monotonic() - started < 4.0
if rank == 1:
    os._exit(0)
assert os.waitpid(two.child, 0)[1] == 0
# And once more, with a peer that never comes.
try:
    open_process_group(
        "gloo", rank=0, world_size=2, store=serve_store("127.0.0.1", 1.0)[0],
        device=torch.device("cpu"), timeout_s=1.0, interface=None,
    )
except RendezvousError as error:
    print(error.message)
"""


def test_two_ranks_make_a_group_broadcast_and_take_it_down() -> None:
    ran = run_program(TWO_RANKS)
    assert ran.stdout.startswith("the gloo process group could not be made: ")
    assert len(ran.stdout.splitlines()) == 1


class Hangs:
    """A group whose way down does not end until it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def broadcast(self, tensors: object, opts: object) -> None: ...

    def shutdown(self) -> None:
        self.released.wait(10)

    abort = shutdown


@pytest.mark.parametrize("begin", [begin_close, begin_abort])
def test_a_way_down_that_hangs_can_be_given_up(
    begin: Callable[[Hangs, object], threading.Event],
) -> None:
    import torch

    group = Hangs()
    started = time.monotonic()
    ended = begin(group, torch.device("cpu"))
    assert not ended.wait(0.2)
    assert time.monotonic() - started < 2
    group.released.set()
    assert ended.wait(10)


def test_whoever_has_waited_for_the_way_down_leaves_no_group_to_another_thread() -> None:
    import torch

    group = Hangs()
    alive = weakref.ref(group)
    ended = begin_close(group, torch.device("cpu"))
    group.released.set()
    del group
    assert ended.wait(10)
    assert alive() is None
