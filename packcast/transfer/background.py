"""A transfer inside a caller's process: it runs on a thread of ours, and the calling thread waits.

No thread can be freed from a hanging collective, so the calling thread is never inside one. A
failure is raised in the calling thread, and a stuck thread is left behind.
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

_END_LIMIT_S = 1.0  # for the transfer's thread to end, if it is not stuck
_FREE_LIMIT_S = 2.0
_POLL_S = 0.25


class BackgroundTransfer:
    """One library call: runs the transfer on a thread, and calls of it in the calling thread.

    An `ExitHandler`: `leave`, from any thread, makes `run` clean up and raise. Installs no signal
    handler: Python's own interrupt the waiting thread.
    """

    survives = True

    def __init__(self) -> None:
        self.error: PackcastError | None = None
        self._first = threading.Lock()
        self._leaving = threading.Event()
        self._shielded = threading.Event()
        self._clean_ups: list[Callable[[], object]] = []
        self._free: list[Callable[[], object]] = []
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()

    # For any thread.

    def on_leave(
        self, clean_up: Callable[[], object], left: Callable[[], str | None] | None = None
    ) -> None:
        """Register a clean-up for `leave`; if that was called, call it now and raise the error."""
        self._clean_ups.append(clean_up)
        if self._leaving.is_set() and self.error is not None:
            clean_up()
            raise self.error

    def on_abandon(self, free: Callable[[], object]) -> None:
        """Register what frees the transfer's memory after a failure; its thread may be stuck."""
        self._free.append(free)

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
        """From now on an interrupt waits for the end: it is too late to stop the transfer."""
        self._shielded.set()

    def post(self, call: Callable[[], object]) -> None:
        """Call this in the calling thread, in order."""
        self._calls.put(call)

    def ask(self, question: Callable[[], T]) -> T:
        """The result of a call in the calling thread; raises the error if the transfer fails."""
        answers: SimpleQueue[T] = SimpleQueue()
        self.post(lambda: answers.put(question()))
        while True:
            with suppress(Empty):
                return answers.get(timeout=_POLL_S)
            if self.error is not None:
                raise self.error

    # For the calling thread.

    def run(self, transfer: Callable[[], T]) -> T:
        """Run `transfer` on its own thread; returns or raises what it does.

        Raises the error of `leave` if that comes first. If the calling thread is interrupted, or a
        posted call raises, that ends the transfer and is raised.
        """
        try:
            return self._run(transfer)
        finally:
            # They hold the transfer's buffers, and an error that the caller keeps holds this
            # object in its frames.
            self._free.clear()
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
            thread.start()  # inside the try: an interrupt may come in the middle of it
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
        # An error of the thread after `leave` is only a consequence.
        cause: Exception | None = self.error
        if cause is None and faults:
            cause = faults[0]
            self.leave(as_packcast_error(cause, "the transfer"))
        if results:
            # Until it has ended: if the interpreter ends while torch's destructors run on a thread
            # that is not the main one, the process aborts.
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
        """Wait for the transfer's thread; one that is stuck on a GPU is freed, or left behind.

        Its frames are cleared first: the end of a process group may block the thread that holds
        the last reference, which must be the one that aborts it.
        """
        if thread.is_alive():
            thread.join(_END_LIMIT_S)
        for fault in faults:
            _forget_frames(fault)
        for free in self._free:
            with suppress(Exception):
                free()
        if thread.is_alive():
            thread.join(_FREE_LIMIT_S)

    def _clean_up(self) -> None:
        for clean_up in list(self._clean_ups):
            with suppress(Exception):
                clean_up()


def _forget_frames(fault: BaseException | None) -> None:
    """Drop what the frames of an ended thread still hold: buffers, and the caller's tensors."""
    while fault is not None:
        traceback.clear_frames(fault.__traceback__)
        fault = fault.__cause__ or fault.__context__


class TensorQueue:
    """Finished tensors for the calling thread; at most `limit_nbytes` wait, or one larger tensor.

    `put` is for the transfer's threads.
    """

    def __init__(self, caller: BackgroundTransfer, on_tensor: OnTensor, limit_nbytes: int) -> None:
        self._caller = caller
        self._on_tensor = on_tensor
        self._limit_nbytes = limit_nbytes
        self._changed = threading.Condition()
        self._num_waiting = self._nbytes_waiting = 0
        self._stopped = False

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Deliver this once there is room; raises TransferError after `stop`."""
        with self._changed:
            self._wait_for(lambda: self._nbytes_waiting + tensor.nbytes <= self._limit_nbytes)
            self._num_waiting += 1
            self._nbytes_waiting += tensor.nbytes
        self._caller.post(partial(self._deliver, name, tensor))

    def finish(self) -> None:
        """Block until the caller has received all; raises TransferError after `stop`."""
        with self._changed:
            self._wait_for(lambda: False)

    def stop(self) -> None:
        """Wake all waiting threads; for any thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait_for(self, has_room: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._stopped or not self._num_waiting or has_room())
        if self._stopped:
            raise TransferError("the transfer is over")

    def _deliver(self, name: str, tensor: torch.Tensor) -> None:
        self._on_tensor(name, tensor)
        with self._changed:
            self._num_waiting -= 1
            self._nbytes_waiting -= tensor.nbytes
            self._changed.notify_all()
