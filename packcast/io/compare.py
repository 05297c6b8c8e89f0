"""Local copies compared byte for byte, or by the hashes of a manifest; every difference is found.

Imports no torch, and knows nothing of transfers.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.header import Header, read_header
from packcast.checkpoint.reading import unreadable
from packcast.checkpoint.tensor_table import Tensor
from packcast.checkpoint.walk import Kind, walk
from packcast.comparison import ComparedFile, Comparison, Mark
from packcast.errors import CheckpointError, UsageError
from packcast.io.manifest import NUM_THREADS, DigestKind, OnBytes, hash_file, names_under
from packcast.io.syscalls import address_of, first_difference

_PIECE = 8 << 20
_SHARD = ".safetensors"


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """What is at `path`, by logical name; of a single file the name is its own."""

    path: Path
    files: dict[str, Path]

    @property
    def root(self) -> Path:
        """What the names are relative to."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def local_files(
    path: Path, *, all_files: bool = False, exclude_files: Sequence[str] = ()
) -> LocalCopy:
    """The files that would be sent; where they are no checkpoint any more, all that are no hidden
    ones or weights in other formats. Raises CheckpointError where there is nothing."""
    try:
        found = open_checkpoint(path, all_files=all_files, exclude_files=exclude_files)
        return LocalCopy(path, {file.name: file.path for file in found.files})
    except UsageError:
        raise
    except CheckpointError:
        if path.is_file():
            return LocalCopy(path, {path.name: path})
        if not path.is_dir():
            raise
    entries, _ = walk(path, exclude_files)
    files = {it.name: it.path for it in entries if it.found and it.kind is not Kind.OTHER_WEIGHTS}
    if not files:
        raise CheckpointError(f"{path}: no files to compare")
    return LocalCopy(path, files)


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes of one file that should be the same in both: `tensor` only, or whatever is there."""

    one_offset: int
    other_offset: int
    nbytes: int
    tensor: int | None = None


@dataclass(slots=True)
class _Pair:
    """A file that both have, and what is found of it."""

    name: str
    one: Path
    other: Path
    one_nbytes: int = 0
    other_nbytes: int = 0
    tensors: Sequence[Tensor] = ()
    fixed: dict[str, Mark] = field(default_factory=dict)  # of tensors that headers tell already
    runs: list[_Run] = field(default_factory=list)
    differing: set[int] = field(default_factory=set)
    offset: int | None = None
    error: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def differs_at(self, offset: int, tensor: int | None = None) -> None:
        with self.lock:
            self.offset = offset if self.offset is None else min(self.offset, offset)
            if tensor is not None:
                self.differing.add(tensor)


def compare_copies(
    reference: LocalCopy, copy: LocalCopy, on_bytes: OnBytes = lambda nbytes: None
) -> Comparison:
    """Every byte of `copy` beside that of `reference`; nothing that differs is raised."""
    theirs = dict(copy.files)
    if reference.path.is_file() and copy.path.is_file():
        theirs = {next(iter(reference.files)): copy.path}
    files: list[ComparedFile] = []
    pairs: list[_Pair] = []
    for name, path in reference.files.items():
        if name in theirs:
            pairs.append(_pair(name, path, theirs[name]))
        else:
            files.append(_alone(name, path, "-"))
    files += [_alone(name, theirs[name], "+") for name in theirs if name not in reference.files]
    with ThreadPoolExecutor(NUM_THREADS, "packcast-compare") as pool:
        for _ in pool.map(lambda it: _compare(it[0], it[1], on_bytes), _pieces(pairs)):
            pass
    files += [_compared(pair) for pair in pairs]
    files.sort(key=lambda file: file.name)
    return Comparison(str(copy.path), str(reference.path), tuple(files))


def compare_with_manifest(
    copy: LocalCopy,
    manifest: Path,
    kind: DigestKind,
    hashes: dict[str, str],
    on_bytes: OnBytes = lambda nbytes: None,
) -> Comparison:
    """Every file of `copy` beside its hash; which tensors of a file differ no manifest tells."""
    wanted = {name: hashes[path] for name, path in names_under(copy.root, list(hashes)).items()}

    def one(name: str) -> ComparedFile:
        if name not in wanted:
            return _alone(name, copy.files[name], "+")
        path = copy.root / name
        if not path.is_file():
            return ComparedFile(name, "-", reason="is missing")
        try:
            found, _ = hash_file(path, kind, on_bytes)
        except OSError as error:
            return ComparedFile(name, "!", reason=f"cannot be read: {error.strerror}")
        if found == wanted[name]:
            return ComparedFile(name, "=")
        return ComparedFile(name, "*", reason="has another hash")

    names = sorted({*wanted, *copy.files})
    with ThreadPoolExecutor(NUM_THREADS, "packcast-hash") as pool:
        return Comparison(str(copy.path), str(manifest), tuple(pool.map(one, names)))


def _header(path: Path, name: str) -> Header | None:
    if not name.endswith(_SHARD):
        return None
    try:
        return read_header(path, name)
    except CheckpointError:
        return None


def _alone(name: str, path: Path, mark: Mark) -> ComparedFile:
    header = _header(path, name)
    tensors = tuple((tensor.name, mark) for tensor in header.tensors) if header else ()
    return ComparedFile(name, mark, tensors, reason="is missing" if mark == "-" else "is extra")


def _pair(name: str, one: Path, other: Path) -> _Pair:
    pair = _Pair(name, one, other)
    try:
        pair.one_nbytes, pair.other_nbytes = one.stat().st_size, other.stat().st_size
    except OSError as error:
        pair.error = unreadable(name, error).message
        return pair
    mine, theirs = _header(one, name), _header(other, name)
    pair.tensors = mine.tensors if mine else ()
    shorter = min(pair.one_nbytes, pair.other_nbytes)
    if mine and theirs and mine.json_bytes != theirs.json_bytes:
        _by_tensor(pair, mine, theirs)
        return pair
    if pair.one_nbytes != pair.other_nbytes:
        pair.differs_at(shorter)
        for index, tensor in enumerate(pair.tensors):
            if tensor.end > shorter:
                pair.differing.add(index)
    pair.runs.append(_Run(0, 0, shorter))
    return pair


def _by_tensor(pair: _Pair, mine: Header, theirs: Header) -> None:
    """The headers differ: each tensor is looked for by its name."""
    pair.differs_at(0)
    there = {tensor.name: tensor for tensor in theirs.tensors}
    for index, tensor in enumerate(mine.tensors):
        twin = there.pop(tensor.name, None)
        if twin is None:
            pair.fixed[tensor.name] = "-"
        elif (twin.dtype, twin.shape) != (tensor.dtype, tensor.shape):
            pair.fixed[tensor.name] = "*"
        else:
            pair.runs.append(_Run(tensor.begin, twin.begin, tensor.nbytes, index))
    pair.fixed.update(dict.fromkeys(there, "+"))


def _pieces(pairs: Sequence[_Pair]) -> Iterator[tuple[_Pair, _Run]]:
    for pair in pairs:
        for run in pair.runs:
            for at in range(0, run.nbytes, _PIECE):
                nbytes = min(_PIECE, run.nbytes - at)
                yield (
                    pair,
                    _Run(run.one_offset + at, run.other_offset + at, nbytes, run.tensor),
                )


_memory = threading.local()


def _buffers() -> tuple[memoryview, memoryview]:
    if not hasattr(_memory, "buffers"):
        _memory.buffers = memoryview(bytearray(_PIECE)), memoryview(bytearray(_PIECE))
    found: tuple[memoryview, memoryview] = _memory.buffers
    return found


def _compare(pair: _Pair, piece: _Run, on_bytes: OnBytes) -> None:
    if pair.error:
        return
    one, other = (memory[: piece.nbytes] for memory in _buffers())
    try:
        _read(pair.one, piece.one_offset, one)
        _read(pair.other, piece.other_offset, other)
    except OSError as error:
        pair.error = f"cannot be read: {(error.strerror or str(error)).lower()}"
        return
    on_bytes(piece.nbytes)

    def differs(begin: int, end: int) -> int | None:
        return first_difference(
            address_of(one[begin:end]), address_of(other[begin:end]), end - begin
        )

    first = differs(0, piece.nbytes)
    if first is None:
        return
    pair.differs_at(piece.one_offset + first, piece.tensor)
    if piece.tensor is not None:
        return
    begin_of_piece, end_of_piece = piece.one_offset, piece.one_offset + piece.nbytes
    index = bisect_right(pair.tensors, begin_of_piece + first, key=lambda tensor: tensor.end)
    while index < len(pair.tensors) and pair.tensors[index].begin < end_of_piece:
        tensor = pair.tensors[index]
        begin = max(tensor.begin, begin_of_piece) - begin_of_piece
        end = min(tensor.end, end_of_piece) - begin_of_piece
        if end > begin and index not in pair.differing and differs(begin, end) is not None:
            pair.differs_at(begin_of_piece + first, index)
        index += 1


def _read(path: Path, offset: int, into: memoryview) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while into:
            got = os.preadv(fd, [into], offset)
            if not got:
                raise OSError("it became shorter while it was compared")
            into, offset = into[got:], offset + got
    finally:
        os.close(fd)


def _compared(pair: _Pair) -> ComparedFile:
    if pair.error:
        return ComparedFile(pair.name, "!", reason=pair.error)
    marks: dict[str, Mark] = {
        tensor.name: "*" if index in pair.differing else "="
        for index, tensor in enumerate(pair.tensors)
    }
    tensors = tuple((marks | pair.fixed).items())
    if pair.offset is None:
        return ComparedFile(pair.name, "=", tensors)
    reason = f"differs at byte {pair.offset:,}"
    if pair.one_nbytes != pair.other_nbytes:
        reason = f"has {pair.other_nbytes:,} bytes, not {pair.one_nbytes:,}"
    return ComparedFile(pair.name, "*", tensors, pair.offset, reason)
