"""A thread that is expected to wait, and to go on when it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable

WAITS_S = 0.05  # long enough for what does not wait to be over
LIMIT_S = 10.0


class Waiter:
    """Runs `body` in a thread of its own at once."""

    def __init__(self, body: Callable[[], object]) -> None:
        self._body = body
        self._value: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def waits(self) -> bool:
        """Is it still under way after a moment?"""
        self._thread.join(WAITS_S)
        return self._thread.is_alive()

    def result(self) -> object:
        """What `body` returned or raised, waited for."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "it still waits"
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._body()
        except BaseException as error:
            self._error = error
