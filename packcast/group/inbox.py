"""Between the control thread and the threads that wait: messages, the verdict, the commitment.

The verdict (why the transfer ends) and the commitment (nothing ends it any more) exclude each
other, so both are settled here under one lock. Knows no sockets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, TypeVar

from packcast.errors import PackcastError, TransferError
from packcast.group.clock import Deadline

T = TypeVar("T")

Judgement = Literal["fatal", "known", "late"]


class Inbox:
    """What one end of the control channel has to tell its own process; any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._verdict: PackcastError | None = None
        self._committed = False
        self._closing = False

    @property
    def verdict(self) -> PackcastError | None:
        """Why the transfer ended, once it has; never changes after that."""
        return self._verdict

    @property
    def committed(self) -> bool:
        """Whether the loss of a peer no longer ends the transfer."""
        return self._committed

    def judge(self, error: PackcastError) -> Judgement:
        """Make `error` the verdict: `fatal`. `known`: there is one. `late`: committed, closing."""
        with self._changed:
            if self._verdict is not None:
                return "known"
            if self._committed or self._closing:
                return "late"
            self._verdict = error
            self._changed.notify_all()
            return "fatal"

    def give_up(self, error: PackcastError) -> bool:
        """This process's own decision to end, whatever was agreed; whether it is the first."""
        with self._changed:
            if self._verdict is not None or self._closing:
                return False
            self._verdict = error
            self._changed.notify_all()
            return True

    def commit(self) -> None:
        """From now on no peer's loss is fatal; raises the verdict if one came first."""
        with self._changed:
            if self._verdict is not None:
                raise self._verdict
            self._committed = True

    def close(self) -> bool:
        """No verdict after this; whoever waits is told. Whether this was the first call."""
        with self._changed:
            first = not self._closing
            self._closing = True
            self._changed.notify_all()
            return first

    def change(self, act: Callable[[], None]) -> None:
        """Run `act` where no waiting thread looks, then have them look again."""
        with self._changed:
            act()
            self._changed.notify_all()

    def wait_for(self, look: Callable[[], T | None], deadline: Deadline) -> T | None:
        """What `look` finds (called with the lock held), None at the deadline.

        Raises the verdict as soon as there is one.
        """
        with self._changed:
            while True:
                if self._verdict is not None:
                    raise self._verdict
                found = look()
                if found is not None:
                    return found
                if self._closing:
                    raise TransferError("the control channel is closed")
                left_s = deadline.left_s()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)

    def wait_verdict(self, timeout_s: float) -> PackcastError | None:
        """The verdict, waited for; None if none came in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._verdict is not None, timeout_s)
            return self._verdict
