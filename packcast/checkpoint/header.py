"""Reads and checks the header of a safetensors file by every rule of the format.

The bytes may be hostile: receivers parse headers too. Knows no directories, indexes or other files.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.entries import strict, usual
from packcast.checkpoint.header_limits import HeaderLimits
from packcast.checkpoint.reading import open_regular, read_exactly, shown, what_it_is
from packcast.checkpoint.tensor_table import Columns, Tensor, Tensors
from packcast.errors import CheckpointError

LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 100_000_000  # the format's own bound, for one file

_AGAIN = "copy or download it again"


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header: its tensors cover the data part without holes or overlap.

    `tensors` are ordered by begin, end, name, so an empty tensor comes before the one that begins
    at the same byte. `json_bytes` are as in the file, without the 8 length bytes.
    """

    tensors: Tensors
    data_begin: int
    file_nbytes: int
    json_bytes: bytes
    metadata: dict[str, str]

    def tensor_at(self, offset: int) -> Tensor | None:
        """The tensor that the byte at `offset` of the file belongs to; None in the header."""
        return self.tensors.at(offset)


def read_header(path: Path, where: str | None = None) -> Header:
    """The header of the file at `path`; `where` names it in messages.

    Raises CheckpointError, also where the file cannot be read or is no regular file.
    """
    where = str(path) if where is None else where
    with open_regular(path.resolve(), where) as (fd, file_nbytes):
        return header_of(fd, file_nbytes, where, HeaderLimits())


def header_of(fd: int, file_nbytes: int, where: str, limits: HeaderLimits) -> Header:
    """The header of an open file."""
    head = read_exactly(fd, min(file_nbytes, 64), 0, where)
    nbytes = _header_nbytes(head, file_nbytes, where)
    limits.check_bytes(nbytes, where)
    json_bytes = read_exactly(fd, nbytes, LENGTH_NBYTES, where)
    return parse_header(json_bytes, file_nbytes, where, limits)


def _header_nbytes(head: bytes, file_nbytes: int, where: str) -> int:
    if not head:
        raise CheckpointError(f"{where}: not a safetensors file: it is empty", hint=_AGAIN)
    nbytes: int = struct.unpack("<Q", head[:8].ljust(8, b"\xff"))[0]
    # A length within bounds ends in four zero bytes, so no text or archive is mistaken for one.
    if nbytes > MAX_HEADER_NBYTES:
        what, hint = what_it_is(head) or ("its first 8 bytes are no header length", _AGAIN)
        if file_nbytes < LENGTH_NBYTES:
            what = f"it has only {file_nbytes} bytes"
        raise CheckpointError(f"{where}: not a safetensors file: {what}", hint=hint)
    if nbytes == 0:
        what = "it begins with zeros, as an unfinished download does"
        raise CheckpointError(f"{where}: not a safetensors file: {what}", hint=_AGAIN)
    _check_room(nbytes, file_nbytes, where)
    return nbytes


def _check_room(header_nbytes: int, file_nbytes: int, where: str) -> None:
    if header_nbytes > MAX_HEADER_NBYTES:
        raise CheckpointError(f"{where}: header of more than {MAX_HEADER_NBYTES} bytes")
    if LENGTH_NBYTES + header_nbytes > file_nbytes:
        raise CheckpointError(
            f"{where}: truncated: {file_nbytes} bytes, "
            f"but its header alone needs {LENGTH_NBYTES + header_nbytes}",
            hint=_AGAIN,
        )


def parse_header(
    json_bytes: bytes, file_nbytes: int, where: str, limits: HeaderLimits | None = None
) -> Header:
    """Parse a header (without its 8 length bytes) of a file of `file_nbytes` bytes.

    `limits` are shared by all shards of a checkpoint. Raises CheckpointError, and nothing else,
    naming `where` and the tensor. `tests/checkpoint/fuzz.py` lists differences to safetensors 0.8.
    """
    limits = limits or HeaderLimits()
    _check_room(len(json_bytes), file_nbytes, where)
    limits.check_bytes(len(json_bytes), where)
    limits.check_tensors(json_bytes.count(b'"data_offsets"'), where)
    found = usual(json_bytes, limits, where)
    if found is None:
        limits.take_strict(json_bytes, where)
        found = strict(json_bytes, where)
    columns, metadata = found
    limits.take(len(json_bytes), columns, where)
    if len(set(columns.names)) != len(columns.names):
        twice = Counter(columns.names).most_common(1)[0][0]
        raise CheckpointError(f"{where}: header names {shown(twice)} twice")
    data_begin = LENGTH_NBYTES + len(json_bytes)
    columns = columns.in_file_order()
    _check_layout(columns, file_nbytes - data_begin, file_nbytes, where)
    tensors = Tensors(columns, data_begin, file_nbytes - data_begin)
    return Header(tensors, data_begin, file_nbytes, json_bytes, metadata)


def _check_layout(columns: Columns, data_nbytes: int, file_nbytes: int, where: str) -> None:
    gap = columns.first_gap()
    if gap is not None:
        begin, expected = columns.begins[gap], columns.ends[gap - 1] if gap else 0
        what = "overlaps the one before" if begin < expected else "leaves a hole before"
        raise CheckpointError(
            f"{where}: tensor {shown(columns.names[gap])} {what} it: begins at data offset "
            f"{begin} instead of {expected}"
        )
    missing = (columns.ends[-1] if columns.ends else 0) - data_nbytes
    if missing > 0:
        raise CheckpointError(
            f"{where}: truncated: {file_nbytes} bytes, expected {file_nbytes + missing}",
            hint=_AGAIN,
        )
    if missing < 0:
        raise CheckpointError(
            f"{where}: {file_nbytes} bytes, expected {file_nbytes + missing}: "
            f"{-missing} bytes at its end belong to no tensor",
            hint=_AGAIN,
        )
