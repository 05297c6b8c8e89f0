"""The compiled pool: finds it and the hash function that it calls, and drives it through ctypes.

Its threads are no Python threads: nothing of the interpreter is in the way of a byte. Knows no
torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import sysconfig
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from packcast.io.schedule import Schedule
from packcast.io.work import Failure, FailureKind, PoolStopped, Task, Totals, Work

_ABI = 3
_TOLERANT, _WRITEBACK, _UNHASHED = 1, 2, 4
_END_LIMIT_S = 1.0
_DEVICE_FAILED = -2


class _Hash128(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


class _Config(ctypes.Structure):
    _fields_ = (
        ("task", ctypes.c_int64),
        ("flags", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("num_units", ctypes.c_int64),
        ("num_pieces", ctypes.c_int64),
        ("pieces", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("descriptors", ctypes.c_void_p),
        ("digests", ctypes.c_void_p),
        ("differences", ctypes.c_void_p),
        ("hash", ctypes.c_void_p),
        ("grain_nbytes", ctypes.c_int64),
    )


class _Copies(ctypes.Structure):
    _fields_ = (
        ("copy", ctypes.c_void_p),
        ("record", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("events", ctypes.c_void_p),
        ("copies", ctypes.c_void_p),
        ("num_places", ctypes.c_int64),
        ("num_ready", ctypes.c_int64),
        ("num_begun", ctypes.c_int64),
        ("num_over", ctypes.c_int64),
        ("begin", ctypes.c_void_p),
        ("code", ctypes.c_int64),
    )


class DeviceFailed(Exception):
    """A copy, or an event, that the device's driver refused with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class CopyDriver:
    """Addresses of functions as CUDA's cuMemcpyHtoDAsync, cuEventRecord and cuEventQuery."""

    copy: int
    record: int
    query: int


@functools.cache
def cuda_driver() -> CopyDriver | None:
    """CUDA's own, where it is installed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        found = (driver.cuMemcpyHtoDAsync_v2, driver.cuEventRecord, driver.cuEventQuery)
    except (OSError, AttributeError):
        return None
    return CopyDriver(*(ctypes.cast(it, ctypes.c_void_p).value or 0 for it in found))


@dataclass(frozen=True, slots=True)
class Library:
    """The compiled pool and the address of a function as XXH3_128bits."""

    functions: ctypes.CDLL
    hash_address: int


def open_library(path: Path) -> Library:
    """Load a compiled pool; raises OSError where it, or a hash function for it, cannot be had."""
    functions = ctypes.CDLL(str(path))
    pool, count = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[list[type], type | None]] = {
        "abi": ([], count),
        "start": ([ctypes.POINTER(_Config), ctypes.POINTER(pool)], ctypes.c_int),
        "allow": ([pool, count], None),
        "wait": ([pool, count, count], ctypes.c_int),
        "copy": (
            [pool, ctypes.POINTER(_Copies), count, count, ctypes.c_uint64, count],
            ctypes.c_int,
        ),
        "stop": ([pool], None),
        "join": ([pool, count], count),
        "free": ([pool], None),
        "totals": ([pool, ctypes.POINTER(count)], None),
        "failure": ([pool, ctypes.POINTER(count)], None),
    }
    for name, (arguments, result) in signatures.items():
        try:
            # Not by index: that makes another object each time, which would not keep the types.
            function = getattr(functions, f"packcast_pool_{name}")
        except AttributeError as error:
            raise OSError(f"{path} has no {name}") from error
        function.argtypes, function.restype = arguments, result
    if functions.packcast_pool_abi() != _ABI:
        raise OSError(f"{path} was built for another version of packcast")
    return Library(functions, _hash_address())


@functools.cache
def installed() -> Library | str:
    """The compiled pool of this installation, or why there is none."""
    name = f"_pool{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = Path(__file__).with_name(name)
    if not path.exists():
        return "it was not compiled when packcast was installed"
    try:
        return open_library(path)
    except OSError as error:
        return str(error)


def _hash_address() -> int:
    """Of XXH3_128bits: the xxhash package's, chosen for this processor where it can be, else the
    system's. OSError where neither exports one that computes what the package does."""
    for library, name in _hash_candidates():
        with suppress(AttributeError):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_size_t], _Hash128
            data = bytes(range(256)) * 5
            found = function(data, len(data))
            if (found.high << 64 | found.low) == xxhash.xxh3_128_intdigest(data):
                return ctypes.cast(function, ctypes.c_void_p).value or 0
    raise OSError("no library exports XXH3_128bits")


def _hash_candidates() -> Iterator[tuple[ctypes.CDLL, str]]:
    with suppress(ImportError, OSError, AttributeError):
        package = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
        yield package, "XXH3_128bits_dispatch"
        yield package, "XXH3_128bits"
    with suppress(OSError):
        yield ctypes.CDLL("libxxhash.so.0"), "XXH3_128bits"


def _address(buffer: bytearray | array[int]) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0


