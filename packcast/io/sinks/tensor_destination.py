"""Where tensors are received: new ones that are delivered, or the caller's own.

Knows headers' dtypes and torch's; not how the bytes come.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch

from packcast.checkpoint.outgoing import FileSpec
from packcast.checkpoint.tensor_table import Tensor
from packcast.errors import UsageError
from packcast.packed.overlap import check_apart
from packcast.packed.tensor_bytes import alias_of, as_bytes, check_plain, mark_changed

# By name: a version of torch may not have them all. None of it stands for a 4- or 6-bit dtype
# with a header's shape: torch's float4 has two numbers in an element.
_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_DTYPES = {
    name: getattr(torch, known) for name, known in _DTYPE_NAMES.items() if hasattr(torch, known)
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(tensor: Tensor, where: str) -> torch.dtype:
    """The tensor's dtype; UsageError naming it where this torch has none."""
    dtype = _DTYPES.get(tensor.dtype)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(
            f"tensor {tensor.name} in {where} is {tensor.dtype}, which torch {torch.__version__}"
            " has no dtype for",
            hint="leave it out on the sender (exclude), or receive files (out)",
        )
    return dtype


class TensorDestination(Protocol):
    """Where whole tensors go. `complete` and `stop` may be called from any thread."""

    @property
    def peak_nbytes(self) -> int:
        """Peak memory allocated here for incomplete tensors; without the caller's own tensors and
        complete ones that were delivered."""

    def check(self, files: Sequence[FileSpec]) -> list[tuple[int, int]]:
        """Before READY: raise UsageError if the offered tensors do not fit.

        The tensors that it leaves out because of the index, by file and position in its header.
        """

    def wants(self, tensor: Tensor) -> bool:
        """Whether it is received at all; it is dropped where not."""

    def own_memory_of(self, tensor: Tensor) -> torch.Tensor | None:
        """Where to receive a wanted one, if it has memory already: contiguous, on the ring's
        device. Writes enqueued on the current stream after this call are safe.
        """

    def make(self, tensors: Sequence[Tensor]) -> list[torch.Tensor]:
        """New memory for wanted ones that have none: as `own_memory_of`, in any state.

        The caller keeps it until the current stream has done with it.
        """

    def complete(self, tensor: Tensor, memory: torch.Tensor) -> None:
        """The tensor is complete and verified; the device is done with it."""

    def finish(self) -> None:
        """After the last `complete`: block until all tensors are delivered."""

    def stop(self) -> None:
        """The transfer is over: wake the threads that block here. Any thread, any time."""


class _Tally:
    """Current and peak number of bytes; for any thread."""

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._now += nbytes
            self.peak = max(self.peak, self._now)


