"""torch's default group, for a while: two real ranks over gloo, and no rank left waiting."""

from __future__ import annotations

from tests.group.two_ranks import run_program

BEGIN = """
import os, sys, threading
import torch
import torch.distributed as dist
from packcast.errors import RendezvousError
from packcast.group import defaultgroup
from packcast.group.addresses import interface_of
from tests.group.two_ranks import become_two

two = become_two(20.0)
rank, store = two.rank, two.store

def open_group(name, limit_s=20.0):
    return defaultgroup.open_default_group(
        "gloo", name, rank=rank, world_size=2, store=store, device=torch.device("cpu"),
        interface=interface_of("127.0.0.1"), limit_s=limit_s,
    )

def total(group):
    data = torch.tensor([rank + 1])
    dist.all_reduce(data, group=group)
    return data.item()

def leave():
    if rank == 1:
        store.set("gone", "")
        os._exit(0)
    assert os.waitpid(two.child, 0)[1] == 0
"""


def run_two_ranks(body: str) -> None:
    run_program(f"{BEGIN}\n{body}\nleave()\n")


def test_it_is_torchs_default_while_it_is_there_and_nothing_is_left_of_it() -> None:
    run_two_ranks(
        """
before = dict(os.environ), sys.excepthook
for name in ("one", "two"):
    made = open_group(name)
    assert dist.is_initialized() and made.group is dist.group.WORLD
    assert (dist.get_rank(), dist.get_world_size()) == (rank, 2)
    assert total(None) == total(made.group) == 3
    made.close()
    assert not dist.is_initialized()
    assert (dict(os.environ), sys.excepthook) == before
    assert "packcast-default-group" not in [t.name for t in threading.enumerate()]
"""
    )


def test_who_waits_for_a_rank_that_gave_up_is_let_go_and_all_can_begin_anew() -> None:
    run_two_ranks(
        """
aborted = threading.Event()
true_one = defaultgroup.begin_abort
def noted(group, device):
    assert isinstance(group, dist.ProcessGroupGloo)
    aborted.set()
    return true_one(group, device)
defaultgroup.begin_abort = noted

made = open_group("broken")
assert total(None) == 3
if rank == 1:
    made.give_up()
else:
    # It hears of it, for NCCL's sake; gloo's collective ends with the other's connection.
    assert aborted.wait(20)
    try:
        total(None)
        raise AssertionError("the other rank took part")
    except RuntimeError:
        pass
assert made.is_given_up()
made.close()
again = open_group("again")
assert total(None) == 3 and not again.is_given_up()
again.close()
"""
    )


def test_a_rank_that_cannot_or_does_not_come_is_told_to_the_other() -> None:
    run_two_ranks(
        """
if rank == 1:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
try:
    open_group("taken")
    raise AssertionError("a process has one default group only")
except RendezvousError as error:
    assert isinstance(error, defaultgroup.Forsaken) == (rank == 0), error
    assert rank == 0 or "has a default group already" in error.message
assert dist.is_initialized() == (rank == 1)  # which was not ours to destroy

if rank == 0:
    try:
        open_group("alone", limit_s=0.2)
        raise AssertionError("the other rank did not come")
    except RendezvousError as error:
        assert "not all ranks joined within" in error.message
assert threading.active_count() == 1
"""
    )
