"""Tensors as bytes and back, whatever their shape, stride, alignment or device.

Knows names only to name them in errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from packcast.errors import UsageError

_SIMPLE_TYPES = (torch.Tensor, torch.nn.Parameter)


def as_bytes(name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor's elements in row-major order, as a one-dimensional uint8 tensor on `device`.

    A view where the tensor is contiguous and there already, else a copy made on the caller's
    current stream. Raises UsageError naming the tensor where it has no plain bytes of its own.
    """
    if is_simple(tensor, device):
        return tensor.detach().view(-1).view(torch.uint8)
    check_plain(name, tensor)
    tensor = tensor.detach()
    if tensor.is_cuda and not (tensor.device == device and tensor.is_contiguous()):
        # The copy below is in flight when the tensor, made on another stream, may be dropped.
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    if tensor.device != device:
        tensor = tensor.to(device)
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device=device)
    # Not `view(-1)`: a dimension of size 1 may have any stride, and 0-dim tensors have none.
    dense = tensor.contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def is_simple(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether its bytes are those from `data_ptr` on: true of most tensors, and quickly told.

    One element is not simple: its strides may be anything.
    """
    return (
        type(tensor) in _SIMPLE_TYPES
        and tensor.device == device
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized)
        and tensor.is_contiguous()
        and tensor.numel() > 1
        and not (tensor.is_conj() or tensor.is_neg())
    )


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Raise UsageError unless the tensor's value is its bytes in memory."""
    hint = None
    if not isinstance(tensor, torch.Tensor):
        what = f"is a {type(tensor).__name__}, not a tensor"
    elif hasattr(tensor, "full_tensor"):
        what, hint = "is a DTensor", "call its full_tensor() on every rank of its mesh first"
    elif tensor.is_meta:
        what = "is on the meta device and has no bytes"
    elif tensor.is_nested:
        what, hint = "is nested", "send what unbind() gives, one by one"
    elif tensor.layout != torch.strided:
        what, hint = f"has layout {tensor.layout}", "call to_dense() first"
    elif tensor.is_conj() or tensor.is_neg():
        what, hint = "is a lazy conjugate or negative", "call resolve_conj().resolve_neg() first"
    elif tensor.is_quantized:
        what, hint = "is quantized with a scale beside its bytes", "send int_repr() and the scale"
    else:
        return
    raise UsageError(f"tensor {name} {what}", hint=hint)


def nbytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor of this shape and dtype; 0-dim is one element."""
    return math.prod(shape) * dtype.itemsize


def from_bytes(data: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that has these bytes: a view where they are aligned, else a copy of them."""
    if not data.numel():
        return torch.empty(tuple(shape), dtype=dtype, device=data.device)
    if data.storage_offset() % dtype.itemsize:  # allocations themselves are aligned for all
        data = data.clone()
    return data.view(dtype).view(shape)