class Taker(Protocol):
    """Receives new tensors."""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Take it; may block, which holds up the transfer."""

    def finish(self) -> None:
        """Block until all are taken."""

    def stop(self) -> None:
        """Block no longer."""


class NewTensors:
    """Allocates a tensor for each one offered and delivers it when it is complete.

    On a GPU its memory belongs to `stream`, the taker's: allocated and freed in its order.
    """

    def __init__(
        self, device: torch.device, taker: Taker, stream: torch.cuda.Stream | None = None
    ) -> None:
        self._device = device
        self._taker = taker
        self._stream = stream
        self._held = _Tally()

    @property
    def peak_nbytes(self) -> int:
        return self._held.peak

    def check(self, files: Sequence[FileSpec]) -> list[tuple[int, int]]:
        for spec in files:
            for _, tensor in spec.tensors:
                torch_dtype(tensor, spec.name)
        return []

    def wants(self, tensor: Tensor) -> bool:
        return True

    def own_memory_of(self, tensor: Tensor) -> None:
        return None

    def make(self, tensors: Sequence[Tensor]) -> list[torch.Tensor]:
        on_stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with on_stream:
            made = [
                torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype], device=self._device)
                for tensor in tensors
            ]
        if self._stream is not None:
            # An earlier user of this memory may still be running on that stream.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._held.add(sum(memory.nbytes for memory in made))
        return made

    def complete(self, tensor: Tensor, memory: torch.Tensor) -> None:
        self._held.add(-memory.nbytes)
        self._taker.put(tensor.name, memory)

    def finish(self) -> None:
        self._taker.finish()

    def stop(self) -> None:
        self._taker.stop()


class GivenTensors:
    """Receives into the caller's own tensors, by name; `strict`: all of both sides' names.

    Where there is an index the sender's names are those in it. Without `strict` a tensor that it
    does not name is received too, if it names no other of that name.

    One that is not contiguous is received beside it and copied. On a GPU the tensors may be in use
    on `stream`, the caller's, until this is made.
    """

    def __init__(
        self,
        device: torch.device,
        tensors: Mapping[str, torch.Tensor],
        *,
        strict: bool,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._device = device
        self._tensors = tensors
        self._strict = strict
        self._stream = stream
        self._beside = _Tally()

    @property
    def peak_nbytes(self) -> int:
        return self._beside.peak

    def check(self, files: Sequence[FileSpec]) -> list[tuple[int, int]]:
        listed = {t.name for spec in files for i, t in spec.tensors if i not in spec.unlisted}
        offered, left_out = [], {}
        for file, spec in enumerate(files):
            for i, tensor in spec.tensors:
                if i in spec.unlisted and (self._strict or tensor.name in listed):
                    left_out[file, i] = tensor.name
                elif self._strict or tensor.name in self._tensors:
                    offered.append((spec.name, tensor))
        for where, tensor in offered:
            self._check_tensor(where, tensor)
        names = Counter(tensor.name for _, tensor in offered)
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise UsageError(f"tensor {twice} is in two shards, and into has one of that name")
        check_apart({name: self._tensors[name] for name in names})
        if self._strict:
            self._check_none_is_left(names, set(left_out.values()))
        return list(left_out)

    def wants(self, tensor: Tensor) -> bool:
        return tensor.name in self._tensors

    def own_memory_of(self, tensor: Tensor) -> torch.Tensor | None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._stream = None  # once: the caller enqueues nothing until the end
        target = self._tensors[tensor.name]
        mark_changed([target])
        return alias_of(target) if target.is_contiguous() else None

    def make(self, tensors: Sequence[Tensor]) -> list[torch.Tensor]:
        mark_changed([self._tensors[tensor.name] for tensor in tensors])
        made = [
            torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype], device=self._device)
            for tensor in tensors
        ]
        self._beside.add(sum(memory.nbytes for memory in made))
        return made

    def complete(self, tensor: Tensor, memory: torch.Tensor) -> None:
        target = self._tensors[tensor.name]
        if not target.is_contiguous():
            # As whole numbers: copies of floats on a GPU may quiet a NaN.
            bits = _BITS[target.itemsize]
            alias_of(target).view(bits).copy_(memory.view(bits))
            if self._device.type == "cuda":  # or the memory could be another's while it is read
                torch.cuda.current_stream(self._device).synchronize()
            self._beside.add(-memory.nbytes)

    def finish(self) -> None:
        """Nothing is on its way."""

    def stop(self) -> None:
        """No thread blocks here."""

    def _check_tensor(self, where: str, tensor: Tensor) -> None:
        dtype = torch_dtype(tensor, where)
        target = self._tensors.get(tensor.name)
        if target is None:
            raise UsageError(
                f"tensor {tensor.name} of {where} is not in into",
                hint="strict=False takes only the tensors that are in both",
            )
        check_plain(tensor.name, target)
        if (tuple(target.shape), target.dtype) != (tensor.shape, dtype):
            raise UsageError(
                f"tensor {tensor.name} is {target.dtype} {tuple(target.shape)} in into, but"
                f" {dtype} {tensor.shape} in {where}"
            )
        if target.device != self._device:
            raise UsageError(
                f"tensor {tensor.name} is on {target.device}, but this rank receives on"
                f" {self._device}",
                hint="say device= for the tensors' own, or move them",
            )

    def _check_none_is_left(self, names: Mapping[str, int], unlisted: set[str]) -> None:
        received = [self._tensors[name] for name in names]
        memories = {(one.data_ptr(), one.nbytes) for one in received if one.numel()}
        for name, tensor in self._tensors.items():
            check_plain(name, tensor)
            # A tied tensor is filled under its other name.
            if name not in names and (tensor.data_ptr(), tensor.nbytes) not in memories:
                if name in unlisted:
                    raise UsageError(
                        f"tensor {name} of into is in the checkpoint, but not in its index",
                        hint="strict=False takes it all the same",
                    )
                raise UsageError(
                    f"tensor {name} of into is not in the checkpoint",
                    hint="strict=False leaves it as it is",
                )


def bytes_of(memory: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as a flat uint8 tensor."""
    return as_bytes("", memory, memory.device)
