"""Free GPU memory, from NVML: asking CUDA would create a context on each GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
_PREFIXES = ("GPU-", "MIG-", "")  # of UUIDs in NVML; torch omits them


class _Memory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def free_nbytes(uuids: Sequence[str]) -> tuple[int | None, ...]:
    """Bytes that this process can still allocate on each GPU, in the order of `uuids`.

    None for a GPU that NVML does not know, and for all without NVIDIA's driver.
    """
    with _nvml() as nvml:
        if nvml is None:
            return (None,) * len(uuids)
        found = [_free(nvml, uuid) for uuid in uuids]
    return tuple(
        None if free is None else free + _cached_by_torch(index) for index, free in enumerate(found)
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


def _cached_by_torch(index: int) -> int:
    """Bytes that torch's allocator in this process holds, and would reuse for new tensors."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index))
