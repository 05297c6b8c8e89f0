"""The buffers of the wire that engines use: which tensors come together, by both ends' count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from packcast.errors import UsageError
from packcast.packed.tensor_bytes import as_bytes, is_simple, nbytes_of

T = TypeVar("T")
PostIter = Callable[[tuple[str, torch.Tensor]], torch.Tensor]


class ExpectedTensor(NamedTuple):
    """What a receiver knows of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Pack:
    """A buffer of the wire, made while the iterator is read."""

    index: int
    root: int
    nbytes: int
    entries: tuple[ExpectedTensor, ...] = ()  # on the consumer
    parts: tuple[torch.Tensor, ...] = ()  # on the producer, contiguous on the device
    own: None = None

    @property
    def wire_nbytes(self) -> int:
        return self.nbytes


def packs_to_send(
    pairs: Iterator[tuple[str, torch.Tensor]],
    post_iter_func: PostIter,
    limit: int,
    root: int,
    device: torch.device,
    *,
    strict: bool,
) -> Iterator[Pack]:
    def parts() -> Iterator[tuple[int, torch.Tensor]]:
        for name, given in pairs:
            tensor = post_iter_func((name, given))
            # Detached: it keeps this memory even if the caller's object gets other memory.
            part = tensor.detach() if is_simple(tensor, device) else as_bytes(name, tensor, device)
            if strict and (tensor.shape, tensor.dtype) != (given.shape, given.dtype):
                raise UsageError(
                    f"post_iter_func made {name}, {given.dtype} {tuple(given.shape)}, into"
                    f" {tensor.dtype} {tuple(tensor.shape)}",
                    hint="with strict, receivers expect what the iterator yields",
                )
            yield part.nbytes, part

    for index, (nbytes, items) in enumerate(_closed_after_exceeding(parts(), limit)):
        yield Pack(index, root, nbytes, parts=tuple(items))


def packs_to_receive(
    pairs: Iterator[tuple[str, tuple[Sequence[int], torch.dtype]]], limit: int, root: int
) -> Iterator[Pack]:
    def entries() -> Iterator[tuple[int, ExpectedTensor]]:
        for name, (shape, dtype) in pairs:
            yield nbytes_of(shape, dtype), ExpectedTensor(name, tuple(shape), dtype)

    for index, (nbytes, items) in enumerate(_closed_after_exceeding(entries(), limit)):
        yield Pack(index, root, nbytes, entries=tuple(items))


def _closed_after_exceeding(
    items: Iterator[tuple[int, T]], limit: int
) -> Iterator[tuple[int, list[T]]]:
    """The wire's rule: a buffer ends with the item that takes it over the limit.

    Takes and yields pairs with the size in bytes.
    """
    pack: list[T] = []
    used = 0
    for nbytes, item in items:
        pack.append(item)
        used += nbytes
        if used > limit:
            yield used, pack
            pack, used = [], 0
    if pack:
        yield used, pack
