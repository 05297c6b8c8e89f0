"""The process group: two real ranks over gloo, and a way down that has a bound."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from packcast.errors import RendezvousError
from packcast.launch import processgroup
from packcast.launch.processgroup import (
    NCCL_GROUP_VARIABLES,
    begin_abort,
    begin_close,
    environment_with,
    interface_variable,
)
from tests.launch.two_ranks import run_program

TWO_RANKS = """
import os, sys, time
import torch
from packcast.errors import RendezvousError
from packcast.control.addresses import interface_of
from packcast.launch.processgroup import begin_close, broadcast_over, open_process_group
from packcast.launch.store import serve_store
from tests.launch.two_ranks import become_two

two = become_two(10.0)
rank, store = two.rank, two.store
before = dict(os.environ)
group = open_process_group(
    "gloo", rank=rank, world_size=2, store=store, device=torch.device("cpu"), timeout_s=20.0,
    interface=interface_of("127.0.0.1"), check=lambda: None,
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
        device=torch.device("cpu"), timeout_s=1.0, interface=None, check=lambda: None,
    )
except RendezvousError as error:
    print(error.message)
"""


def test_two_ranks_make_a_group_broadcast_and_take_it_down() -> None:
    ran = run_program(TWO_RANKS)
    assert ran.stdout.startswith("the gloo process group could not be created: ")
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


def test_after_waiting_for_the_shutdown_no_thread_holds_the_group() -> None:
    import torch

    group = Hangs()
    alive = weakref.ref(group)
    ended = begin_close(group, torch.device("cpu"))
    group.released.set()
    del group
    assert ended.wait(10)
    assert alive() is None


NAME, OTHER = "PACKCAST_TEST_ONE", "PACKCAST_TEST_TWO"


def seen_by_libraries(name: str) -> str | None:
    getenv = ctypes.CDLL(None).getenv
    getenv.argtypes, getenv.restype = [ctypes.c_char_p], ctypes.c_char_p
    value = getenv(name.encode())
    return None if value is None else value.decode()


def test_variables_for_cpp_libraries_leave_the_callers_environment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(OTHER, "mine")
    before = dict(os.environ)
    with environment_with({NAME: "x", OTHER: "theirs"}):
        assert (seen_by_libraries(NAME), seen_by_libraries(OTHER)) == ("x", "mine")
        assert dict(os.environ) == before
    assert (seen_by_libraries(NAME), seen_by_libraries(OTHER)) == (None, "mine")
    assert dict(os.environ) == before


def test_a_variable_stays_until_the_last_thread_that_needs_it_has_left() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with environment_with({NAME: "x"}):
            inside.set()
            leave.wait(10.0)

    thread = threading.Thread(target=other)
    with environment_with({NAME: "x"}):
        thread.start()
        assert inside.wait(10.0)
    assert seen_by_libraries(NAME) == "x"
    leave.set()
    thread.join(10.0)
    assert seen_by_libraries(NAME) is None


def test_what_the_caller_sets_meanwhile_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    with environment_with({NAME: "x"}):
        monkeypatch.setenv(NAME, "mine")
    assert (os.environ[NAME], seen_by_libraries(NAME)) == ("mine", "mine")


def test_nccl_is_told_of_one_interface_and_not_of_all_that_begin_alike() -> None:
    assert interface_variable("nccl", "eth1") == {"NCCL_SOCKET_IFNAME": "=eth1"}
    assert interface_variable("gloo", "eth1") == {"GLOO_SOCKET_IFNAME": "eth1"}
    assert interface_variable("nccl", None) == {}
    assert set(NCCL_GROUP_VARIABLES.values()) == {"0"}


def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_connecting_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from torch.distributed import HashStore

    monkeypatch.setattr(processgroup, "_GLOO_LIMIT_S", 0.3)
    with pytest.raises(RendezvousError, match=r"not answer within 0.3 s; does a firewall block"):
        processgroup.open_process_group(
            "gloo",
            rank=0,
            world_size=2,
            store=HashStore(),
            device=torch.device("cpu"),
            timeout_s=2.0,
            interface="lo",
            check=lambda: None,
        )
