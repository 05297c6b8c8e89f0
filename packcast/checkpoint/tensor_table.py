"""The tensors of one file, in columns: a checkpoint may have hundreds of thousands of them.

As objects they would take a kilobyte each; here an object is made on access.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from operator import eq, ne
from typing import overload

DTYPE_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
MAX_RANK = 64
U64_END = 1 << 64


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


def nbytes_of(dtype: str, shape: Sequence[int]) -> int | None:
    """A tensor's size; None if it is no whole number of bytes or needs more than 64 bits."""
    num_bits = 1
    for size in (*shape, DTYPE_BITS[dtype]):
        num_bits *= size
        # At each step, as in 64-bit arithmetic: a later zero does not help.
        if num_bits >= U64_END:
            return None
    return None if num_bits % 8 else num_bits // 8


def _u64s() -> array[int]:
    return array("Q")


@dataclass(slots=True)
class Columns:
    """Tensors as a header lists them; begins and ends are offsets in the data part.

    `sizes` are all shapes one after the other, `ranks` their lengths.
    """

    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    ranks: bytearray = field(default_factory=bytearray)
    sizes: array[int] = field(default_factory=_u64s)
    begins: array[int] = field(default_factory=_u64s)
    ends: array[int] = field(default_factory=_u64s)

    def first_gap(self) -> int | None:
        """The first tensor that does not begin where the one before it ends."""
        expected = array("Q", [0])
        expected.extend(self.ends[:-1])
        if self.begins[: len(expected)] == expected:
            return None
        return next(compress(range(len(self.begins)), map(ne, self.begins, expected)), None)

    def in_file_order(self) -> Columns:
        """The same by begin, end and name."""
        begins, ends, names = self.begins, self.ends, self.names
        if self.first_gap() is None and not any(map(eq, begins, ends)):
            return self
        order = sorted(range(len(names)), key=lambda i: (begins[i], ends[i], names[i]))
        starts = [0, *accumulate(self.ranks)]
        sizes = _u64s()
        for i in order:
            sizes += self.sizes[starts[i] : starts[i + 1]]
        return Columns(
            [names[i] for i in order],
            [self.dtypes[i] for i in order],
            bytearray(self.ranks[i] for i in order),
            sizes,
            array("Q", (begins[i] for i in order)),
            array("Q", (ends[i] for i in order)),
        )


class Tensors(Sequence[Tensor]):
    """The tensors of a valid file, in its order; each ends where the next begins."""

    __slots__ = ("_bounds", "_dtypes", "_sizes", "_starts", "names")

    def __init__(self, columns: Columns, data_begin: int, data_nbytes: int) -> None:
        """Of columns in the file's order, without a gap."""
        self.names: Sequence[str] = columns.names
        self._dtypes = columns.dtypes
        self._sizes = columns.sizes
        self._starts = array("Q", accumulate(columns.ranks, initial=0))
        self._bounds = array("Q", [data_begin + begin for begin in columns.begins])
        self._bounds.append(data_begin + data_nbytes)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, at: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        shape = tuple(self._sizes[self._starts[at] : self._starts[at + 1]])
        begin, end = self._bounds[at : at + 2]
        return Tensor(self.names[at], self._dtypes[at], shape, begin, end)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensors):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def at(self, offset: int) -> Tensor | None:
        """The one that the byte at `offset` of the file belongs to."""
        if not self._bounds[0] <= offset < self._bounds[-1]:
            return None
        return self[bisect_right(self._bounds, offset) - 1]
