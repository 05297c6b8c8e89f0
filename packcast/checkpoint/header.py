"""The header of a safetensors file: dtypes in bits, parsing, every rule of the format.

Works on bytes that may be hostile (a receiver parses what it was sent); knows nothing of
directories, indexes or other files.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.reading import (
    open_regular,
    read_exactly,
    shown,
    strict_json,
    what_it_is,
)
from packcast.errors import CheckpointError

DTYPE_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_RANK = 64

# What a header may make us allocate before its content can be judged: each JSON value beyond the
# first few comes with one of these characters. A million tensors of rank 8 have 14 million.
_MAX_SEPARATORS = 16 * MAX_TENSORS
_U64_END = 1 << 64
_METADATA_KEY = "__metadata__"
_AGAIN = "copy or download it again"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file; `begin` and `end` are offsets in the file, not in its data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header: its tensors cover the data part without holes or overlap.

    `tensors` are in the file's order (begin, end, name), so an empty tensor comes before the one
    that begins at the same byte. `json_bytes` are as in the file, without the 8 length bytes.
    """

    tensors: tuple[Tensor, ...]
    data_begin: int
    file_nbytes: int
    json_bytes: bytes
    metadata: dict[str, str]

    def tensor_at(self, offset: int) -> Tensor | None:
        """The tensor that the byte at `offset` of the file belongs to; None in the header."""
        if not self.data_begin <= offset < self.file_nbytes:
            return None
        return self.tensors[bisect_right(self.tensors, offset, key=lambda tensor: tensor.begin) - 1]


def read_header(path: Path, where: str | None = None) -> Header:
    """Reads and checks the header of the file at `path`; `where` names it in messages.

    Raises CheckpointError, also where the file cannot be read or is no regular file.
    """
    where = str(path) if where is None else where
    with open_regular(path, where) as (fd, file_nbytes):
        head = read_exactly(fd, min(file_nbytes, 64), 0, where)
        nbytes = _header_nbytes(head, file_nbytes, where)
        json_bytes = read_exactly(fd, nbytes, LENGTH_NBYTES, where)
    return parse_header(json_bytes, file_nbytes, where)


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


def parse_header(json_bytes: bytes, file_nbytes: int, where: str) -> Header:
    """Checks a header (without its 8 length bytes) of a file of `file_nbytes` bytes.

    Raises CheckpointError, and nothing else, naming `where` and the tensor. Stricter than
    safetensors 0.8 in one point: a name that occurs twice is refused also where the offsets agree.
    """
    _check_room(len(json_bytes), file_nbytes, where)
    if json_bytes.count(b'"data_offsets"') > MAX_TENSORS:
        raise CheckpointError(f"{where}: more than {MAX_TENSORS} tensors")
    if sum(map(json_bytes.count, (b",", b"[", b"{"))) > _MAX_SEPARATORS:
        raise CheckpointError(f"{where}: header holds more than a million tensors need")
    content = strict_json(json_bytes, f"{where}: header")
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: header is not a JSON object")
    metadata = _metadata(content.pop(_METADATA_KEY, None), where)
    if len(content) > MAX_TENSORS:
        raise CheckpointError(f"{where}: more than {MAX_TENSORS} tensors")
    data_begin = LENGTH_NBYTES + len(json_bytes)
    tensors = [_tensor(name, entry, data_begin, where) for name, entry in content.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end, tensor.name))
    _check_layout(tensors, data_begin, file_nbytes, where)
    return Header(tuple(tensors), data_begin, file_nbytes, json_bytes, metadata)


def _metadata(content: object, where: str) -> dict[str, str]:
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise CheckpointError(f"{where}: {_METADATA_KEY} is not a map of strings to strings")
    if not all(_is_utf8(text) for pair in content.items() for text in pair):
        raise CheckpointError(f"{where}: {_METADATA_KEY} has a character that is not valid Unicode")
    return content


def _tensor(name: str, entry: object, data_begin: int, where: str) -> Tensor:
    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{where}: tensor {shown(name)}: {why}")

    if not _is_utf8(name):
        raise bad("its name has a character that is not valid Unicode")
    if not isinstance(entry, dict):
        raise bad("its entry is not a JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_u64, shape)):
        raise bad(f"shape {shown(shape)} is not a list of sizes")
    if len(shape) > MAX_RANK:
        raise bad(f"more than {MAX_RANK} dimensions")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_u64, offsets)):
        raise bad(f"data_offsets {shown(offsets)} are not two offsets")
    begin, end = offsets
    if begin > end:
        raise bad(f"ends at {end}, before its begin at {begin}")
    nbytes = _nbytes_of(dtype, shape)
    if nbytes is None:
        raise bad(f"shape {shown(shape)} of {dtype} is not a whole number of bytes, or too large")
    if nbytes != end - begin:
        raise bad(
            f"shape {shown(shape)} of {dtype} takes {nbytes} bytes, its offsets {end - begin}"
        )
    return Tensor(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _nbytes_of(dtype: str, shape: list[int]) -> int | None:
    num_bits = 1
    for size in (*shape, DTYPE_BITS[dtype]):
        num_bits *= size
        # At each step, as others compute it in 64 bits: a zero that comes later saves nothing.
        if num_bits >= _U64_END:
            return None
    return None if num_bits % 8 else num_bits // 8


def _check_layout(tensors: list[Tensor], data_begin: int, file_nbytes: int, where: str) -> None:
    expected = data_begin
    for tensor in tensors:
        if tensor.begin != expected:
            what = "overlaps the one before" if tensor.begin < expected else "leaves a hole before"
            raise CheckpointError(
                f"{where}: tensor {shown(tensor.name)} {what} it: begins at data offset "
                f"{tensor.begin - data_begin} instead of {expected - data_begin}"
            )
        expected = tensor.end
    if file_nbytes < expected:
        raise CheckpointError(
            f"{where}: truncated: {file_nbytes} bytes, expected {expected}", hint=_AGAIN
        )
    if file_nbytes > expected:
        raise CheckpointError(
            f"{where}: {file_nbytes} bytes, expected {expected}: "
            f"{file_nbytes - expected} bytes at its end belong to no tensor",
            hint=_AGAIN,
        )


def _is_u64(value: object) -> bool:
    return type(value) is int and 0 <= value < _U64_END  # a bool is an int only to isinstance


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON's \u can write
        return False
    return True
