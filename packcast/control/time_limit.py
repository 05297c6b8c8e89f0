"""A call that may never return, with a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_CHECK_EVERY_S = 0.1


def within(
    limit_s: float, name: str, call: Callable[[], T], *, check: Callable[[], object] | None = None
) -> tuple[T] | None:
    """The result of `call` in a tuple, or None at the limit; raises what it raised.

    Also raises what `check` raises during the wait. `call` runs on a daemon thread called `name`,
    which stays behind if it is stuck.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, name=name, daemon=True)
    thread.start()
    if check is None:
        thread.join(limit_s)
    else:
        deadline = time.monotonic() + limit_s
        while thread.is_alive() and (left_s := deadline - time.monotonic()) > 0:
            thread.join(min(left_s, _CHECK_EVERY_S))
            check()
    if errors:
        raise errors[0]
    return (results[0],) if results else None
