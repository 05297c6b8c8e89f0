"""The files to send: each as a list of segments, verbatim or with selected tensors.

Reads an index that has to be rewritten, no other file. Knows no chunks, ranks or targets.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from packcast.checkpoint.checkpoint import Checkpoint
from packcast.checkpoint.header import LENGTH_NBYTES, Header, parse_header
from packcast.checkpoint.header_limits import MAX_HEADERS_NBYTES
from packcast.checkpoint.index import is_index, read_index, rewritten
from packcast.checkpoint.sourcefile import SourceFile
from packcast.checkpoint.suggestions import hint_for_tensors
from packcast.checkpoint.tensor_table import Tensor
from packcast.errors import CheckpointError, UsageError

# Limits of an offer: the outline of its files, as JSON, and the headers. The outline of 163 shards
# has 30 KB; with every tensor's position twice it would have 5 MB.
MAX_FILES = 10_000
MAX_OUTLINE_NBYTES = 8 << 20
MAX_OFFERED_NBYTES = MAX_OUTLINE_NBYTES + MAX_HEADERS_NBYTES
_MAX_FIELDS_NBYTES = 200  # of a file in the outline, but for its name and positions
_MAX_SELECTION_NBYTES = 1 << 20
_HEADER_ALIGNMENT = 8
_IN_PARTS = "send it in parts: --exclude-files chooses"


@dataclass(frozen=True, slots=True)
class FileSpec:
    """The description of an outgoing file that receivers get before its bytes.

    `mode` and `folder_mode` are permission bits of the file and of its folders. `elsewhere` and
    `unlisted` are positions in `header.tensors`: of tensors that the index assigns to another
    shard, which are never received as tensors, and of those that it does not name.
    """

    name: str
    nbytes: int
    mtime_ns: int
    mode: int
    folder_mode: int
    header: Header | None
    elsewhere: frozenset[int] = frozenset()
    unlisted: frozenset[int] = frozenset()

    @property
    def tensors(self) -> tuple[tuple[int, Tensor], ...]:
        """The tensors for receivers of tensors, each with its position."""
        tensors = self.header.tensors if self.header else ()
        return tuple((i, t) for i, t in enumerate(tensors) if i not in self.elsewhere)


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are not in a source file."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class SourceRun:
    """A run of bytes of `Checkpoint.files[source]`; never empty."""

    source: int
    offset: int
    nbytes: int


Segment = Literal | SourceRun


@dataclass(frozen=True, slots=True)
class OutgoingFile:
    """A file that consists of `segments`, one after the other."""

    spec: FileSpec
    segments: tuple[Segment, ...]


def outgoing_files(
    checkpoint: Checkpoint, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[OutgoingFile, ...]:
    """The files to send, by name.

    `include` and `exclude` are globs over tensor names, as in `fnmatch.fnmatchcase`; no `include`
    means all. A shard without some of its tensors gets a new header, one without all is not sent;
    indexes are rewritten. Raises UsageError where no tensor is left, CheckpointError where an index
    cannot be read or there are too many files.
    """
    if include or exclude:
        files = _selection(checkpoint, include, exclude)
    else:
        files = tuple(_verbatim(source, file) for source, file in enumerate(checkpoint.files))
    _check_offered(files)
    return files


def _check_offered(files: Sequence[OutgoingFile]) -> None:
    if len(files) > MAX_FILES:
        raise CheckpointError(f"{len(files):,} files, more than {MAX_FILES:,}", hint=_IN_PARTS)
    nbytes = sum(_outlined_nbytes(file.spec) for file in files) + _MAX_SELECTION_NBYTES
    if nbytes > MAX_OUTLINE_NBYTES:
        raise CheckpointError(
            f"the names of all files, and what the index says of their tensors, are {nbytes:,}"
            f" bytes, more than {MAX_OUTLINE_NBYTES:,}",
            hint=_IN_PARTS,
        )


def _outlined_nbytes(spec: FileSpec) -> int:
    """An upper bound for the file's bytes in the outline."""
    positions = 7 * (len(spec.elsewhere) + len(spec.unlisted))
    return _MAX_FIELDS_NBYTES + positions + 2 * len(spec.name.encode())


