"""Limits for the headers of a checkpoint together, since a header may be hostile.

At these limits parsing takes 2 s and 200 MB, on either end of a transfer. The largest checkpoints
known have 91,000 tensors (12 MB of headers), and 207,000 where each weight has two others beside.
"""

from __future__ import annotations

from dataclasses import dataclass

from packcast.checkpoint.tensor_table import Columns
from packcast.errors import CheckpointError

MAX_HEADERS_NBYTES = 48 << 20
MAX_TENSORS = 400_000
MAX_SIZES = 5 * MAX_TENSORS  # in all shapes
# For headers in unusual JSON, see `entries`: bytes, and commas, colons and opening brackets, of
# which every value but the first needs one.
MAX_STRICT_NBYTES = 16 << 20
MAX_STRICT_MARKS = 1_200_000

_IN_PARTS = "send it in parts: --exclude-files leaves shards out"


@dataclass(slots=True)
class HeaderLimits:
    """What remains for the shards of one checkpoint that are still to be parsed."""

    nbytes: int = MAX_HEADERS_NBYTES
    num_tensors: int = MAX_TENSORS
    num_sizes: int = MAX_SIZES
    strict_nbytes: int = MAX_STRICT_NBYTES
    strict_marks: int = MAX_STRICT_MARKS

    def check_bytes(self, nbytes: int, where: str) -> None:
        """Before a header is read. This and the others raise CheckpointError."""
        if nbytes > self.nbytes:
            raise _too_much(where, f"{MAX_HEADERS_NBYTES:,} bytes of headers")

    def check_tensors(self, num_tensors: int, where: str) -> None:
        """Before they are parsed, with a lower bound of their number."""
        if num_tensors > self.num_tensors:
            raise _too_much(where, f"{MAX_TENSORS:,} tensors")

    def check_sizes(self, num_sizes: int, where: str) -> None:
        """While shapes are parsed."""
        if num_sizes > self.num_sizes:
            raise _too_much(where, f"{MAX_SIZES:,} dimensions")

    def take_strict(self, data: bytes, where: str) -> None:
        """Before `data` is parsed as any JSON."""
        num_marks = sum(map(data.count, (b",", b":", b"[", b"{")))
        if len(data) > self.strict_nbytes or num_marks > self.strict_marks:
            raise CheckpointError(
                f"{where}: a large header that is not as safetensors writes it, or not valid",
                hint="save it again with the safetensors library",
            )
        self.strict_nbytes -= len(data)
        self.strict_marks -= num_marks

    def take(self, nbytes: int, columns: Columns, where: str) -> None:
        """After a header of `nbytes` has been parsed."""
        self.check_tensors(len(columns.names), where)
        self.check_sizes(len(columns.sizes), where)
        self.nbytes -= nbytes
        self.num_tensors -= len(columns.names)
        self.num_sizes -= len(columns.sizes)


def _too_much(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: the checkpoint has more than {what}", hint=_IN_PARTS)
