"""A call that may never come back, waited for only so long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(limit_s: float, name: str, call: Callable[[], T]) -> tuple[T] | None:
    """What `call` returned, in a tuple, or None where it has not in `limit_s`; what it raised is
    raised. It runs on a daemon thread called `name`, which stays behind where it is stuck."""
    results: list[T] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, name=name, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    return (results[0],) if results else None
