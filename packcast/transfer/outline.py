"""An offer but for its headers, as a declared model: what may stand in it, and how much.

From another process: it is counted before it is parsed, and what exists has been checked.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError

from packcast.checkpoint.header_limits import MAX_TENSORS
from packcast.checkpoint.names import MAX_COMPONENT_NBYTES, MAX_DEPTH, name_fault
from packcast.checkpoint.outgoing import MAX_FILES, MAX_OUTLINE_NBYTES
from packcast.checkpoint.sourcefile import MAX_MTIME_NS
from packcast.checkpoint.walk import ALL_MAY
from packcast.packed.plan import BLOCK, TURN
from packcast.units import format_exact_size

MAX_NBYTES = 1 << 46
# A plan of so many takes about one second and 70 MB to make.
MAX_CHUNKS = 1 << 18  # 16 TiB in buffers of 64 MiB, 256 GiB in the smallest
MAX_TURNS = 1 << 20  # of files, within chunks: 4 TiB
MAX_RANKS = 1 << 20
MAX_LISTED_RANKS = 1 << 16
MAX_SAMPLES = 64
MAX_GLOBS = 1000

# Brackets and commas stand for what a parser makes of them: a file has a few, and positions.
_MAX_BRACKETS = 8 * MAX_FILES
_MAX_COMMAS = 2 * MAX_TENSORS + 16 * MAX_FILES


def _named(name: str) -> str:
    fault = name_fault(name)
    if fault:
        raise ValueError(f"the name {fault}")
    return name


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("not printable")
    return text


Name = Annotated[
    str, Field(max_length=MAX_DEPTH * (MAX_COMPONENT_NBYTES + 1)), AfterValidator(_named)
]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
Nbytes = Annotated[int, Field(ge=0, le=MAX_NBYTES)]
Position = Annotated[int, Field(ge=0, lt=MAX_TENSORS)]
BlockSize = Annotated[int, Field(ge=0, le=BLOCK)]
Mode = Annotated[int, Field(ge=0, le=ALL_MAY)]
Rank = Annotated[int, Field(ge=0, lt=MAX_RANKS)]
Count = Annotated[int, Field(ge=1, le=MAX_RANKS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class FileOutline(_Strict):
    """A file; `header` is how many bytes of headers are its own, None for no shard."""

    name: Name
    nbytes: Nbytes
    mtime_ns: Annotated[int, Field(ge=-MAX_MTIME_NS, le=MAX_MTIME_NS)]
    mode: Mode
    folder_mode: Mode
    header: Nbytes | None
    elsewhere: Annotated[list[Position], Field(max_length=MAX_TENSORS)]
    unlisted: Annotated[list[Position], Field(max_length=MAX_TENSORS)]


class Outline(_Strict):
    """The same for all ranks."""

    files: Annotated[list[FileOutline], Field(max_length=MAX_FILES)]
    buffer_size: Nbytes
    num_buffers: Annotated[int, Field(ge=1, le=MAX_CHUNKS)]
    staging: Nbytes
    readers: Annotated[list[Rank], Field(min_length=1, max_length=MAX_LISTED_RANKS)]
    chain: Annotated[list[Rank], Field(max_length=MAX_LISTED_RANKS)]
    plan: Text
    digest: Literal["xxh3_128"]
    include: Annotated[list[Text], Field(max_length=MAX_GLOBS)]
    exclude: Annotated[list[Text], Field(max_length=MAX_GLOBS)]
    samples: Annotated[
        list[Annotated[tuple[Position, Nbytes, BlockSize, Text], Strict(False)]],
        Field(max_length=MAX_SAMPLES),
    ]
    world_size: Count
    backend: Literal["nccl", "gloo"]
    reason: Text
    loud: bool


class Placement(_Strict):
    """What is said to one rank alone."""

    rank: Rank
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:(0|[1-9][0-9]?))\z")]
    ranks_on_host: Count
    readers_on_host: Count


def amount_fault(nbytes: int, buffer_size: int) -> str | None:
    """Why so many bytes are too many for a plan; None if they are not."""
    num_chunks, num_turns = nbytes // buffer_size, nbytes // TURN
    if num_chunks <= MAX_CHUNKS and num_turns <= MAX_TURNS:
        return None
    return f"{nbytes:,} bytes in buffers of {format_exact_size(buffer_size)} are too many"


def read_outline(data: bytes) -> tuple[Outline, int]:
    """The outline that an offer begins with, and where its headers begin; raises ValueError."""
    end = data.find(b"\n", 0, MAX_OUTLINE_NBYTES + 1)
    if end < 0:
        raise ValueError(f"no outline in its first {MAX_OUTLINE_NBYTES} bytes")
    line = data[:end]
    num_brackets = line.count(b"[") + line.count(b"{")
    if num_brackets > _MAX_BRACKETS or line.count(b",") > _MAX_COMMAS:
        raise ValueError("its outline holds more than any checkpoint needs")
    try:
        # Not by pydantic itself, which would copy the whole for every field that is missing.
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("its outline is nested too deeply") from error
    return Outline.model_validate(content), end + 1


def fault_of(error: ValueError) -> str:
    """What is wrong, in a few words; pydantic would show whole values, which may be anything."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:100]
    what = f"{where}: {first['msg']}" if where else first["msg"]
    return "".join(c if c.isprintable() else "?" for c in what)[:500]
