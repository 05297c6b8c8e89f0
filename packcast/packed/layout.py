"""The native layout for tensors: where each lies in the stream of chunks that replays carry.

Pure functions over names, shapes and dtypes; what both ends must hold alike has a digest here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import xxhash

from packcast.errors import TransferError
from packcast.packed.plan import align_up
from packcast.packed.tensor_bytes import nbytes_of
from packcast.packed.tensor_map import Rows, ends_of

ALIGNMENT = 256  # what GPUs copy best, and enough for a view of any dtype
# A tensor of a buffer's size or more rides by itself, in runs as large as a collective gains from:
# both ends can broadcast it where it lies, or a stand-in, so no slot has to be as large.
MAX_ALONE_NBYTES = 1 << 30
# Before the first broadcast a buffer is packed, and after the last one a buffer is unpacked, with
# nothing beside it. Where buffers are large, smaller chunks go first and last. On NVLink so much is
# under way for 0.1 ms, about what launching the next chunk takes; packing is so much faster than
# sending that the next chunk may be as many times larger.
END_NBYTES = 32 << 20
END_GROWTH = 3
MAX_TENSORS = 10_000_000
MAX_CHUNKS = 10_000_000
MAX_RANK = 64
MAX_NBYTES = 1 << 48


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a receiver knows of a tensor. `same_as` names the one that it shares its memory with."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    same_as: str | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes on the wire; a tied tensor has none of its own."""
        return 0 if self.same_as else nbytes_of(self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class Part:
    """A run of one tensor's bytes and where it lies in its chunk."""

    tensor: int
    offset: int
    nbytes: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class ReplayChunk:
    """What one collective carries: parts at aligned places, with gaps of at most ALIGNMENT.

    Without a slot it is one part of any size, from a multiple of ALIGNMENT of its tensor on.
    """

    index: int
    root: int
    nbytes: int
    parts: tuple[Part, ...]
    needs_slot: bool = True


def lay_out(specs: Sequence[TensorSpec], buffer_size: int, root: int) -> tuple[ReplayChunk, ...]:
    """Cut the tensors, in order, into chunks; those that need a slot have at most `buffer_size`.

    A tensor of at least `buffer_size` has chunks of its own, of up to MAX_ALONE_NBYTES or
    `buffer_size` if that is more. What is smaller, or left of one, shares chunks: each begins at a
    multiple of ALIGNMENT, and what does not fit goes on at the beginning of the next. Large chunks
    at either end are cut into smaller ones. `buffer_size` is a multiple of ALIGNMENT.
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
    """The first and the last chunk in pieces that grow, and shrink, where they need a slot."""
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
    """Where to cut so many bytes into pieces that grow, as far as large ones are left."""
    cuts, at, size = [], 0, END_NBYTES
    while nbytes - at > 2 * size:
        at += size
        size *= END_GROWTH
        cuts.append(at)
    return cuts


def _cut(chunk: ReplayChunk, cuts: Sequence[int]) -> list[ReplayChunk]:
    """The chunk cut at these bytes of it, or a little before, each piece from its slot's start."""
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
    """How large a slot has to be: a multiple of ALIGNMENT, so that all of them begin at one."""
    return align_up(max((c.nbytes for c in chunks if c.needs_slot), default=0), ALIGNMENT)


def rows_of(chunks: Sequence[ReplayChunk]) -> Rows:
    """The parts of all chunks as flat numbers, for tables of addresses."""
    numbers = [
        (part.tensor, part.offset, part.slot_offset, part.nbytes)
        for chunk in chunks
        for part in chunk.parts
    ]
    columns = torch.tensor(numbers, dtype=torch.int64).view(-1, 4).t().contiguous()
    tensor, offset, slot_offset, nbytes = columns.unbind()
    counts = torch.tensor([len(chunk.parts) for chunk in chunks], dtype=torch.int64)
    return Rows(tensor, offset, slot_offset, nbytes, ends_of(counts))


def describe(specs: Sequence[TensorSpec], buffer_size: int, num_buffers: int) -> bytes:
    """The plan as it travels in band: JSON, the same bytes for the same plan."""
    tensors = [
        [spec.name, list(spec.shape), _dtype_name(spec.dtype), spec.same_as] for spec in specs
    ]
    plan = {"buffer_size": buffer_size, "num_buffers": num_buffers, "tensors": tensors}
    return json.dumps(plan, separators=(",", ":")).encode()


def understand(description: bytes) -> tuple[tuple[TensorSpec, ...], int, int]:
    """Specs, buffer size and count from `describe`'s bytes; TransferError if it is not such."""
    try:
        plan = json.loads(description)
        if len(plan["tensors"]) > MAX_TENSORS:
            raise ValueError("too many tensors")
        specs = tuple(
            TensorSpec(
                _checked(name, str),
                tuple(_size(length) for length in shape),
                dtype_called(_checked(dtype, str)),
                None if same_as is None else _checked(same_as, str),
            )
            for name, shape, dtype, same_as in plan["tensors"]
        )
        buffer_size, num_buffers = _size(plan["buffer_size"]), _size(plan["num_buffers"])
        check_plan(specs, buffer_size, num_buffers)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TransferError(f"the sender's plan cannot be understood: {error}") from error
    return specs, buffer_size, num_buffers


def digest_of(description: bytes) -> bytes:
    """Sixteen bytes that are equal on two ends iff their plans are."""
    return xxhash.xxh3_128_digest(description)


def check_plan(specs: Sequence[TensorSpec], buffer_size: int, num_buffers: int) -> None:
    """Raise ValueError unless it can be carried out: unique names, ties that lead to an equal
    earlier tensor, sizes that add up to something a machine may have.
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
        # An empty one counts as well: torch cannot make it either if its strides overflow.
        padded = nbytes_of([max(length, 1) for length in spec.shape], spec.dtype)
        if len(spec.shape) > MAX_RANK or padded > MAX_NBYTES:
            raise ValueError(f"{spec.name!r:.80} has too many dimensions, or too large ones")
        seen[spec.name] = spec
        total += spec.nbytes
    if total > min(MAX_NBYTES, MAX_CHUNKS * buffer_size):
        raise ValueError(f"{total} bytes are too many for buffers of {buffer_size}")


def specs_of(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    """Specs by looking at the tensors; those that are one and the same in memory are tied."""
    first: dict[tuple[object, ...], str] = {}
    specs = []
    for name, tensor in tensors.items():
        same_as = None
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            same_as = first.setdefault(place, name)
        specs.append(
            TensorSpec(
                name,
                tuple(tensor.shape),
                tensor.dtype,
                same_as if same_as != name else None,
            )
        )
    return tuple(specs)


def dtype_called(name: str) -> torch.dtype:
    """The torch dtype of that name, as `bfloat16`; ValueError if there is none here."""
    dtype = vars(torch).get(name)  # getattr would import modules that are called so
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r:.40}")
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(value: object, kind: type[str]) -> str:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.40} is not a text")
    return value


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1 << 48:
        raise ValueError(f"{value!r:.40} is not a size")
    return value
