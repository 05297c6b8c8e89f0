"""The sender's description of a transfer, as it travels, and the checks of a received one.

Everything that a worker does follows from an Offer that passed `Offer.from_bytes`: names stay
inside the target, counts and sizes are bounded, headers are parsed again, and the plan is made
again. As bytes it is one line of JSON, an `Outline`, followed by the shards' headers as they are
in the files. Being from another process, the line is counted before it is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    Strict,
    ValidationError,
)

from packcast.checkpoint.header import Header, parse_header
from packcast.checkpoint.header_limits import MAX_TENSORS, HeaderLimits
from packcast.checkpoint.names import MAX_COMPONENT_NBYTES, MAX_DEPTH, clash_of, name_fault
from packcast.checkpoint.outgoing import MAX_FILES, MAX_OUTLINE_NBYTES, FileSpec
from packcast.checkpoint.sourcefile import MAX_MTIME_NS
from packcast.checkpoint.walk import ALL_MAY
from packcast.control.rank_info import Rank, check_printable
from packcast.errors import PackcastError, TransferError
from packcast.packed.plan import BLOCK, TURN, Chunks, check_buffers, plan_chunks, plan_digest
from packcast.transfer.protocol import NumRanks, RankAssignment
from packcast.units import format_exact_size

MAX_NBYTES = 1 << 46
# Making a plan of this size takes about one second and 70 MB.
MAX_CHUNKS = 1 << 18  # 16 TiB in buffers of 64 MiB, 256 GiB in the smallest
MAX_TURNS = 1 << 20  # of files, within chunks: 4 TiB
MAX_LISTED_RANKS = 1 << 16
MAX_SAMPLES = 64
MAX_GLOBS = 1000

# Bound the number of objects that a parser makes: a file has a few, and positions.
_MAX_BRACKETS = 8 * MAX_FILES
_MAX_COMMAS = 2 * MAX_TENSORS + 16 * MAX_FILES


def _check_name(name: str) -> str:
    if fault := name_fault(name):
        raise ValueError(f"the name {fault}")
    return name


Name = Annotated[
    str, Field(max_length=MAX_DEPTH * (MAX_COMPONENT_NBYTES + 1)), AfterValidator(_check_name)
]
Text = Annotated[str, Field(max_length=1000), AfterValidator(check_printable)]
Nbytes = Annotated[int, Field(ge=0, le=MAX_NBYTES)]
Position = Annotated[int, Field(ge=0, lt=MAX_TENSORS)]
Positions = Annotated[list[Position], Field(max_length=MAX_TENSORS)]
Mode = Annotated[int, Field(ge=0, le=ALL_MAY)]
# Tuples are lists in JSON, which a strict tuple would refuse.
Globs = Annotated[tuple[Text, ...], Strict(False), Field(max_length=MAX_GLOBS)]
Ranks = Annotated[tuple[Rank, ...], Strict(False), Field(max_length=MAX_LISTED_RANKS)]


class Sample(NamedTuple):
    """A block that every reader must see as the sender does."""

    file: Position
    offset: Nbytes
    nbytes: Annotated[int, Field(ge=0, le=BLOCK)]
    digest: Text


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class FileOutline(_Strict):
    """A file; `header` is the size of its header as JSON, in bytes, None for a sidecar."""

    name: Name
    nbytes: Nbytes
    mtime_ns: Annotated[int, Field(ge=-MAX_MTIME_NS, le=MAX_MTIME_NS)]
    mode: Mode
    folder_mode: Mode
    header: Nbytes | None
    elsewhere: Positions
    unlisted: Positions


class _Terms(_Strict):
    buffer_size: Nbytes
    num_buffers: Annotated[int, Field(ge=1, le=MAX_CHUNKS)]
    staging: Nbytes
    readers: Annotated[Ranks, Field(min_length=1)]
    chain: Ranks  # see `Offer.order`
    plan: Text
    digest: Literal["xxh3_128"]
    include: Globs
    exclude: Globs
    samples: Annotated[tuple[Sample, ...], Strict(False), Field(max_length=MAX_SAMPLES)]
    world_size: NumRanks
    backend: Literal["nccl", "gloo"]
    reason: Text
    loud: bool


class Outline(_Terms):
    """An offer without its headers, the same for all ranks."""

    files: Annotated[list[FileOutline], Field(max_length=MAX_FILES)]


class Offer(_Terms):
    """What will be sent and how; the same for every rank but for `assignment`."""

    files: tuple[InstanceOf[FileSpec], ...]
    assignment: RankAssignment

    @property
    def rank(self) -> int:
        return self.assignment.rank

    @property
    def device(self) -> str:
        return self.assignment.device

    @property
    def order(self) -> Sequence[int]:
        """The ranks in the order in which they pass chunks on, over gloo: `chain`, or by rank."""
        return self.chain or range(self.world_size)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.files)

    @property
    def num_tensors(self) -> int:
        return sum(len(spec.header.tensors) for spec in self.files if spec.header)

    def chunks(self) -> Chunks:
        """The plan, made here; TransferError unless it is the offered one."""
        sizes = [spec.nbytes for spec in self.files]
        chunks = plan_chunks(sizes, self.buffer_size, self.readers)
        if plan_digest(sizes, self.buffer_size, chunks) != self.plan:
            raise TransferError("the sender's plan is not the one this rank makes of its offer")
        return chunks

    def to_bytes(self) -> bytes:
        """The offer without the assignment: it may be large, and is made once for all ranks."""
        shared = {name: getattr(self, name) for name in _Terms.model_fields}
        outline = Outline.model_construct(files=[_outline_of(s) for s in self.files], **shared)
        headers = (spec.header.json_bytes for spec in self.files if spec.header)
        return b"".join((outline.model_dump_json().encode(), b"\n", *headers))

    @staticmethod
    def from_bytes(data: bytes, assignment: RankAssignment) -> Offer:
        """Check an offer, which may be hostile; TransferError says what is wrong."""
        try:
            outline, begin = _read_outline(data)
            _check(outline, assignment)
            if begin + sum(file.header or 0 for file in outline.files) != len(data):
                raise ValueError("its headers are not those that it lists")
            files = tuple(_files(data, begin, outline.files))
            return Offer(**dict(outline) | {"files": files, "assignment": assignment})
        except PackcastError as error:
            raise TransferError(f"the sender's offer is refused: {error}") from error
        except ValueError as error:
            raise TransferError(f"the sender's offer is refused: {fault_of(error)}") from error


def amount_fault(nbytes: int, buffer_size: int) -> str | None:
    """Why a plan for `nbytes` would be too large; None if it is not."""
    num_chunks, num_turns = nbytes // buffer_size, nbytes // TURN
    if num_chunks <= MAX_CHUNKS and num_turns <= MAX_TURNS:
        return None
    return f"{nbytes:,} bytes in buffers of {format_exact_size(buffer_size)} are too many"


def fault_of(error: ValueError) -> str:
    """What is wrong, in a few words; pydantic would show whole values, which may be anything."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:100]
    what = f"{where}: {first['msg']}" if where else first["msg"]
    return "".join(c if c.isprintable() else "?" for c in what)[:500]


