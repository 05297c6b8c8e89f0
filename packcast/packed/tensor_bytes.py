"""Tensors as bytes and back, whatever their shape, strides, alignment or device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from packcast.errors import UsageError

_SIMPLE_TYPES = (torch.Tensor, torch.nn.Parameter)


def as_bytes(name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor's elements in row-major order, as a one-dimensional uint8 tensor on `device`.

    A view if the tensor is contiguous and there already, else a copy made on the caller's current
    stream. Raises UsageError naming a tensor that has no plain bytes of its own.
    """
    if is_simple(tensor, device):
        return tensor.detach().view(-1).view(torch.uint8)
    check_plain(name, tensor)
    tensor = tensor.detach()
    if tensor.is_cuda and not (tensor.device == device and tensor.is_contiguous()):
        # It may be from another stream and be dropped while the copy below still reads it.
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    if tensor.device != device:
        tensor = tensor.to(device)
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device=device)
    # Not `view(-1)`: a dimension of size 1 may have any stride, and 0-dim tensors have none.
    dense = tensor.contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def is_simple(tensor: torch.Tensor, device: torch.device) -> bool:
    """Fast test, true of most tensors: whether its bytes are those from `data_ptr` on.

    False for one element, which may have any strides.
    """
    try:
        return (
            type(tensor) in _SIMPLE_TYPES
            and tensor.device == device
            and tensor.layout is torch.strided
            and not (tensor.is_nested or tensor.is_quantized)
            and tensor.is_contiguous()
            and tensor.numel() > 1
            and not (tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor())
            # A storage may be freed or shortened under a tensor that keeps its shape.
            and tensor.untyped_storage().nbytes()
            >= tensor.nbytes + tensor.storage_offset() * tensor.itemsize
        )
    except NotImplementedError:  # no storage, as inside vmap
        return False


def check_shaped(name: str, tensor: torch.Tensor) -> None:
    """Raise UsageError unless it is a tensor with a shape; it may be without memory."""
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"tensor {name} is a {type(tensor).__name__}, not a tensor")
    if is_lazy(tensor):
        raise UsageError(
            f"tensor {name} is a lazy parameter that has no shape yet",
            hint="run the module once, which gives it one",
        )


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Raise UsageError unless the tensor's value is its bytes in memory, and that is there."""
    check_shaped(name, tensor)
    hint = None
    if hasattr(tensor, "full_tensor"):
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
    elif type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        what = f"is a {type(tensor).__name__}, whose value is not in bytes of its own"
        hint = "send the plain tensors that it wraps, or what it can be converted to"
    elif (missing := _what_is_missing(tensor)) is not None:
        what, hint = missing
    else:
        return
    raise UsageError(f"tensor {name} {what}", hint=hint)


def _what_is_missing(tensor: torch.Tensor) -> tuple[str, str] | None:
    """What of the tensor's memory is missing, and a hint; None if it is complete."""
    try:
        storage = tensor.untyped_storage()
        has_nbytes = storage.nbytes() if storage.data_ptr() or not storage.nbytes() else None
    except (NotImplementedError, RuntimeError):
        has_nbytes = None
    if tensor.numel() and has_nbytes is None:
        return "has no memory of its own", "call clone() on it first"
    needs_nbytes = (tensor.storage_offset() + span_of(tensor)) * tensor.itemsize
    if tensor.numel() and (has_nbytes or 0) < needs_nbytes:
        return (
            f"has lost its memory: its storage has {has_nbytes} bytes, of {needs_nbytes} needed",
            "sharded trainers free weights between steps: gather them first",
        )
    return None


def span_of(tensor: torch.Tensor) -> int:
    """The distance in memory from its first element to its last, plus 1, in elements."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((length - 1) * stride for length, stride in steps)


def mark_changed(tensors: Iterable[torch.Tensor]) -> None:
    """For autograd, count the tensors as changed in place: what it has saved of them is stale."""
    increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def alias_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same memory that may be written in and outside inference mode.

    Made outside inference mode it shares the tensor's version counter, if that has one.
    """
    if not tensor.is_inference():
        return tensor.detach()
    storage, offset = tensor.untyped_storage(), tensor.storage_offset()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, offset, tensor.shape, tensor.stride())


def nbytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor of this shape and dtype."""
    return math.prod(shape) * dtype.itemsize


def from_bytes(data: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that has these bytes: a view if they are aligned, else a copy."""
    if not data.numel():
        return torch.empty(tuple(shape), dtype=dtype, device=data.device)
    if data.storage_offset() % dtype.itemsize:  # allocations themselves are aligned for all
        data = data.clone()
    return data.view(dtype).view(shape)
