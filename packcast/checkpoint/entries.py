"""Parses the JSON of a header into columns, in one of two ways with the same result.

`usual` parses what safetensors and `json.dumps` write, with a few bytes of memory and less than two
microseconds for each tensor. `strict` parses any JSON and reports errors, but needs ten times as
much of both, so its limits are tighter.
"""

from __future__ import annotations

import re
from array import array
from itertools import chain
from operator import eq, sub

from packcast.checkpoint.header_limits import HeaderLimits
from packcast.checkpoint.reading import shown, strict_json
from packcast.checkpoint.tensor_table import DTYPE_BITS, MAX_RANK, U64_END, Columns, nbytes_of
from packcast.errors import CheckpointError

_METADATA_KEY = "__metadata__"
_PART_NBYTES = 1 << 18  # what is taken at a time, so that the pieces of an entry are few
_MAX_SHAPES = 10_000

_NUMBER = rb"(?:0|[1-9][0-9]{0,19}+)"
_ENTRY = re.compile(
    rb'"([^"\\\x00-\x1f]*+)": ?'
    rb'\{"dtype": ?"([A-Z0-9_]++)", ?'
    rb'"shape": ?\[((?:%b(?:, ?%b)*+)?+)\], ?'
    rb'"data_offsets": ?\[(%b), ?(%b)\]\}' % ((_NUMBER,) * 4)
)
_SEPARATORS = frozenset({b",", b", "})
_SPACE = b" \t\r\n"

Found = tuple[Columns, dict[str, str]]


class _Shapes(dict[tuple[bytes, bytes], tuple[tuple[int, ...], int | None]]):
    """A cache by dtype and shape as written: the sizes, and the bytes."""

    def __missing__(self, key: tuple[bytes, bytes]) -> tuple[tuple[int, ...], int | None]:
        if len(self) >= _MAX_SHAPES:
            self.clear()
        dtype, shape = key[0].decode(), tuple(map(int, key[1].split(b","))) if key[1] else ()
        nbytes = None
        if dtype in DTYPE_BITS and len(shape) <= MAX_RANK:
            nbytes = nbytes_of(dtype, shape)
        self[key] = found = shape, nbytes
        return found


def usual(json_bytes: bytes, limits: HeaderLimits, where: str) -> Found | None:
    """The tensors and the metadata of a header in the usual form; else None.

    The header is cut between entries, each of which is a JSON member; if there are only commas
    between them, the header is a JSON object of exactly these members.
    """
    first, end = json_bytes.find(b'{"'), json_bytes.rfind(b"}")
    if first < 0 or (json_bytes[:first] + json_bytes[end + 1 :]).strip(_SPACE):
        return None
    columns, shapes, metadata = Columns(), _Shapes(), dict[str, str]()
    at = first = first + 1
    while at < end:
        cut = json_bytes.find(b"]}", at + _PART_NBYTES, end)
        cut = end if cut < 0 else cut + 2
        between, *fields = _columns_of(_ENTRY.split(json_bytes[at:cut]))
        if at == first and between[0]:  # the metadata, which comes before all tensors
            member = between[0].rstrip(b" ")
            if not member.startswith(b'"__metadata__":') or not member.endswith(b","):
                return None
            limits.take_strict(member, where)
            content = _object(b"{" + member[:-1] + b"}", where)
            if content is None:
                return None
            metadata = metadata_of(content.pop(_METADATA_KEY), where)
        elif between[0] not in (_SEPARATORS if at > first else (b"",)):
            return None
        if between[-1] or not _SEPARATORS.issuperset(between[1:-1]):
            return None
        if not _add(columns, shapes, fields):
            return None
        limits.check_sizes(len(columns.sizes), where)
        at = cut
    return None if _METADATA_KEY in columns.names else (columns, metadata)


def _columns_of(parts: list[bytes]) -> list[list[bytes]]:
    """The result of `split`: the text between the entries, and their five fields."""
    return [parts[i::6] for i in range(6)]


def _object(data: bytes, where: str) -> dict[str, object] | None:
    """A JSON object of the metadata alone; None if it is invalid or something else."""
    try:
        content = strict_json(data, where)
    except CheckpointError:
        return None
    return content if isinstance(content, dict) and content.keys() == {_METADATA_KEY} else None


def _add(columns: Columns, shapes: _Shapes, fields: list[list[bytes]]) -> bool:
    """Add entries to the columns; False if one is invalid."""
    names, dtypes, sizes, begins, ends = fields
    if not names:
        return False
    found = [shapes[key] for key in zip(dtypes, sizes, strict=True)]
    try:
        # No name holds a control character, so a line each is one decoding for all.
        columns.names += b"\n".join(names).decode().split("\n")
        columns.ranks += bytes(len(shape) for shape, _ in found)
        columns.sizes.extend(chain.from_iterable(shape for shape, _ in found))
        first, last = array("Q", map(int, begins)), array("Q", map(int, ends))
    except (OverflowError, ValueError):  # UnicodeDecodeError is one
        return False
    if not all(map(eq, (nbytes for _, nbytes in found), map(sub, last, first))):
        return False
    columns.dtypes += [_DTYPES[dtype] for dtype in dtypes]
    columns.begins += first
    columns.ends += last
    return True


_DTYPES = {dtype.encode(): dtype for dtype in DTYPE_BITS}


def strict(json_bytes: bytes, where: str) -> Found:
    """The tensors and the metadata of any header; raises CheckpointError, naming the tensor."""
    content = strict_json(json_bytes, f"{where}: header")
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: header is not a JSON object")
    metadata = metadata_of(content.pop(_METADATA_KEY, None), where)
    columns = Columns()
    for name, entry in content.items():
        _add_strictly(columns, name, entry, where)
    return columns, metadata


def metadata_of(content: object, where: str) -> dict[str, str]:
    """A header's metadata; raises CheckpointError unless it maps strings to strings."""
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise CheckpointError(f"{where}: {_METADATA_KEY} is not a map of strings to strings")
    if not all(_is_utf8(text) for pair in content.items() for text in pair):
        raise CheckpointError(f"{where}: {_METADATA_KEY} has a character that is not valid Unicode")
    return content


def _add_strictly(columns: Columns, name: str, entry: object, where: str) -> None:
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
    nbytes = nbytes_of(dtype, shape)
    if nbytes is None:
        raise bad(f"shape {shown(shape)} of {dtype} is not a whole number of bytes, or too large")
    if nbytes != end - begin:
        raise bad(
            f"shape {shown(shape)} of {dtype} takes {nbytes} bytes, its offsets {end - begin}"
        )
    columns.names.append(name)
    columns.dtypes.append(dtype)
    columns.ranks.append(len(shape))
    columns.sizes.extend(shape)
    columns.begins.append(begin)
    columns.ends.append(end)


def _is_u64(value: object) -> bool:
    return type(value) is int and 0 <= value < U64_END  # a bool is an int only to isinstance


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON's \u can write
        return False
    return True
