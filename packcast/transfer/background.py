"""A transfer inside somebody's process: a thread of ours does it, the calling thread waits for it.

A collective may hang, and no thread can be freed from one: so the caller's is never inside. What
ends a transfer from elsewhere is raised there, and a stuck thread is left behind.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from packcast.errors import Interrupted, PackcastError, TransferError, as_packcast_error
from packcast.launch.exit import CLEAN_UP_LIMIT_S

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

OnTensor = Callable[[str, "torch.Tensor"], object]

_END_LIMIT_S = 1.0  # for the transfer's thread to hear of the end, if it is not stuck
_LET_GO_LIMIT_S = 2.0
_POLL_S = 0.25


class BackgroundTransfer:
    """The calling thread of one library call: where its transfer's ends and questions meet it.

    An `ExitHandler`: `leave`, from any thread, makes `run` clean up and raise. Installs no signal
    handler, since Python's own reach a thread that waits here.
    """

    survives = True

    def __init__(self) -> None:
        self.error: PackcastError | None = None
        self._first = threading.Lock()
        self._leaving = threading.Event()
        self._shielded = threading.Event()
        self._clean_ups: list[Callable[[], object]] = []
        self._let_go: list[Callable[[], object]] = []
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()

    # For any thread.

    def on_leave(
        self, clean_up: Callable[[], object], left: Callable[[], str | None] | None = None
    ) -> None:
        """Call this when the transfer ends by `leave`; if it has, at once, and raise its error."""
        self._clean_ups.append(clean_up)
        if self._leaving.is_set() and self.error is not None:
            clean_up()
            raise self.error

    def on_abandon(self, let_go: Callable[[], object]) -> None:
        """Call this when the transfer has failed, even where its thread is stuck."""
        self._let_go.append(let_go)

    def leave(self, error: PackcastError) -> None:
        """Have `run` raise `error`, after the clean-ups; the first call decides."""
        if not self._first.acquire(blocking=False):
            return
        self.error = error
        self._leaving.set()
        cleaner = threading.Thread(target=self._clean_up, name="packcast-clean-up", daemon=True)
        cleaner.start()
        cleaner.join(CLEAN_UP_LIMIT_S)
        self._calls.put(None)

    def shield(self) -> None:
        """From now on an interruption waits for the end: it comes too late to stop anything."""
        self._shielded.set()

    def post(self, call: Callable[[], object]) -> None:
        """Have the calling thread do this, in the order of posting."""
        self._calls.put(call)

    def ask(self, question: Callable[[], T]) -> T:
        """What the calling thread answers; raises why the transfer ended, if it ends first."""
        answers: SimpleQueue[T] = SimpleQueue()
        self.post(lambda: answers.put(question()))
        while True:
            with suppress(Empty):
                return answers.get(timeout=_POLL_S)
            if self.error is not None:
                raise self.error

    # For the calling thread.

    def run(self, transfer: Callable[[], T]) -> T:
        """What `transfer` returns or raises, which runs in a thread of its own meanwhile.

        Raises the error of `leave` where that comes first. Where the calling thread is interrupted,
        or something that it was asked to do raises, the transfer is ended and that is raised.
        """
        try:
            return self._run(transfer)
        finally:
            # They have the transfer's buffers, and a cycle with this object; and an error that is
            # raised has this object in its frames, and may be kept for long.
            self._let_go.clear()
            self._clean_ups.clear()

    def _run(self, transfer: Callable[[], T]) -> T:
        results: list[T] = []
        faults: list[Exception] = []

        def work() -> None:
            try:
                results.append(transfer())
            except Exception as fault:
                faults.append(fault)
            finally:
                self._calls.put(None)

        thread = threading.Thread(target=work, name="packcast-transfer", daemon=True)
        try:
            thread.start()  # inside: an interrupt may come in the middle of it
            while (call := self._calls.get()) is not None:
                if self.error is None:
                    call()
        except BaseException as fault:
            if self._shielded.is_set():
                thread.join()
            else:
                self._give_up(fault)
                self._await_end(thread, faults)
            raise
        # What its thread met after `leave` only follows from that.
        cause: Exception | None = self.error
        if cause is None and faults:
            cause = faults[0]
            self.leave(as_packcast_error(cause, "the transfer"))
        if results:
            # To its very end: what it drops last may be torch's, whose destructors, met by the end
            # of the interpreter on a thread that is not the main one, abort the process.
            thread.join(_END_LIMIT_S)
            return results[0]
        self._await_end(thread, faults)
        assert cause is not None, "it ended by itself, or by leave"
        raise cause

    def _give_up(self, fault: BaseException) -> None:
        if isinstance(fault, KeyboardInterrupt):
            self.leave(Interrupted("interrupted", signal_number=signal.SIGINT))
        else:
            self.leave(TransferError(f"this rank's program raised {fault!r}"))

    def _await_end(self, thread: threading.Thread, faults: list[Exception]) -> None:
        """The end of the transfer's thread; one that is stuck on a GPU is let go, or left behind.

        What it held goes first: a process group's end may block whoever holds it last, and that
        is to be the one that it is given up to.
        """
        if thread.is_alive():
            thread.join(_END_LIMIT_S)
        for fault in faults:
            _forget_frames(fault)
        for let_go in self._let_go:
            with suppress(Exception):
                let_go()
        if thread.is_alive():
            thread.join(_LET_GO_LIMIT_S)

    def _clean_up(self) -> None:
        for clean_up in list(self._clean_ups):
            with suppress(Exception):
                clean_up()


def _forget_frames(fault: BaseException | None) -> None:
    """Drop what the frames of a thread that has ended still hold: buffers, and others' tensors."""
    while fault is not None:
        traceback.clear_frames(fault.__traceback__)
        fault = fault.__cause__ or fault.__context__


class TensorQueue:
    """Finished tensors on their way to the calling thread, at most `limit_nbytes` of them waiting.

    One that is larger than that waits alone. `put` is for the transfer's threads.
    """

    def __init__(self, caller: BackgroundTransfer, on_tensor: OnTensor, limit_nbytes: int) -> None:
        self._caller = caller
        self._on_tensor = on_tensor
        self._limit_nbytes = limit_nbytes
        self._changed = threading.Condition()
        self._num_waiting = self._nbytes_waiting = 0
        self._stopped = False

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Hand this out, once there is room; raises TransferError after `stop`."""
        with self._changed:
            self._wait_for(lambda: self._nbytes_waiting + tensor.nbytes <= self._limit_nbytes)
            self._num_waiting += 1
            self._nbytes_waiting += tensor.nbytes
        self._caller.post(partial(self._hand_out, name, tensor))

    def finish(self) -> None:
        """Block until the caller has taken all; raises TransferError after `stop`."""
        with self._changed:
            self._wait_for(lambda: False)

    def stop(self) -> None:
        """Wake everyone who waits here; for any thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait_for(self, has_room: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._stopped or not self._num_waiting or has_room())
        if self._stopped:
            raise TransferError("the transfer is over")

    def _hand_out(self, name: str, tensor: torch.Tensor) -> None:
        self._on_tensor(name, tensor)
        with self._changed:
            self._num_waiting -= 1
            self._nbytes_waiting -= tensor.nbytes
            self._changed.notify_all()
