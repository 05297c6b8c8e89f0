"""How much the headers of a checkpoint may hold, all together: bounds, and what is left of them.

A header costs its reader time and memory before there is any reason to trust it. At these bounds
it is 2 s and 200 MB, on either end of a transfer, whatever is in it. The largest checkpoints known
have 91,000 tensors (12 MB of headers), and 207,000 where each weight is packed with two others.
"""

from __future__ import annotations

from dataclasses import dataclass

from packcast.checkpoint.tensor_table import Columns
from packcast.errors import CheckpointError

MAX_HEADERS_NBYTES = 48 << 20
MAX_TENSORS = 400_000
MAX_SIZES = 5 * MAX_TENSORS  # in all shapes
# Of headers that are not written as usual, see `entries`: the JSON in UTF-8, and the commas, colons
# and opening brackets in it, of which every value but the first needs one.
MAX_STRICT_NBYTES = 16 << 20
MAX_STRICT_MARKS = 1_200_000

_IN_PARTS = "send it in parts: --exclude-files leaves shards out"


@dataclass(slots=True)
class HeaderLimits:
    """What the shards of one checkpoint that are still to be parsed may have."""

    nbytes: int = MAX_HEADERS_NBYTES
    num_tensors: int = MAX_TENSORS
    num_sizes: int = MAX_SIZES
    strict_nbytes: int = MAX_STRICT_NBYTES
    strict_marks: int = MAX_STRICT_MARKS

    def check_bytes(self, nbytes: int, where: str) -> None:
        """Before a header is read: raises CheckpointError where it is too long."""
        if nbytes > self.nbytes:
            raise _too_much(where, f"{MAX_HEADERS_NBYTES:,} bytes of headers")

    def check_tensors(self, num_tensors: int, where: str) -> None:
        """Before they are parsed, as far as they can be counted."""
        if num_tensors > self.num_tensors:
            raise _too_much(where, f"{MAX_TENSORS:,} tensors")

    def check_sizes(self, num_sizes: int, where: str) -> None:
        """While shapes are parsed."""
        if num_sizes > self.num_sizes:
            raise _too_much(where, f"{MAX_SIZES:,} dimensions")

    def take_strict(self, data: bytes, where: str) -> None:
        """Before bytes are parsed as any JSON."""
        num_marks = sum(map(data.count, (b",", b":", b"[", b"{")))
        if len(data) > self.strict_nbytes or num_marks > self.strict_marks:
            raise CheckpointError(
                f"{where}: a large header that is not as safetensors writes it, or not valid",
                hint="save it again with the safetensors library",
            )
        self.strict_nbytes -= len(data)
        self.strict_marks -= num_marks

    def take(self, nbytes: int, columns: Columns, where: str) -> None:
        """A header of that length turned out to hold this."""
        self.check_tensors(len(columns.names), where)
        self.check_sizes(len(columns.sizes), where)
        self.nbytes -= nbytes
        self.num_tensors -= len(columns.names)
        self.num_sizes -= len(columns.sizes)


def _too_much(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: the checkpoint has more than {what}", hint=_IN_PARTS)
