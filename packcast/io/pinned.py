"""Pinned host memory of an exact size: torch's own allocator rounds up to a power of two, for good.

Knows mappings and their registration with CUDA only.
"""

from __future__ import annotations

import errno
import mmap
import threading
from contextlib import suppress

import torch

from packcast.errors import TransferError
from packcast.packed.plan import PAGE, align_up
from packcast.units import format_size

_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h, since Linux 5.14

# By address: memory that a copy of a broken transfer, or a stuck I/O thread, may still be using. It
# stays mapped, or they would write into whatever comes to lie at the same address.
_abandoned: dict[int, torch.Tensor] = {}


class PinnedMemory:
    """`nbytes`, rounded up to a page, that GPUs copy to and from without the host.

    The mapping goes with the last tensor of it; `close` takes back the pinning. Raises
    TransferError where the host has no room.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = align_up(nbytes, PAGE)
        self._closing = threading.Lock()
        try:
            mapping = mmap.mmap(-1, self.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
            _populate(mapping)
            self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
            _register(self.tensor)
        except (OSError, RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
            raise TransferError(
                f"this host cannot pin {format_size(self.nbytes)} of memory",
                hint="reduce --staging on the sender; `packcast doctor` shows what limits memory",
            ) from error
        self._is_pinned = True
        self.address = self.tensor.data_ptr()

    def close(self, *, is_idle: bool) -> None:
        """Unpin the memory if `is_idle`: no copy or I/O thread uses it or can begin to.

        Any thread, any number of times: a broken transfer is closed again once its collective has
        been aborted, by another thread than the one that was stuck in it.
        """
        with self._closing:
            was_pinned = self._is_pinned
            self._is_pinned = was_pinned and not is_idle
            if self._is_pinned:
                _abandoned[self.address] = self.tensor
        if was_pinned and is_idle:
            torch.cuda.cudart().cudaHostUnregister(self.address)
            _abandoned.pop(self.address, None)


def _populate(mapping: mmap.mmap) -> None:
    """Touch every page now: without room this raises here; later the kernel kills the process."""
    try:
        mapping.madvise(_MADV_POPULATE_WRITE)
        return
    except OSError as error:
        if error.errno != errno.EINVAL:  # older kernels
            raise
    for at in range(0, len(mapping), PAGE):
        mapping[at] = 0


def _register(tensor: torch.Tensor) -> None:
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
    if int(code) != 0:
        # CUDA reports the error at this thread's next kernel launch: take it now.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
        raise RuntimeError(f"cudaHostRegister failed with code {int(code)}")
