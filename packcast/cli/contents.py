"""What `inspect` and `--dry-run` say alike of files that are sent: sizes, dtypes, the largest.

Pure functions, out of names, sizes and headers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from packcast.checkpoint.header import Header
from packcast.checkpoint.leftout import LeftOut
from packcast.checkpoint.tensor_table import Tensor
from packcast.cli.result import count
from packcast.cli.tables import exact, table
from packcast.cli.terminal import printable
from packcast.units import format_size

_MAX_LEFT_OUT = 12


class Listed(Protocol):
    """A file of a checkpoint, or one that goes out."""

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def header(self) -> Header | None: ...


@dataclass(slots=True)
class Tally:
    """How many tensors, and their bytes."""

    tensors: int = 0
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        self.tensors += 1
        self.nbytes += nbytes


class Contents:
    """All that is counted, in one pass over the tensors."""

    def __init__(self, files: Sequence[Listed]) -> None:
        self.files = files
        self.nbytes = sum(file.nbytes for file in files)
        self.by_dtype: dict[str, Tally] = {}
        self.dtypes_of: list[dict[str, int]] = []
        self.largest: tuple[Tensor, str] | None = None
        most = -1
        for file in files:
            mine: dict[str, int] = {}
            for tensor in file.header.tensors if file.header else ():
                nbytes = tensor.end - tensor.begin
                dtype = tensor.dtype
                mine[dtype] = mine.get(dtype, 0) + 1
                tally = self.by_dtype.get(dtype)
                if tally is None:
                    tally = self.by_dtype[dtype] = Tally()
                tally.add(nbytes)
                if nbytes > most:
                    most, self.largest = nbytes, (tensor, file.name)
            self.dtypes_of.append(dict(sorted(mine.items(), key=lambda it: -it[1])))

    @property
    def num_tensors(self) -> int:
        return sum(tally.tensors for tally in self.by_dtype.values())

    def files_table(self) -> str:
        """A line for each file."""
        rows = [
            (
                file.name,
                kind_of_file(file),
                format_size(file.nbytes),
                f"{len(file.header.tensors):,}" if file.header else "",
                ", ".join(f"{number:,} {dtype}" for dtype, number in dtypes.items()),
            )
            for file, dtypes in zip(self.files, self.dtypes_of, strict=True)
        ]
        return table(("file", "kind", ">size", ">tensors", "dtypes"), rows)

    def totals(self) -> str:
        """The whole, then by dtype, then the largest tensor."""
        lines = [
            f"{count(len(self.files), 'file')}, {count(self.num_tensors, 'tensor')}, "
            f"{format_size(self.nbytes)} ({exact(self.nbytes)} bytes)"
        ]
        if self.by_dtype:
            rows = [
                (dtype, count(tally.tensors, "tensor"), format_size(tally.nbytes))
                for dtype, tally in sorted(self.by_dtype.items(), key=lambda it: -it[1].nbytes)
            ]
            lines.append(table(("", ">", ">"), rows))
        if self.largest:
            tensor, file = self.largest
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            lines.append(
                f"largest tensor: {printable(tensor.name)}, {tensor.dtype} {shape}, "
                f"{format_size(tensor.nbytes)}, in {file}"
            )
        return "\n".join(lines)

    def document(self) -> dict[str, object]:
        """The same for machines, as fields of `checkpoint`."""
        largest = None
        if self.largest:
            tensor, file = self.largest
            largest = {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "file": file,
            }
        return {
            "files": len(self.files),
            "tensors": self.num_tensors,
            "bytes": self.nbytes,
            "dtypes": {
                dtype: {"tensors": tally.tensors, "bytes": tally.nbytes}
                for dtype, tally in self.by_dtype.items()
            },
            "largest_tensor": largest,
        }


def kind_of_file(file: Listed) -> str:
    """Shard or sidecar."""
    return "shard" if file.header else "sidecar"


def left_out_lines(found: Sequence[LeftOut]) -> str:
    """What is not sent and why, by reason; empty where all is."""
    by_reason: dict[str, list[str]] = {}
    for it in found:
        by_reason.setdefault(it.reason, []).append(it.name)
    lines = []
    for reason, names in by_reason.items():
        more = len(names) - _MAX_LEFT_OUT
        text = ", ".join(names[:_MAX_LEFT_OUT]) + (f" and {more:,} more" if more > 0 else "")
        lines.append(f"  {reason}: {text}")
    return "\n".join(["not sent:", *lines]) if lines else ""