def _selection(
    checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str]
) -> tuple[OutgoingFile, ...]:
    def selected(tensor: Tensor) -> bool:
        return (not include or any(fnmatchcase(tensor.name, glob) for glob in include)) and not any(
            fnmatchcase(tensor.name, glob) for glob in exclude
        )

    kept = {
        file.name: tuple(filter(selected, file.header.tensors))
        for file in checkpoint.files
        if file.header
    }
    if not any(kept.values()):
        names = [
            name for file in checkpoint.shards if file.header for name in file.header.tensors.names
        ]
        raise _nothing_selected(names, include, exclude)
    files = (_selected(source, file, kept) for source, file in enumerate(checkpoint.files))
    return tuple(filter(None, files))


def _nothing_selected(
    names: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> UsageError:
    if any(fnmatchcase(name, glob) for name in names for glob in include) or not include:
        options = " ".join(f"--exclude {glob!r}" for glob in exclude)
        return UsageError(
            f"{options} leaves no tensor to send",
            hint="`packcast inspect CKPT --tensors` lists the tensors' names",
        )
    options = " ".join(f"--include {glob!r}" for glob in include)
    return UsageError(f"{options} matches no tensor", hint=hint_for_tensors(include, names))


def _selected(
    source: int, file: SourceFile, kept: dict[str, tuple[Tensor, ...]]
) -> OutgoingFile | None:
    if file.header is None:
        return _index(source, file, kept) if is_index(file.name) else _verbatim(source, file)
    tensors = kept[file.name]
    if not tensors:
        return None
    if len(tensors) == len(file.header.tensors):
        return _verbatim(source, file)
    json_bytes = _header_json(file.header, tensors)
    head = Literal(struct.pack("<Q", len(json_bytes)) + json_bytes)
    nbytes = head.nbytes + sum(tensor.nbytes for tensor in tensors)
    header = parse_header(json_bytes, nbytes, file.name)
    return OutgoingFile(_spec(file, nbytes, header), (head, *_runs(source, tensors)))


def _verbatim(source: int, file: SourceFile) -> OutgoingFile:
    segments = (SourceRun(source, 0, file.nbytes),) if file.nbytes else ()
    return OutgoingFile(_spec(file, file.nbytes, file.header), segments)


def _spec(file: SourceFile, nbytes: int, header: Header | None) -> FileSpec:
    names = header.tensors.names if header else ()
    elsewhere, unlisted = (
        frozenset(i for i, name in enumerate(names) if name in chosen) if chosen else frozenset()
        for chosen in (file.elsewhere, file.unlisted)
    )
    modes = file.mode, file.folder_mode
    return FileSpec(file.name, nbytes, file.mtime_ns, *modes, header, elsewhere, unlisted)


def _header_json(header: Header, tensors: Sequence[Tensor]) -> bytes:
    """The JSON for a file of these tensors, padded so that the data is aligned."""
    content: dict[str, object] = {"__metadata__": header.metadata} if header.metadata else {}
    begin = 0
    for tensor in tensors:
        offsets = [begin, begin + tensor.nbytes]
        content[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": offsets,
        }
        begin = offsets[1]
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return data + b" " * (-(LENGTH_NBYTES + len(data)) % _HEADER_ALIGNMENT)


def _runs(source: int, tensors: Sequence[Tensor]) -> list[SourceRun]:
    """The tensors' bytes, in order, with neighbours joined."""
    bounds: list[list[int]] = []
    for tensor in tensors:
        if bounds and bounds[-1][1] == tensor.begin:
            bounds[-1][1] = tensor.end
        else:
            bounds.append([tensor.begin, tensor.end])
    return [SourceRun(source, begin, end - begin) for begin, end in bounds if end > begin]


def _index(
    source: int, file: SourceFile, kept: dict[str, tuple[Tensor, ...]]
) -> OutgoingFile | None:
    """The index of the kept tensors: verbatim if these are all, None if there are none."""
    index = read_index(file.path, file.name)
    names = {shard: {tensor.name for tensor in tensors} for shard, tensors in kept.items()}
    left = {tensor for tensor, shard in index.shard_of.items() if tensor in names.get(shard, ())}
    if not left:
        return None
    if len(left) == len(index.shard_of):
        return _verbatim(source, file)
    tensors = [
        tensor
        for shard in set(index.shard_of.values())
        for tensor in kept.get(shard, ())
        if tensor.name in left and index.shard_of[tensor.name] == shard
    ]
    data = rewritten(
        index,
        left,
        nbytes=sum(tensor.nbytes for tensor in tensors),
        num_elements=sum(math.prod(tensor.shape) for tensor in tensors),
    )
    return OutgoingFile(_spec(file, len(data), None), (Literal(data),))
