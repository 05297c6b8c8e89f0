"""The sender's description of a transfer, as it travels, and the receiver's distrust of it.

Everything that a worker does follows from an Offer that passed `Offer.from_bytes`: names stay
inside the target, counts and sizes are bounded, headers are parsed again, and the plan is made
again. As bytes it is an outline, one line of JSON (see `outline`), and behind it the shards'
headers as they are in the files, one after the other, so that each is parsed once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from packcast.checkpoint.header import Header, parse_header
from packcast.checkpoint.header_limits import HeaderLimits
from packcast.checkpoint.names import clash_of
from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import PackcastError, TransferError
from packcast.packed.plan import Chunks, check_buffers, plan_chunks, plan_digest
from packcast.transfer.outline import (
    FileOutline,
    Outline,
    Placement,
    amount_fault,
    fault_of,
    read_outline,
)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors of the sender's checkpoint go; the other readers choose the same."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A block that every reader must see as the sender does."""

    file: int
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Place:
    """What an offer says to one rank alone: its GPU, and with how many it shares its host."""

    rank: int
    device: str
    ranks_on_host: int
    readers_on_host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What will be sent and how; the same for every rank but for `place`."""

    files: tuple[FileSpec, ...]
    buffer_size: int
    num_buffers: int
    staging: int
    readers: tuple[int, ...]
    chain: tuple[int, ...]  # see `order`
    plan: str
    selection: Selection
    samples: tuple[Sample, ...]
    world_size: int
    backend: str
    reason: str
    loud: bool
    place: Place

    @property
    def rank(self) -> int:
        """The addressee's."""
        return self.place.rank

    @property
    def device(self) -> str:
        """The addressee's."""
        return self.place.device

    @property
    def order(self) -> Sequence[int]:
        """The ranks in the order in which they pass chunks on, over gloo: `chain`, or by rank."""
        return self.chain or range(self.world_size)

    @property
    def nbytes(self) -> int:
        """All files together."""
        return sum(spec.nbytes for spec in self.files)

    @property
    def num_tensors(self) -> int:
        """Tensors in all shards."""
        return sum(len(spec.header.tensors) for spec in self.files if spec.header)

    def chunks(self) -> Chunks:
        """The plan, made here; TransferError unless it is the offered one."""
        sizes = [spec.nbytes for spec in self.files]
        chunks = plan_chunks(sizes, self.buffer_size, self.readers)
        if plan_digest(sizes, self.buffer_size, chunks) != self.plan:
            raise TransferError("the sender's plan is not the one this rank makes of its offer")
        return chunks

    def to_bytes(self) -> bytes:
        """The offer without the place: it may be large, and is made once for all ranks."""
        outline = {
            "files": [_file_to_json(spec) for spec in self.files],
            "buffer_size": self.buffer_size,
            "num_buffers": self.num_buffers,
            "staging": self.staging,
            "readers": list(self.readers),
            "chain": list(self.chain),
            "plan": self.plan,
            "digest": "xxh3_128",
            "include": list(self.selection.include),
            "exclude": list(self.selection.exclude),
            "samples": [[s.file, s.offset, s.nbytes, s.digest] for s in self.samples],
            "world_size": self.world_size,
            "backend": self.backend,
            "reason": self.reason,
            "loud": self.loud,
        }
        line = json.dumps(outline, separators=(",", ":"), ensure_ascii=False)
        headers = (spec.header.json_bytes for spec in self.files if spec.header)
        return b"".join((line.encode(), b"\n", *headers))

    @staticmethod
    def from_bytes(data: bytes, place: Mapping[str, object]) -> Offer:
        """Check an offer and its place, which may be hostile; TransferError says what is wrong."""
        try:
            return _checked(data, Placement.model_validate(dict(place)))
        except PackcastError as error:
            raise TransferError(f"the sender's offer is refused: {error}") from error
        except ValueError as error:
            raise TransferError(f"the sender's offer is refused: {fault_of(error)}") from error


def _file_to_json(spec: FileSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "nbytes": spec.nbytes,
        "mtime_ns": spec.mtime_ns,
        "mode": spec.mode,
        "folder_mode": spec.folder_mode,
        "header": len(spec.header.json_bytes) if spec.header else None,
        "elsewhere": sorted(spec.elsewhere),
        "unlisted": sorted(spec.unlisted),
    }


def _checked(data: bytes, place: Placement) -> Offer:
    outline, begin = read_outline(data)
    check_buffers(outline.buffer_size, outline.num_buffers)
    _check_group(outline, place)
    _check_sizes(outline)
    clash = clash_of(file.name for file in outline.files)
    if clash:
        raise ValueError(f"two files cannot both be there: {clash[0]!r} and {clash[1]!r}")
    if begin + sum(file.header or 0 for file in outline.files) != len(data):
        raise ValueError("its headers are not those that it lists")
    return Offer(
        files=tuple(_files(data, begin, outline.files)),
        buffer_size=outline.buffer_size,
        num_buffers=outline.num_buffers,
        staging=outline.staging,
        readers=tuple(outline.readers),
        chain=tuple(outline.chain),
        plan=outline.plan,
        selection=Selection(tuple(outline.include), tuple(outline.exclude)),
        samples=tuple(_samples(outline)),
        world_size=outline.world_size,
        backend=outline.backend,
        reason=outline.reason,
        loud=outline.loud,
        place=Place(place.rank, place.device, place.ranks_on_host, place.readers_on_host),
    )


def _check_group(outline: Outline, place: Placement) -> None:
    ranks = (*outline.readers, place.rank)
    if max(ranks) >= outline.world_size or len(set(outline.readers)) != len(outline.readers):
        raise ValueError("its readers or its rank are not of its group")
    if outline.chain and sorted(outline.chain) != list(range(outline.world_size)):
        raise ValueError("its chain does not have every rank once")
    if max(place.ranks_on_host, place.readers_on_host) > outline.world_size:
        raise ValueError("more ranks on a host than there are")
    if (outline.backend == "nccl") is (place.device == "cpu"):
        raise ValueError(f"{place.device} is no device for {outline.backend}")


def _check_sizes(outline: Outline) -> None:
    fault = amount_fault(sum(file.nbytes for file in outline.files), outline.buffer_size)
    if fault:
        raise ValueError(fault)


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


def _samples(outline: Outline) -> Iterator[Sample]:
    for file, offset, nbytes, digest in outline.samples:
        if file >= len(outline.files) or offset + nbytes > outline.files[file].nbytes:
            raise ValueError("a sample is of no file, or past its end")
        yield Sample(file, offset, nbytes, digest)
