"""The calling thread of a library call: what ends its transfer is raised there, whatever hangs."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from packcast.errors import Interrupted, TransferError
from packcast.transfer.background import BackgroundTransfer, TensorQueue
from tests.helpers.waiting import Waiter


def test_it_returns_what_the_transfer_returns_from_another_thread() -> None:
    assert BackgroundTransfer().run(threading.get_ident) != threading.get_ident()


def test_it_raises_what_the_transfer_raises_after_the_clean_ups() -> None:
    caller, seen = BackgroundTransfer(), []
    caller.on_leave(lambda: seen.append("cleaned"))
    caller.on_abandon(lambda: seen.append("let go"))

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        caller.run(fail)
    assert seen == ["cleaned", "let go"]


def test_what_ends_it_from_elsewhere_is_raised_though_the_transfer_hangs() -> None:
    caller, seen, freed = BackgroundTransfer(), [], threading.Event()
    lost = TransferError("lost rank 3")
    caller.on_leave(lambda: 1 / 0)
    caller.on_leave(lambda: seen.append(caller.error))
    caller.on_abandon(freed.set)

    def hang() -> None:
        threading.Timer(0.05, caller.leave, [lost]).start()
        freed.wait(20)
        caller.leave(TransferError("only follows"))
        raise TransferError("follows too")

    began = time.monotonic()
    with pytest.raises(TransferError) as raised:
        caller.run(hang)
    assert raised.value is lost
    assert seen == [lost]
    assert time.monotonic() - began < 10


def test_a_clean_up_registered_too_late_runs_at_once_and_ends_its_thread() -> None:
    caller, seen = BackgroundTransfer(), []
    caller.leave(TransferError("lost rank 3"))
    with pytest.raises(TransferError, match="rank 3"):
        caller.on_leave(lambda: seen.append("cleaned"))
    assert seen == ["cleaned"]


def test_questions_are_answered_in_the_calling_thread() -> None:
    caller = BackgroundTransfer()
    assert caller.run(lambda: caller.ask(threading.get_ident)) == threading.get_ident()


def test_a_question_that_will_not_be_answered_ends() -> None:
    caller = BackgroundTransfer()
    caller.leave(TransferError("lost rank 3"))
    with pytest.raises(TransferError, match="rank 3"):
        caller.ask(threading.get_ident)


def test_an_interrupt_ends_the_transfer_and_passes_through() -> None:
    caller, ended = BackgroundTransfer(), threading.Event()
    caller.on_leave(ended.set)

    def interrupted() -> None:
        interrupt_main()
        ended.wait(20)

    with pytest.raises(KeyboardInterrupt):
        caller.run(interrupted)
    assert isinstance(caller.error, Interrupted)
    assert caller.error.exit_code == 128 + signal.SIGINT


def test_after_the_point_of_no_return_an_interrupt_waits_for_the_end() -> None:
    caller, seen = BackgroundTransfer(), []
    caller.on_leave(lambda: seen.append("cleaned"))

    def publishing() -> None:
        caller.shield()
        interrupt_main()
        seen.append("published")

    with pytest.raises(KeyboardInterrupt):
        caller.run(publishing)
    assert seen == ["published"]


def interrupt_main() -> None:
    """Ctrl-C, to the main thread, which is the one that waits."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def tensor(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def test_no_more_than_the_limit_waits_but_one_larger_tensor_may() -> None:
    caller, taken = BackgroundTransfer(), []
    hand_out = TensorQueue(caller, lambda name, _: taken.append(name), limit_nbytes=100)
    go_on = threading.Event()

    def transfer() -> None:
        hand_out.put("a", tensor(60))
        hand_out.put("b", tensor(40))
        third = Waiter(lambda: hand_out.put("c", tensor(500)))
        assert third.waits()
        go_on.set()
        third.result()
        hand_out.finish()
        assert taken == ["a", "b", "c"]

    caller.post(lambda: go_on.wait(20))
    caller.run(transfer)


def test_who_waits_for_room_or_the_end_is_woken_when_all_is_over() -> None:
    hand_out = TensorQueue(BackgroundTransfer(), lambda *_: None, limit_nbytes=100)
    hand_out.put("a", tensor(60))
    waiting = [Waiter(lambda: hand_out.put("b", tensor(60))), Waiter(hand_out.finish)]
    assert all(waiter.waits() for waiter in waiting)
    hand_out.stop()
    for waiter in waiting:
        with pytest.raises(TransferError, match="over"):
            waiter.result()
