"""Finds tensors whose elements share memory, which cannot be received into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from packcast.errors import UsageError
from packcast.packed.tensor_bytes import span_of


class _Target(NamedTuple):
    """A tensor to receive into; the first three fields are its memory."""

    device: int
    begin: int
    end: int
    name: str
    tensor: torch.Tensor


def check_apart(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise UsageError naming a tensor whose elements share memory with each other or with another
    tensor's. Tied tensors, which share all of it, count as one.
    """
    targets: dict[object, _Target] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        begin = tensor.data_ptr()
        target = _Target(
            tensor.get_device(), begin, begin + span_of(tensor) * tensor.itemsize, name, tensor
        )
        if tensor.is_contiguous():
            targets.setdefault(target[:3], target)
        elif _folds(tensor):
            raise UsageError(
                f"tensor {name} cannot be received into: elements of it share memory",
                hint="it is expanded, or overlaps itself: give a tensor with memory for each one",
            )
        else:
            targets.setdefault((*target[:2], tensor.shape, tensor.stride(), tensor.dtype), target)
    for near in _near_each_other(sorted(targets.values(), key=lambda target: target[:3])):
        late = _first_that_shares(near)
        if late is not None:
            other = next(one for one in near if _first_that_shares([one, late]) is not None)
            raise UsageError(
                f"tensor {late.name} cannot be received into: part of it shares the memory"
                f" of {other.name}",
                hint="give tensors that lie apart, or are one and the same",
            )


def _near_each_other(targets: Sequence[_Target]) -> Iterator[list[_Target]]:
    """Groups of two or more whose memory ranges overlap."""
    near: list[_Target] = []
    end = (-1, 0)
    for target in targets:
        if target[:2] >= end:
            if len(near) > 1:
                yield near
            near = []
        near.append(target)
        end = max(end, (target.device, target.end))
    if len(near) > 1:
        yield near


def _folds(tensor: torch.Tensor) -> bool:
    """Whether two of its elements have the same address."""
    reach = 0
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride <= reach:
            break
        reach += stride * (length - 1)
    else:
        return False
    # Interleaved dimensions may be fine: count the distinct addresses.
    taken = torch.zeros(span_of(tensor), dtype=torch.bool)
    taken.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(taken.count_nonzero()) < tensor.numel()


def _first_that_shares(targets: Sequence[_Target]) -> _Target | None:
    """The first that has a byte of an earlier one, if any: columns of one matrix have none."""
    low = min(target.begin for target in targets)
    high = max(target.end for target in targets)
    sizes = [(target.begin - low, target.tensor.itemsize) for target in targets]
    unit = math.gcd(*(number for pair in sizes for number in pair))
    taken = torch.zeros((high - low) // unit, dtype=torch.bool)
    for target in targets:
        size = target.tensor.itemsize // unit
        places = taken.as_strided(
            (*target.tensor.shape, size),
            (*(stride * size for stride in target.tensor.stride()), 1),
            (target.begin - low) // unit,
        )
        if places.any():
            return target
        places.fill_(True)
    return None
