"""The sender's description of a transfer, as it travels, and the receiver's distrust of it.

Everything that a worker does follows from an Offer that passed `Offer.from_json`: names stay inside
the target, counts and sizes are bounded, headers are parsed again, and the plan is made again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packcast.checkpoint.checkpoint import MAX_MTIME_NS
from packcast.checkpoint.header import Header, parse_header
from packcast.checkpoint.names import clash_of, name_fault
from packcast.checkpoint.outgoing import FileSpec
from packcast.checkpoint.reading import shown
from packcast.errors import PackcastError, TransferError
from packcast.packed.plan import BLOCK, TURN, Chunk, check_buffers, plan_chunks, plan_digest

MAX_FILES = 100_000
MAX_NBYTES = 1 << 46
MAX_CHUNKS = 1 << 20
MAX_TURNS = 4 * MAX_CHUNKS  # of files, within chunks: 16 TiB
MAX_RANKS = 1 << 20
MAX_SAMPLES = 64


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

    def to_json(self) -> dict[str, object]:
        """The PLACE message."""
        return {
            "kind": "PLACE",
            "rank": self.rank,
            "device": self.device,
            "ranks_on_host": self.ranks_on_host,
            "readers_on_host": self.readers_on_host,
        }


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

    def chunks(self) -> tuple[Chunk, ...]:
        """The plan, made here; TransferError unless it is the offered one."""
        sizes = [spec.nbytes for spec in self.files]
        chunks = plan_chunks(sizes, self.buffer_size, self.readers)
        if plan_digest(sizes, self.buffer_size, chunks) != self.plan:
            raise TransferError("the sender's plan is not the one this rank makes of its offer")
        return chunks

    def to_json(self) -> dict[str, object]:
        """The OFFER message, without the place: it may be large, and is made once for all."""
        return {
            "kind": "OFFER",
            "files": [_file_to_json(spec) for spec in self.files],
            "buffer_size": self.buffer_size,
            "num_buffers": self.num_buffers,
            "staging": self.staging,
            "readers": list(self.readers),
            "chain": list(self.chain),
            "plan": self.plan,
            "digest": "xxh3_128",
            "selection": {
                "include": list(self.selection.include),
                "exclude": list(self.selection.exclude),
            },
            "samples": [[s.file, s.offset, s.nbytes, s.digest] for s in self.samples],
            "world_size": self.world_size,
            "backend": self.backend,
            "reason": self.reason,
            "loud": self.loud,
        }

    @staticmethod
    def from_json(message: Mapping[str, object], place: Mapping[str, object]) -> Offer:
        """Check OFFER and PLACE, which may be hostile; TransferError says what is wrong."""
        try:
            return _checked(message, place)
        except (PackcastError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise TransferError(f"the sender's offer is refused: {error}") from error


def _file_to_json(spec: FileSpec) -> list[object]:
    header = spec.header.json_bytes.decode() if spec.header else None
    roles = [sorted(spec.elsewhere), sorted(spec.unlisted)]
    return [spec.name, spec.nbytes, spec.mtime_ns, spec.executable, header, *roles]


def _checked(message: Mapping[str, object], place: Mapping[str, object]) -> Offer:
    if message["digest"] != "xxh3_128":
        raise ValueError("its digests are of an unknown kind")
    buffer_size = _count(message["buffer_size"], MAX_NBYTES)
    num_buffers = _count(message["num_buffers"], MAX_CHUNKS)
    check_buffers(buffer_size, num_buffers)
    world_size = _count(message["world_size"], MAX_RANKS)
    files = tuple(_file(entry) for entry in _list(message["files"], MAX_FILES))
    clash = clash_of(spec.name for spec in files)
    if clash:
        raise ValueError(f"two files cannot both be there: {clash[0]!r} and {clash[1]!r}")
    nbytes = sum(spec.nbytes for spec in files)
    num_chunks, num_turns = nbytes // buffer_size, nbytes // TURN
    if nbytes > MAX_NBYTES or num_chunks > MAX_CHUNKS or num_turns > MAX_TURNS:
        raise ValueError(f"{nbytes} bytes in buffers of {buffer_size} are too many")
    readers = tuple(_count(rank, world_size - 1) for rank in _list(message["readers"], world_size))
    if not readers or len(set(readers)) != len(readers):
        raise ValueError("its readers are not a list of ranks")
    return Offer(
        files=files,
        buffer_size=buffer_size,
        num_buffers=num_buffers,
        staging=_count(message["staging"], MAX_NBYTES),
        readers=readers,
        chain=_chain(message["chain"], world_size),
        plan=_text(message["plan"]),
        selection=_selection(message["selection"]),
        samples=tuple(_sample(entry, files) for entry in _list(message["samples"], MAX_SAMPLES)),
        world_size=world_size,
        backend=_one_of(message["backend"], ("nccl", "gloo")),
        reason=_text(message["reason"]),
        loud=_flag(message["loud"]),
        place=_place(place, world_size, str(message["backend"])),
    )


def _chain(value: object, world_size: int) -> tuple[int, ...]:
    ranks = tuple(_count(rank, world_size - 1) for rank in _list(value, world_size))
    if ranks and sorted(ranks) != list(range(world_size)):
        raise ValueError("its chain does not have every rank once")
    return ranks


def _place(message: Mapping[str, object], world_size: int, backend: str) -> Place:
    device = _text(message["device"])
    if not re.fullmatch(r"cuda:(0|[1-9][0-9]?)" if backend == "nccl" else "cpu", device):
        raise ValueError(f"{device} is no device for {backend}")
    return Place(
        rank=_count(message["rank"], world_size - 1),
        device=device,
        ranks_on_host=max(1, _count(message["ranks_on_host"], world_size)),
        readers_on_host=max(1, _count(message["readers_on_host"], world_size)),
    )


def _file(entry: object) -> FileSpec:
    name, nbytes, mtime_ns, executable, header_text, elsewhere, unlisted = _list(entry, 7)
    if not isinstance(name, str):
        raise ValueError("a file's name is not a text")
    fault = name_fault(name)
    if fault:
        raise ValueError(f"the name {shown(name)}: {fault}")
    size = _count(nbytes, MAX_NBYTES)
    header: Header | None = None
    if header_text is not None:
        if not isinstance(header_text, str):
            raise ValueError(f"{name}: its header is not a text")
        header = parse_header(header_text.encode(), size, name)
    num_tensors = len(header.tensors) if header else 0
    return FileSpec(
        name,
        size,
        _time(mtime_ns),
        _flag(executable),
        header,
        _positions(elsewhere, num_tensors),
        _positions(unlisted, num_tensors),
    )


def _positions(value: object, num_tensors: int) -> frozenset[int]:
    return frozenset(_count(at, num_tensors - 1) for at in _list(value, num_tensors))


def _selection(value: object) -> Selection:
    if not isinstance(value, dict):
        raise ValueError("its selection is not an object")
    include, exclude = (
        tuple(_text(glob) for glob in _list(value[key], MAX_FILES))
        for key in ("include", "exclude")
    )
    return Selection(include, exclude)


def _sample(entry: object, files: Sequence[FileSpec]) -> Sample:
    index, begin, length, digest = _list(entry, 4)
    file = _count(index, len(files) - 1)
    offset = _count(begin, files[file].nbytes)
    nbytes = _count(length, min(BLOCK, files[file].nbytes - offset))
    return Sample(file, offset, nbytes, _text(digest))


def _count(value: object, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ValueError(f"{shown(value)} is not a number from 0 to {limit}")
    return value


def _time(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_MTIME_NS:
        raise ValueError(f"{shown(value)} is not a time in nanoseconds")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is neither true nor false")
    return value


def _list(value: object, limit: int) -> list[object]:
    if not isinstance(value, list) or len(value) > limit:
        raise ValueError(f"not a list of at most {limit}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 1000 or not value.isprintable():
        raise ValueError(f"{shown(value)} is not a short printable text")
    return value


def _one_of(value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{shown(value)} is none of {', '.join(choices)}")
    return str(value)