class NativePool:
    """I/O threads of the compiled pool; see `packcast.io.work.Pool`. Started when it is made."""

    def __init__(self, work: Work, num_threads: int, library: Library) -> None:
        self._functions = library.functions
        schedule = work.schedule
        config = _Config(
            task=work.task,
            flags=(_TOLERANT if work.tolerant else 0)
            | (_WRITEBACK if work.task is Task.WRITE else 0)
            | (0 if work.hashed else _UNHASHED),
            num_threads=num_threads,
            num_units=len(schedule.units),
            num_pieces=schedule.num_pieces,
            pieces=_address(schedule.pieces),
            spans=_address(schedule.spans),
            memory=work.address,
            descriptors=_address(work.descriptors),
            digests=_address(work.digests),
            differences=_address(work.differences),
            hash=library.hash_address,
            grain_nbytes=work.grain_nbytes,
        )
        self._handle = ctypes.c_void_p()
        code = self._functions.packcast_pool_start(ctypes.byref(config), ctypes.byref(self._handle))
        if code:
            raise OSError(code, os.strerror(code))
        # Freed only when no thread can be in a call: a caller holds this object.
        weakref.finalize(
            self, _end, self._functions, self._handle, work, weakref.ref(self), os.getpid()
        )

    def allow(self, num_units: int) -> None:
        self._functions.packcast_pool_allow(self._handle, num_units)

    def wait(self, unit: int, timeout_s: float) -> bool:
        result = self._functions.packcast_pool_wait(self._handle, unit, int(timeout_s * 1e9))
        if result < 0:
            raise PoolStopped(self._failure())
        return bool(result)

    def copy(self, state: _Copies, end: int, until: int, slot: int, timeout_s: float) -> bool:
        """See NativeCopies."""
        timeout_ns = int(timeout_s * 1e9)
        result = self._functions.packcast_pool_copy(
            self._handle, ctypes.byref(state), end, until, slot, timeout_ns
        )
        if result == _DEVICE_FAILED:
            raise DeviceFailed(state.code)
        if result < 0:
            raise PoolStopped(self._failure())
        return bool(result)

    def stop(self) -> None:
        self._functions.packcast_pool_stop(self._handle)

    def close(self, limit_s: float) -> bool:
        self.stop()
        return not self._functions.packcast_pool_join(self._handle, int(limit_s * 1e9))

    def totals(self) -> Totals:
        values = (ctypes.c_int64 * 4)()
        self._functions.packcast_pool_totals(self._handle, values)
        nbytes, *times = values
        busy_s, first_begin, last_end = (nanoseconds / 1e9 for nanoseconds in times)
        return Totals(nbytes, busy_s, first_begin if last_end else sys.float_info.max, last_end)

    def _failure(self) -> Failure | None:
        values = (ctypes.c_int64 * 5)()
        self._functions.packcast_pool_failure(self._handle, values)
        kind, *where = values
        return Failure(FailureKind(kind), *where) if kind else None


class NativeCopies:
    """Copies of a pool's units to a device, begun in order by `copy`, in one thread.

    Unit u lies in place u modulo the number of `events`, handles of the device, which are recorded
    after each copy out of a place. The caller keeps stream and events.
    """

    def __init__(
        self,
        pool: NativePool,
        schedule: Schedule,
        driver: CopyDriver,
        stream: int,
        events: Sequence[int],
    ) -> None:
        self._pool = pool
        self._events = array("Q", events)
        self._copies = array("q")
        for unit in schedule.units:
            self._copies.extend((unit.memory_offset, unit.nbytes, unit.slot_offset))
        self._state = _Copies(
            copy=driver.copy,
            record=driver.record,
            query=driver.query,
            stream=stream,
            events=_address(self._events),
            copies=_address(self._copies),
            num_places=len(events),
        )

    @property
    def num_begun(self) -> int:
        """How many units have been given to the stream; they are done."""
        return int(self._state.num_begun)

    @property
    def num_free(self) -> int:
        """How many units have, or have had, a place."""
        return int(self._state.num_over + self._state.num_places)

    def record_before_next(self, event: int) -> None:
        """Record the event right before the next copy."""
        self._state.begin = event

    def copy(self, end: int, until: int, slot: int, timeout_s: float, *, num_ready: int) -> bool:
        """Begin the copies of the units below `end` into the slot at that address, each as soon as
        it is done, and wait until unit `until` is.

        False: call again, after `timeout_s`, or with more than `num_ready` units whose files are
        open. Raises PoolStopped, and DeviceFailed.
        """
        self._state.num_ready = num_ready
        return self._pool.copy(self._state, end, until, slot, timeout_s)


def _end(
    functions: ctypes.CDLL,
    handle: ctypes.c_void_p,
    work: Work,
    pool: weakref.ref[NativePool],
    pid: int,
) -> None:
    """When the pool is dropped; or at the interpreter's end, where another thread may be in a call
    of it: then the process takes its memory along."""
    if os.getpid() != pid:
        return  # a fork has none of the threads, but maybe a mutex that one of them held
    functions.packcast_pool_stop(handle)
    if functions.packcast_pool_join(handle, int(_END_LIMIT_S * 1e9)):
        # One is stuck: nothing of the work may ever be freed, not even by the interpreter's end.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(work))
    elif pool() is None:
        functions.packcast_pool_free(handle)
