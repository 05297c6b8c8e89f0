"""The algorithm that packed broadcasts were first made with, written from its description.

Round-robin streams; pack until the buffer is exceeded; concatenate; broadcast. With its faults,
which tests show; the bench compares with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class BroadcastGroup(Protocol):
    """A communicator, as engines have it."""

    def broadcast(self, tensor: torch.Tensor, src: int) -> object:
        """In place, on the current stream."""


def original_producer(
    iterator: Iterator[tuple[str, torch.Tensor]],
    group: BroadcastGroup,
    src: int,
    post_iter_func: Callable[[tuple[str, torch.Tensor]], torch.Tensor],
    buffer_size_bytes: int,
    num_buffers: int,
    device: torch.device,
) -> None:
    """The sending end: a buffer is closed after the tensor that exceeds the limit."""
    streams = _streams(num_buffers, device)
    packed: list[torch.Tensor | None] = [None] * num_buffers
    turn, exhausted = 0, False
    while not exhausted:
        _synchronize(streams[turn])
        with _on(streams[turn]):
            parts: list[torch.Tensor] = []
            nbytes = 0
            while nbytes <= buffer_size_bytes:
                item = next(iterator, None)
                if item is None:
                    exhausted = True
                    break
                part = post_iter_func(item).contiguous().view(torch.uint8).view(-1)
                parts.append(part)
                nbytes += part.numel()
            if parts:
                whole = packed[turn] = torch.cat(parts)
                group.broadcast(whole, src=src)
        turn = (turn + 1) % num_buffers


def original_consumer(
    iterator: Iterator[tuple[str, tuple[Sequence[int], torch.dtype]]],
    group: BroadcastGroup,
    src: int,
    post_unpack_func: Callable[[list[tuple[str, torch.Tensor]]], object],
    buffer_size_bytes: int,
    num_buffers: int,
    device: torch.device,
) -> None:
    """The receiving end: views of the packed buffer go to the callback."""
    streams = _streams(num_buffers, device)
    turn, exhausted = 0, False
    while not exhausted:
        _synchronize(streams[turn])
        with _on(streams[turn]):
            entries: list[tuple[str, Sequence[int], torch.dtype, int]] = []
            nbytes = 0
            while nbytes <= buffer_size_bytes:
                item = next(iterator, None)
                if item is None:
                    exhausted = True
                    break
                name, (shape, dtype) = item
                size = dtype.itemsize
                for length in shape:
                    size *= length
                entries.append((name, shape, dtype, size))
                nbytes += size
            if entries:
                packed = torch.empty(nbytes, dtype=torch.uint8, device=device)
                group.broadcast(packed, src=src)
                parts = packed.split([size for *_, size in entries])
                post_unpack_func(
                    [
                        (name, part.contiguous().view(dtype).view(*shape))
                        for (name, shape, dtype, _), part in zip(entries, parts, strict=True)
                    ]
                )
        turn = (turn + 1) % num_buffers


def _streams(count: int, device: torch.device) -> list[torch.cuda.Stream | None]:
    on_gpu = device.type == "cuda"
    return [torch.cuda.Stream(device) if on_gpu else None for _ in range(count)]


def _synchronize(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        stream.synchronize()


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()
