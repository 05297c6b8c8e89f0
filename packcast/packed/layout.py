"""The native layout of tensors in the chunks that replays carry, and the plan that both ends share.

Pure functions over names, shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import BaseModel, Field, ValidationError

from packcast.errors import TransferError
from packcast.packed.plan import align_up
from packcast.packed.tensor_bytes import nbytes_of
from packcast.packed.tensor_map import Rows, ends_of

ALIGNMENT = 256  # fast copies on GPUs, and views of any dtype
# A tensor of a buffer's size or more rides alone and is broadcast in place (or from a stand-in), so
# that slots can be smaller. Collectives gain nothing from larger runs than this.
MAX_ALONE_NBYTES = 1 << 30
# Nothing overlaps with packing the first chunk and unpacking the last one, so both are cut to
# pieces that grow from this size and shrink to it. NVLink takes 0.1 ms for it, about as long as
# launching the next chunk; packing is so much faster than sending that pieces may grow by this.
END_NBYTES = 32 << 20
END_GROWTH = 3
MAX_TENSORS = 10_000_000
MAX_CHUNKS = 10_000_000
MAX_RANK = 64
MAX_NBYTES = 1 << 48


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a receiver knows of a tensor; `same_as` names the one that it shares its memory with."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    same_as: str | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes on the wire; 0 for a tied tensor."""
        return 0 if self.same_as else nbytes_of(self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class Part:
    """A run of one tensor's bytes and its offset in the chunk."""

    tensor: int
    offset: int
    nbytes: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class ReplayChunk:
    """What one collective carries: parts at multiples of ALIGNMENT, one after the other.

    Without a slot it is one part of any size, from a multiple of ALIGNMENT of its tensor on.
    """

    index: int
    root: int
    nbytes: int
    parts: tuple[Part, ...]
    needs_slot: bool = True

    @property
    def wire_nbytes(self) -> int:
        return self.nbytes


def lay_out(specs: Sequence[TensorSpec], buffer_size: int, root: int) -> tuple[ReplayChunk, ...]:
    """Cut the tensors, in order, into chunks; those that need a slot have at most `buffer_size`.

    A tensor of `buffer_size` or more has chunks of its own, of up to MAX_ALONE_NBYTES or
    `buffer_size` if that is more. Smaller ones, and the rest of large ones, share chunks: each
    begins at a multiple of ALIGNMENT, and what does not fit continues in the next chunk. A large
    first or last chunk is cut into smaller ones. `buffer_size` is a multiple of ALIGNMENT.
    """
    chunks = _with_small_ends(_full_chunks(specs, buffer_size, root))
    return tuple(replace(chunk, index=index) for index, chunk in enumerate(chunks))


def _full_chunks(specs: Sequence[TensorSpec], buffer_size: int, root: int) -> Sequence[ReplayChunk]:
    largest_alone = max(MAX_ALONE_NBYTES, buffer_size)
    chunks: list[ReplayChunk] = []
    parts: list[Part] = []
    used = 0
    for tensor, spec in enumerate(specs):
        offset = 0
        while offset < spec.nbytes:
            left = spec.nbytes - offset
            if left >= buffer_size:
                alone = Part(tensor, offset, min(left, largest_alone), 0)
                chunks.append(ReplayChunk(len(chunks), root, alone.nbytes, (alone,), False))
                offset += alone.nbytes
                continue
            begin = align_up(used, ALIGNMENT)
            if begin >= buffer_size:
                chunks.append(ReplayChunk(len(chunks), root, used, tuple(parts)))
                parts, begin = [], 0
            nbytes = min(left, buffer_size - begin)
            parts.append(Part(tensor, offset, nbytes, begin))
            offset += nbytes
            used = begin + nbytes
    if parts:
        chunks.append(ReplayChunk(len(chunks), root, used, tuple(parts)))
    return chunks


def _with_small_ends(chunks: Sequence[ReplayChunk]) -> Sequence[ReplayChunk]:
    """Cut the first chunk into pieces that grow, and the last one into pieces that shrink."""
    if not chunks:
        return chunks
    first, last = chunks[0], chunks[-1]
    if len(chunks) == 1:
        half = first.nbytes // 2
        cuts = _growing(half)
        return _cut(first, [*cuts, *[half][: len(cuts)], *(first.nbytes - at for at in cuts)])
    return [
        *_cut(first, _growing(first.nbytes)),
        *chunks[1:-1],
        *_cut(last, [last.nbytes - at for at in _growing(last.nbytes)]),
    ]


def _growing(nbytes: int) -> list[int]:
    """Where to cut `nbytes` into pieces that grow, while the rest is large."""
    cuts, at, size = [], 0, END_NBYTES
    while nbytes - at > 2 * size:
        at += size
        size *= END_GROWTH
        cuts.append(at)
    return cuts


def _cut(chunk: ReplayChunk, cuts: Sequence[int]) -> list[ReplayChunk]:
    """The chunk cut at the aligned bytes at or before `cuts`; each piece begins its own slot."""
    if not chunk.needs_slot:
        return [chunk]
    inner = sorted({at // ALIGNMENT * ALIGNMENT for at in cuts})
    pieces = []
    for low, high in pairwise([0, *inner, chunk.nbytes]):
        parts = tuple(
            Part(part.tensor, part.offset + begin - part.slot_offset, end - begin, begin - low)
            for part in chunk.parts
            if (begin := max(part.slot_offset, low))
            < (end := min(part.slot_offset + part.nbytes, high))
        )
        nbytes = parts[-1].slot_offset + parts[-1].nbytes
        pieces.append(replace(chunk, nbytes=nbytes, parts=parts))
    return pieces


def slot_nbytes_of(chunks: Sequence[ReplayChunk]) -> int:
    """The size of a slot, a multiple of ALIGNMENT, so that all slots begin at one."""
    return align_up(max((c.nbytes for c in chunks if c.needs_slot), default=0), ALIGNMENT)


def rows_of(chunks: Sequence[ReplayChunk]) -> Rows:
    """The parts of all chunks as rows, for tables of addresses."""
    numbers = [
        (part.tensor, part.offset, part.slot_offset, part.nbytes)
        for chunk in chunks
        for part in chunk.parts
    ]
    columns = torch.tensor(numbers, dtype=torch.int64).view(-1, 4).t().contiguous()
    tensor, offset, slot_offset, nbytes = columns.unbind()
    counts = torch.tensor([len(chunk.parts) for chunk in chunks], dtype=torch.int64)
    return Rows(tensor, offset, slot_offset, nbytes, ends_of(counts))


_Size = Annotated[int, Field(ge=0, le=MAX_NBYTES)]


class _Plan(BaseModel, strict=True, hide_input_in_errors=True):
    """The plan as it travels: name, shape, dtype and `same_as` of each tensor."""

    buffer_size: _Size
    num_buffers: _Size
    tensors: Annotated[
        list[tuple[str, tuple[_Size, ...], str, str | None]], Field(max_length=MAX_TENSORS)
    ]


def describe(specs: Sequence[TensorSpec], buffer_size: int, num_buffers: int) -> bytes:
    """The plan as JSON; equal plans have equal bytes."""
    tensors = [(spec.name, spec.shape, _dtype_name(spec.dtype), spec.same_as) for spec in specs]
    plan = _Plan.model_construct(buffer_size=buffer_size, num_buffers=num_buffers, tensors=tensors)
    return plan.model_dump_json().encode()


def understand(description: bytes) -> tuple[tuple[TensorSpec, ...], int, int]:
    """Specs, buffer size and count from `describe`'s bytes; TransferError if they are no plan."""
    try:
        plan = _Plan.model_validate_json(description)
        specs = tuple(
            TensorSpec(name, shape, dtype_called(dtype), same_as)
            for name, shape, dtype, same_as in plan.tensors
        )
        check_plan(specs, plan.buffer_size, plan.num_buffers)
    except ValueError as error:
        reason = str(error)
        if isinstance(error, ValidationError):  # whose text lists every error
            first = error.errors(include_url=False, include_input=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise TransferError(f"the sender's plan is invalid: {reason:.200}") from error
    return specs, plan.buffer_size, plan.num_buffers


def check_plan(specs: Sequence[TensorSpec], buffer_size: int, num_buffers: int) -> None:
    """Raise ValueError unless the plan is possible: unique names, each tie to an equal earlier
    tensor, sizes within the limits.
    """
    if buffer_size < ALIGNMENT or buffer_size % ALIGNMENT or buffer_size > 1 << 40:
        raise ValueError(f"a buffer of {buffer_size} bytes is not a multiple of {ALIGNMENT}")
    if not 1 <= num_buffers <= 1024:
        raise ValueError(f"{num_buffers} buffers: the count must be from 1 to 1024")
    seen: dict[str, TensorSpec] = {}
    total = 0
    for spec in specs:
        if spec.name in seen:
            raise ValueError(f"two tensors are named {spec.name!r:.80}")
        if spec.same_as is not None:
            other = seen.get(spec.same_as)
            if not other or other.same_as or (other.shape, other.dtype) != (spec.shape, spec.dtype):
                raise ValueError(f"{spec.name!r:.80} cannot share memory with {spec.same_as!r:.80}")
        if _dtype_name(spec.dtype).startswith("q"):
            raise ValueError(f"{spec.name!r:.80} is quantized: its bytes are not its value")
        # Also for an empty one, which torch cannot make if its strides overflow.
        padded = nbytes_of([max(length, 1) for length in spec.shape], spec.dtype)
        if len(spec.shape) > MAX_RANK or padded > MAX_NBYTES:
            raise ValueError(f"{spec.name!r:.80} has too many dimensions, or too large ones")
        seen[spec.name] = spec
        total += spec.nbytes
    if total > min(MAX_NBYTES, MAX_CHUNKS * buffer_size):
        raise ValueError(f"{total} bytes are too many for buffers of {buffer_size}")


def specs_of(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    """The tensors' specs; those with the same memory, shape and dtype are tied."""
    first: dict[tuple[object, ...], str] = {}
    specs = []
    for name, tensor in tensors.items():
        same_as = None
        if tensor.numel():
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            same_as = first.setdefault(key, name)
        tied = None if same_as == name else same_as
        specs.append(TensorSpec(name, tuple(tensor.shape), tensor.dtype, tied))
    return tuple(specs)


def dtype_called(name: str) -> torch.dtype:
    """The torch dtype of that name, as `bfloat16`; ValueError if this torch has none."""
    dtype = vars(torch).get(name)  # getattr would import a module of that name
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r:.40}")
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
