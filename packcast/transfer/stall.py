"""Ends a transfer in which all ranks are alive but no byte moves."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from packcast.control.channel import Channel
from packcast.errors import TransferError
from packcast.launch.exit import ExitHandler
from packcast.packed.counters import Counters
from packcast.units import format_duration


class Watched(Protocol):
    """Moves bytes, as DataPlane does."""

    @property
    def counters(self) -> Counters:
        """Change with every byte."""

    def position(self) -> str:
        """How far it is, for messages."""


class StallWatch:
    """Calls `exit_handler.leave` when no byte has moved on any rank for `timeout_s`."""

    def __init__(
        self, data_plane: Watched, channel: Channel, exit_handler: ExitHandler, timeout_s: float
    ) -> None:
        self._data_plane = data_plane
        self._channel = channel
        self._exit_handler = exit_handler
        self._timeout_s = timeout_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="packcast-stall", daemon=True)

    def __enter__(self) -> StallWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        last: object = None
        since = time.monotonic()
        while not self._over.wait(min(0.5, self._timeout_s / 4)):
            counters = self._data_plane.counters
            now = (counters.totals(), counters.num_pauses, self._channel.moved_elsewhere())
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout_s:
                self._exit_handler.leave(
                    TransferError(
                        f"no byte has moved for {format_duration(self._timeout_s)}"
                        f" at {self._data_plane.position()}, though no rank is known to be lost",
                        hint="raise --stall-timeout to allow longer pauses",
                    )
                )
                return
