"""Memory of this rank that helper processes can map: a memfd, populated, pinned beside a GPU.

Knows mappings and CUDA's registration of them; not what the memory is used for.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress

import torch

from packcast.errors import TransferError
from packcast.packed.plan import PAGE, align_up
from packcast.units import format_size

_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h, since Linux 5.14

# By address: pinned memory that a copy of a broken transfer may still be using. It stays mapped
# until it is unpinned, or the GPU would write into whatever comes to lie at the same address.
_abandoned: dict[int, torch.Tensor] = {}


class Arena:
    """`nbytes` of shared memory, as a tensor and by a descriptor for other processes.

    The mapping goes with the last tensor or view of it, whoever holds that; `close` only takes
    back the pinning and the descriptor. Raises TransferError where the host has no room.
    """

    def __init__(self, nbytes: int, *, is_pinned: bool) -> None:
        self.nbytes = align_up(nbytes, PAGE)
        self.pinned_nbytes = self.nbytes if is_pinned else 0
        self._is_pinned = False
        self._closing = threading.Lock()
        self.fd = os.memfd_create("packcast", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.nbytes)
            mapping = mmap.mmap(self.fd, self.nbytes)
            _populate(mapping)
            self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
            if is_pinned:
                _register(self.tensor)
                self._is_pinned = True
        except (OSError, RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
            os.close(self.fd)
            verb = "pin" if is_pinned else "share"
            raise TransferError(
                f"this host cannot {verb} {format_size(self.nbytes)} of memory",
                hint="choose less with --staging on the sender",
            ) from error
        self.address = self.tensor.data_ptr()
        self.view = memoryview(mapping)

    def close(self, *, is_idle: bool) -> None:
        """Unpin it; only where `is_idle`: no copy to or from it is under way or may still begin.

        Any thread, any number of times: a broken transfer is closed again once its collective has
        been aborted, by another thread than the one that was stuck in it.
        """
        with self._closing:
            was_pinned, fd = self._is_pinned, self.fd
            self._is_pinned = was_pinned and not is_idle
            self.fd = -1
            if self._is_pinned:
                _abandoned[self.address] = self.tensor
        if fd >= 0:
            os.close(fd)
        if was_pinned and is_idle:
            torch.cuda.cudart().cudaHostUnregister(self.address)
            _abandoned.pop(self.address, None)


def _populate(mapping: mmap.mmap) -> None:
    """Have every page there now: a host without room says so here, instead of killing us later."""
    try:
        mapping.madvise(_MADV_POPULATE_WRITE)
        return
    except OSError as error:
        if error.errno != errno.EINVAL:  # which an older kernel says
            raise
    for at in range(0, len(mapping), PAGE):
        mapping[at] = 0


def _register(tensor: torch.Tensor) -> None:
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
    if int(code) != 0:
        # CUDA keeps it for whoever launches a kernel next in this thread: that is to be this one.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
        raise RuntimeError(f"cudaHostRegister failed with code {int(code)}")
