"""Threads that wait for a change of the control thread's state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from packcast.errors import PackcastError


@dataclass(slots=True)
class _Waiter:
    look: Callable[[], Any]
    future: Future[Any]
    until: float


class Waiters:
    """Conditions of other threads, tested on the loop after every change.

    `look()` returns the result, or None for not yet; the waiting thread gets what it raises.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiters: list[_Waiter] = []
        self._is_due = False

    def add(self, look: Callable[[], Any], future: Future[Any], until: float) -> None:
        """Set `future` to the result of `look`, or to None at `until`."""
        waiter = _Waiter(look, future, until)
        if not self._is_answered(waiter):
            self._waiters.append(waiter)

    def changed(self) -> None:
        """Test all conditions again, once for all changes in this turn of the loop."""
        if self._waiters and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._look)

    def expire(self, now: float) -> None:
        """Set the late ones to None."""
        late = [waiter for waiter in self._waiters if now >= waiter.until]
        for waiter in late:
            self._waiters.remove(waiter)
            waiter.future.set_result(None)

    def end(self, error: PackcastError) -> None:
        """Raise this in all waiting threads."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.future.set_exception(error)

    def _look(self) -> None:
        self._is_due = False
        self._waiters = [waiter for waiter in self._waiters if not self._is_answered(waiter)]

    def _is_answered(self, waiter: _Waiter) -> bool:
        try:
            found = waiter.look()
        except Exception as error:
            waiter.future.set_exception(error)
            return True
        if found is not None:
            waiter.future.set_result(found)
        return found is not None
