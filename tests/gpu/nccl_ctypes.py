"""A communicator as inference engines have it: NCCL itself, called by ctypes, no torch in between.

It enqueues on the current stream and does nothing else: no ordering with other streams, no keeping
of tensors, no waiting. What relies on torch.distributed for one of these breaks here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.distributed as dist

_NBYTES_OF_ID = 128
_UINT8 = 1  # ncclUint8


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _NBYTES_OF_ID),)


class NcclCommunicator:
    """Made by all ranks of `rendezvous`, a gloo group, at the same time, on their current GPUs."""

    def __init__(self, rendezvous: dist.ProcessGroup) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.rank, self.world_size = dist.get_rank(rendezvous), dist.get_world_size(rendezvous)
        self._library = _library()
        unique_id = _UniqueId()
        if self.rank == 0:
            self._call("ncclGetUniqueId", ctypes.byref(unique_id))
        told = torch.frombuffer(bytearray(unique_id), dtype=torch.uint8)
        dist.broadcast(told, dist.get_global_rank(rendezvous, 0), group=rendezvous)
        ctypes.memmove(ctypes.byref(unique_id), told.data_ptr(), _NBYTES_OF_ID)
        self._communicator = ctypes.c_void_p()
        torch.cuda.synchronize()  # there has to be a CUDA context
        self._call(
            "ncclCommInitRank",
            ctypes.byref(self._communicator),
            ctypes.c_int(self.world_size),
            unique_id,
            ctypes.c_int(self.rank),
        )

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """In place, on the current stream; the host does not wait."""
        assert tensor.device == self.device
        assert tensor.is_contiguous()
        memory = ctypes.c_void_p(tensor.data_ptr())
        self._call(
            "ncclBroadcast",
            memory,
            memory,
            ctypes.c_size_t(tensor.numel() * tensor.element_size()),
            ctypes.c_int(_UINT8),
            ctypes.c_int(src),
            self._communicator,
            ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream),
        )

    def destroy(self) -> None:
        """On all ranks, once all is over."""
        torch.cuda.synchronize()
        self._call("ncclCommDestroy", self._communicator)

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            raise RuntimeError(f"{function}: {self._library.ncclGetErrorString(code).decode()}")


def _library() -> ctypes.CDLL:
    """The very library that torch has loaded, or would load."""
    beside_torch = Path(torch.__file__).parent.parent / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    try:
        library = ctypes.CDLL("libnccl.so.2")  # one that is loaded already is found by this name
    except OSError:
        library = ctypes.CDLL(str(beside_torch))
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library
