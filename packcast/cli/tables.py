"""Plain tables for standard output: aligned columns, no colours, the same in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packcast.cli.terminal import printable


@dataclass(frozen=True, slots=True)
class Listing:
    """The result of `inspect` or `--dry-run`: text, JSON document, warnings."""

    text: str
    document: dict[str, object]
    warnings: tuple[str, ...]


def exact(nbytes: int) -> str:
    """Every digit, in groups of three."""
    return f"{nbytes:,}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; a title that begins with `>` aligns to the right.

    Titles that are all empty make no line. Cells are made safe for a terminal, on one line each.
    """
    right = [title.startswith(">") for title in titles]
    head = [title.removeprefix(">") for title in titles]
    cells = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    lines = [head, *cells] if any(head) else cells
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(head))]

    def align(line: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(map(align, lines))
