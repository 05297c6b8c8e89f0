"""How much memory is free on GPUs, by NVML: CUDA would make a context on each for the answer."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
_PREFIXES = ("GPU-", "MIG-", "")  # torch leaves them out of a UUID, NVML wants them


class _Memory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def free_nbytes(uuids: Sequence[str]) -> tuple[int | None, ...]:
    """What this process could still be given of each GPU, in the order of `uuids`.

    None where nobody knows, as without NVIDIA's driver.
    """
    with _nvml() as nvml:
        if nvml is None:
            return (None,) * len(uuids)
        found = [_free(nvml, uuid) for uuid in uuids]
    return tuple(
        None if free is None else free + _kept_by_torch(index) for index, free in enumerate(found)
    )


@contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    try:
        nvml = ctypes.CDLL(_LIBRARY)
        failed = nvml.nvmlInit_v2()
    except (OSError, AttributeError):
        failed = True
    if failed:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _free(nvml: ctypes.CDLL, uuid: str) -> int | None:
    device, memory = ctypes.c_void_p(), _Memory()
    for prefix in _PREFIXES:
        name = (prefix + uuid).encode()
        if nvml.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(name), ctypes.byref(device)) == 0:
            failed = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
            return None if failed else int(memory.free)
    return None


def _kept_by_torch(index: int) -> int:
    """What this process's torch has of it, and would give to the next who asks."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index))
