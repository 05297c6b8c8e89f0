"""An independent model of the compatible wire, written from its description, and both its ends.

The truth is bytes: tensors are made from them, so what the model expects never went through torch.
Nothing here may use the library's own helpers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

POISON = 0xA5  # what a buffer holds before it is received

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.int16, torch.uint16, torch.float16, torch.bfloat16),
    *(torch.int32, torch.uint32, torch.float32),
    *(torch.int64, torch.uint64, torch.float64, torch.complex64),
    torch.complex128,
    # Younger ones, where this torch has them.
    *(
        getattr(torch, name)
        for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")
        if hasattr(torch, name)
    ),
)
LAYOUTS = ("plain", "stepped", "transposed", "offset", "odd stride")


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of a mix: what it is, what it is made of, and how it lies in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    payload: bytes
    layout: str = "plain"

    def tensor(self) -> torch.Tensor:
        """A tensor that has these bytes in row-major order."""
        if not self.payload:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(bytearray(self.payload), dtype=torch.uint8).view(self.dtype)
        return _laid_out(flat.reshape(self.shape), self.layout)

    @property
    def described(self) -> tuple[str, tuple[Sequence[int], torch.dtype]]:
        """What the consumer's iterator yields for it."""
        return self.name, (self.shape, self.dtype)


def _laid_out(dense: torch.Tensor, layout: str) -> torch.Tensor:
    shape = dense.shape
    if layout == "stepped":
        return torch.empty((*shape, 2), dtype=dense.dtype)[..., 1].copy_(dense)
    if layout == "transposed":
        backwards = tuple(range(len(shape)))[::-1]
        return torch.empty(shape[::-1], dtype=dense.dtype).permute(backwards).copy_(dense)
    if layout == "offset":
        return torch.empty(dense.numel() + 3, dtype=dense.dtype)[3:].view(shape).copy_(dense)
    if layout == "odd stride":
        pairs = zip(shape, dense.stride(), strict=True)
        strides = [7 if size == 1 else stride for size, stride in pairs]
        return dense.as_strided(shape, strides)
    return dense


def model_of(items: Iterable[Item], limit: int) -> list[list[Item]]:
    """Which tensors ride in which buffer: closed after the one that takes it over the limit."""
    buffers: list[list[Item]] = []
    is_open = False
    for item in items:
        if not is_open:
            buffers.append([])
        buffers[-1].append(item)
        is_open = sum(len(each.payload) for each in buffers[-1]) <= limit
    return buffers


def wire_of(items: Iterable[Item], limit: int) -> list[bytes]:
    """What goes over the wire, broadcast by broadcast."""
    return [b"".join(item.payload for item in buffer) for buffer in model_of(items, limit)]


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements of a received tensor in row-major order, as bytes."""
    if not tensor.numel():
        return b""
    return bytes(tensor.cpu().flatten().view(torch.uint8).tolist())


def assert_same(items: Sequence[Item], received: Sequence[tuple[str, torch.Tensor]]) -> None:
    """The names, shapes, dtypes and bytes are those of the items."""
    assert [name for name, _ in received] == [item.name for item in items]
    for item, (name, tensor) in zip(items, received, strict=True):
        assert tuple(tensor.shape) == item.shape, name
        assert tensor.dtype == item.dtype, name
        assert tensor.is_contiguous(), name
        assert bytes_of(tensor) == item.payload, name


class Recorder:
    """A group that keeps a copy of what is broadcast."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.wire: list[bytes] = []
        self.roots: list[int] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert tensor.dtype == torch.uint8
        assert tensor.dim() == 1
        assert tensor.is_contiguous()
        self.wire.append(bytes_of(tensor))
        self.roots.append(src)


class Player:
    """A group that fills in what a producer would have sent; a wrong size is an error."""

    device = torch.device("cpu")

    def __init__(self, wire: Iterable[bytes]) -> None:
        self.left = list(wire)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert tensor.dtype == torch.uint8
        sent = self.left.pop(0)
        assert tensor.shape == (len(sent),)
        if sent:
            tensor.copy_(torch.frombuffer(bytearray(sent), dtype=torch.uint8))


@st.composite
def items_and_limits(draw: st.DrawFn) -> tuple[list[Item], int]:
    """A mix and a buffer size, often one that is met exactly, or missed by one byte."""
    items = [draw(_items(f"t{i}")) for i in range(draw(st.integers(0, 12)))]
    begin = draw(st.integers(0, len(items)))
    run = items[begin : draw(st.integers(begin, len(items)))]
    nbytes = sum(len(item.payload) for item in run)
    near = st.sampled_from([nbytes - 1, nbytes, nbytes + 1]).map(lambda limit: max(0, limit))
    return items, draw(st.one_of(near, st.integers(0, 300), st.just(1 << 30)))


@st.composite
def _items(draw: st.DrawFn, name: str) -> Item:
    dtype = draw(st.sampled_from(DTYPES))
    sizes = st.one_of(st.just(1), st.integers(0, 7))
    shape = tuple(draw(st.lists(sizes, max_size=3)))
    nbytes = math.prod(shape) * dtype.itemsize
    payload = draw(st.randoms(use_true_random=False)).randbytes(nbytes)
    if dtype == torch.bool:
        payload = bytes(byte & 1 for byte in payload)
    return Item(name, dtype, shape, payload, draw(st.sampled_from(LAYOUTS)))