def _outline_of(spec: FileSpec) -> FileOutline:
    return FileOutline.model_construct(
        name=spec.name,
        nbytes=spec.nbytes,
        mtime_ns=spec.mtime_ns,
        mode=spec.mode,
        folder_mode=spec.folder_mode,
        header=len(spec.header.json_bytes) if spec.header else None,
        elsewhere=sorted(spec.elsewhere),
        unlisted=sorted(spec.unlisted),
    )


def _read_outline(data: bytes) -> tuple[Outline, int]:
    """The outline, and where the headers begin."""
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


def _check(outline: Outline, assignment: RankAssignment) -> None:
    """Whether the fields fit together, which no bound of one field can say."""
    check_buffers(outline.buffer_size, outline.num_buffers)
    readers, world_size = outline.readers, outline.world_size
    if max(*readers, assignment.rank) >= world_size or len(set(readers)) != len(readers):
        raise ValueError("its readers or its rank are not of its group")
    if outline.chain and sorted(outline.chain) != list(range(world_size)):
        raise ValueError("its chain does not have every rank once")
    if max(assignment.ranks_on_host, assignment.readers_on_host) > world_size:
        raise ValueError("more ranks on a host than there are")
    if (outline.backend == "nccl") is (assignment.device == "cpu"):
        raise ValueError(f"{assignment.device} is no device for {outline.backend}")
    if fault := amount_fault(sum(file.nbytes for file in outline.files), outline.buffer_size):
        raise ValueError(fault)
    if clash := clash_of(file.name for file in outline.files):
        raise ValueError(f"two files cannot both be there: {clash[0]!r} and {clash[1]!r}")
    for sample in outline.samples:
        if (
            sample.file >= len(outline.files)
            or sample.offset + sample.nbytes > outline.files[sample.file].nbytes
        ):
            raise ValueError("a sample is of no file, or past its end")


def _files(data: bytes, at: int, files: Sequence[FileOutline]) -> Iterator[FileSpec]:
    limits = HeaderLimits()
    for file in files:
        header: Header | None = None
        if file.header is not None:
            header = parse_header(data[at : at + file.header], file.nbytes, file.name, limits)
            at += file.header
        num_tensors = len(header.tensors) if header else 0
        for positions in (file.elsewhere, file.unlisted):
            if len(positions) > num_tensors or max(positions, default=-1) >= num_tensors:
                raise ValueError(f"{file.name}: it has {num_tensors} tensors")
        yield FileSpec(
            file.name,
            file.nbytes,
            file.mtime_ns,
            file.mode,
            file.folder_mode,
            header,
            frozenset(file.elsewhere),
            frozenset(file.unlisted),
        )
