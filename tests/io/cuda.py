"""What CUDA's runtime and driver do for the data path, on a CPU."""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict, deque
from typing import NamedTuple

from packcast.io.native import CopyDriver

_NOT_READY = 600


class _Queued(NamedTuple):
    """A copy, or an event to pass."""

    into: int
    source: int
    nbytes: int
    event: int


class LateDevice:
    """Copies when it is asked how far it is, a few at a time; memory that is reused too soon shows.

    `driver` has what takes the place of the functions of CUDA's driver; streams and events are any
    numbers. `num_copies` counts.
    """

    def __init__(self) -> None:
        self.num_copies = 0
        self._queues: dict[int, deque[_Queued]] = defaultdict(deque)
        self._stream_of: dict[int, int] = {}
        self._passed: dict[int, bool] = {}
        self._dice = random.Random(1)
        number, address, size = ctypes.c_int32, ctypes.c_uint64, ctypes.c_size_t
        self._kept = (  # by whoever may call them
            ctypes.CFUNCTYPE(number, address, address, size, address)(self._copy),
            ctypes.CFUNCTYPE(number, address, address)(self._record),
            ctypes.CFUNCTYPE(number, address)(self._query),
        )
        addresses = [ctypes.cast(it, ctypes.c_void_p).value or 0 for it in self._kept]
        self.driver = CopyDriver(*addresses)

    def pass_all(self, stream: int) -> None:
        """Do all that the stream has to do."""
        while self._queues[stream]:
            self._pass_one(stream)

    def _copy(self, into: int, source: int, nbytes: int, stream: int) -> int:
        self.num_copies += 1
        self._queues[stream].append(_Queued(into, source, nbytes, 0))
        return 0

    def _record(self, event: int, stream: int) -> int:
        self._stream_of[event], self._passed[event] = stream, False
        self._queues[stream].append(_Queued(0, 0, 0, event))
        return 0

    def _query(self, event: int) -> int:
        stream = self._stream_of[event]
        for _ in range(self._dice.randrange(3)):
            self._pass_one(stream)
        return 0 if self._passed[event] else _NOT_READY

    def _pass_one(self, stream: int) -> None:
        queue = self._queues[stream]
        if not queue:
            return
        it = queue.popleft()
        if it.event:
            self._passed[it.event] = True
        else:
            ctypes.memmove(it.into, it.source, it.nbytes)


class Cudart:
    """Pins and unpins, as CUDA's runtime; knows what is pinned. The `device` copies."""

    def __init__(self) -> None:
        self.device = LateDevice()
        self.pinned: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.pinned.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0
