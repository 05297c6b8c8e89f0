"""What a person reads of a bench: header, limits, rows, heat maps, as lines with styles.

Pure; a line is the same with and without colour. Knows no terminal but its width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from packcast.bench.export import gigabytes
from packcast.bench.results import (
    Results,
    buffer_words,
    facts,
    limit_label,
    share_of_limit,
    warning_lines,
)
from packcast.bench.rows import Row, grouped
from packcast.cli.terminal import printable
from packcast.units import format_exact_size, format_size

BEST, BAD, TITLE, DIM = "bold green", "red", "bold", "dim"
MARK = "*"
_GAP = "  "
# Dark to bright, told apart by everyone: the colour map `cividis` of Nunez and others (2018).
_SCALE = (
    (0, 34, 78),
    (53, 69, 108),
    (102, 105, 112),
    (148, 142, 119),
    (200, 182, 102),
    (253, 231, 55),
)


@dataclass(frozen=True, slots=True)
class Line:
    """Pieces of text, each with a rich style or none."""

    spans: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """Without styles."""
        return "".join(text for text, _ in self.spans).rstrip()


@dataclass(frozen=True, slots=True)
class _Column:
    """`keep`: columns with a small one go first where the terminal is narrow."""

    title: str
    to_right: bool
    keep: int
    cells: tuple[str, ...]

    @property
    def width(self) -> int:
        return max(len(self.title), *map(len, self.cells))


def line(text: str = "", style: str = "") -> Line:
    """One line, safe for a terminal."""
    return Line(((printable(text).replace("\n", "\\n"), style),))


def all_lines(results: Results, width: int | None) -> list[Line]:
    """Everything, from the command line to the warnings; `width` None: as wide as it must be."""
    blocks = [header_lines(results), limit_lines(results), row_lines(results, width)]
    blocks += [heat_map(rows) for rows in _maps(results.rows)]
    blocks.append(closing_lines(results, width))
    lines: list[Line] = []
    for block in blocks:
        if block:
            lines += [*([line()] if lines else []), *block]
    return lines


def header_lines(results: Results) -> list[Line]:
    """The command and where it ran."""
    lines = [line(results.command_line, TITLE)]
    found = facts(results.environment) if results.environment else []
    lines += [line(f"{what:<9} {words}", DIM) for what, words in found]
    return lines


def limit_lines(results: Results) -> list[Line]:
    """What the hardware does."""
    if not results.limits:
        return []
    names = ["limit", *map(limit_label, results.limits)]
    rates = ["GB/s", *(gigabytes(limit.bytes_per_second) for limit in results.limits)]
    how = ["", *(limit.detail for limit in results.limits)]
    wide, number = max(map(len, names)), max(map(len, rates))
    lines = [
        f"{name:<{wide}}{_GAP}{rate:>{number}}{_GAP}{detail}"
        for name, rate, detail in zip(names, rates, how, strict=True)
    ]
    return [line(text.rstrip(), DIM if index == 0 else "") for index, text in enumerate(lines)]


def row_lines(results: Results, width: int | None) -> list[Line]:
    """A table per combination of shape, source and sink, all with the same columns."""
    if not results.rows:
        return []
    columns, left_out = _fitting(_columns(results.rows), width)
    places = {id(row): index for index, row in enumerate(results.rows)}
    lines: list[Line] = []
    for (shape, source, sink), rows in grouped(results.rows).items():
        size = format_size(max(row.nbytes for row in rows))
        lines += [line()] if lines else []
        lines.append(line(f"{shape}, {source} to {sink}, {size}", TITLE))
        lines.append(line(_GAP.join(_pad(column, column.title) for column in columns), DIM))
        lines += [_row_line(row, columns, places[id(row)], width) for row in rows]
    if left_out:
        names = ", ".join(left_out)
        words = f"(no room for {names}; a wider terminal shows them)"
        lines += [line(), *(line(text, DIM) for text in _wrapped(words, width))]
    return lines


def _row_line(row: Row, columns: Sequence[_Column], place: int, width: int | None) -> Line:
    cells = [_pad(column, column.cells[place]) for column in columns]
    if row.failure is not None:
        # What was asked for, then the reason right across the columns of what was found.
        asked = [cell for cell, column in zip(cells, columns, strict=True) if column.keep == _ASKED]
        text = _GAP.join([*asked, f"- {row.failure}"])
        return line(text if width is None else text[:width], BAD)
    style = BAD if row.wrong else BEST if row.is_best else "" if row.is_ours else DIM
    return line(_GAP.join(cells).rstrip(), style)


def _pad(column: _Column, cell: str) -> str:
    return cell.rjust(column.width) if column.to_right else cell.ljust(column.width)


_ASKED = 99


def _columns(rows: Sequence[Row]) -> list[_Column]:
    columns = [
        _Column("  method", False, _ASKED, tuple(_marked(row) for row in rows)),
    ]
    if any(row.case.readers > 1 for row in rows):
        counts = tuple(str(row.case.readers) for row in rows)
        columns.append(_Column("readers", True, _ASKED, counts))
    sizes, numbers = zip(*(buffer_words(row.case) for row in rows), strict=True)
    columns += [
        _Column("buffer", True, _ASKED, sizes),
        _Column("count", True, _ASKED, numbers),
        _Column("GB/s", True, 90, tuple(_rate(row) for row in rows)),
        _Column("min - max", True, 4, tuple(_spread(row) for row in rows)),
        _Column(
            "cv", True, 3, tuple(f"{row.seconds.cv:.1%}" if row.seconds else "" for row in rows)
        ),
        _Column("of limit", False, 80, tuple(_limit(row) for row in rows)),
        _Column("x", True, 81, tuple(_ratio(row) for row in rows)),
        _Column("wrong", True, 82, tuple(str(row.wrong) if row.seconds else "" for row in rows)),
        _Column("waiting on", False, 79, tuple(_waiting(row) for row in rows)),
        _Column("device", True, 2, tuple(_memory(row.peak_device_nbytes) for row in rows)),
        _Column("pinned", True, 1, tuple(_memory(row.peak_pinned_nbytes) for row in rows)),
    ]
    return [column for column in columns if any(column.cells)]


def _fitting(columns: list[_Column], width: int | None) -> tuple[list[_Column], list[str]]:
    """The columns that fit, and the titles of those that do not."""
    kept, left_out = list(columns), []
    while width is not None and _total(kept) > width:
        least = min(kept, key=lambda column: column.keep)
        if least.keep == _ASKED:
            break
        kept.remove(least)
        left_out.append(least.title)
    return kept, left_out


def _total(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + len(_GAP) * (len(columns) - 1)


def _marked(row: Row) -> str:
    return f"{MARK if row.is_best else ' '} {row.case.method}"


def _rate(row: Row) -> str:
    return gigabytes(row.bytes_per_second) if row.bytes_per_second is not None else ""


def _spread(row: Row) -> str:
    if row.seconds is None or not row.seconds.min:
        return ""
    slow, fast = row.nbytes / row.seconds.max, row.nbytes / row.seconds.min
    return f"{gigabytes(slow)} - {gigabytes(fast)}"


def _limit(row: Row) -> str:
    return f"{row.limit.fraction:>4.0%} {row.limit.stage}" if row.limit else ""


def _ratio(row: Row) -> str:
    return f"{row.ratio_to_original:.2f}" if row.ratio_to_original is not None else ""


def _waiting(row: Row) -> str:
    return f"{row.waiting_on} ({row.waiting_on.share:.0%})" if row.waiting_on else ""


def _memory(nbytes: int) -> str:
    return format_size(nbytes) if nbytes else ""


def _maps(rows: Sequence[Row]) -> list[list[Row]]:
    """Those of our rows that make a map: one method and reader count, two by two points or more."""
    maps: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.is_ours:
            maps.setdefault((*row.combination, row.case.method, row.case.readers), []).append(row)

    def is_map(found: list[Row]) -> bool:
        able = [row for row in found if row.bytes_per_second is not None]
        sizes = {row.case.buffer_size for row in able}
        return len(sizes) > 1 and len({row.case.num_buffers for row in able}) > 1

    return [found for found in maps.values() if is_map(found)]


def heat_map(rows: Sequence[Row]) -> list[Line]:
    """GB/s of one method, a line per buffer size and a column per count; brighter is faster."""
    case = rows[0].case
    readers = f", {case.readers} readers" if case.readers > 1 else ""
    title = f"GB/s of {case.method}, {case.shape}, {case.source} to {case.sink}{readers}"
    counts = sorted({row.case.num_buffers for row in rows})
    sizes = sorted({row.case.buffer_size for row in rows})
    found = {(row.case.buffer_size, row.case.num_buffers): row for row in rows}
    rates = [row.bytes_per_second for row in rows if row.bytes_per_second is not None]
    low, high = min(rates), max(rates)
    fastest = max(rows, key=lambda row: row.bytes_per_second or 0.0)
    wide = max(len("buffer"), *(len(format_exact_size(size)) for size in sizes))
    head = "".join(f"{f'x {count}':^9}" for count in counts)
    lines = [line(title, TITLE), line(f"{'buffer':>{wide}}{_GAP}{head}", DIM)]
    for size in sizes:
        spans = [(f"{format_exact_size(size):>{wide}}{_GAP}", "")]
        for count in counts:
            row = found.get((size, count))
            if row is None or row.bytes_per_second is None:
                spans.append((f"{'-':^9}", DIM))
                continue
            share = (row.bytes_per_second - low) / (high - low) if high > low else 1.0
            mark = MARK if row is fastest else ""
            spans.append((f"{gigabytes(row.bytes_per_second) + mark:^9}", _block(share)))
        lines.append(Line(tuple(spans)))
    return lines


def _block(share: float) -> str:
    """A background between the scale's ends, and a text colour that can be read on it."""
    at = share * (len(_SCALE) - 1)
    index = min(int(at), len(_SCALE) - 2)
    ends = zip(_SCALE[index], _SCALE[index + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (at - index)) for a, b in ends)
    is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 120
    return f"{'black' if is_bright else 'white'} on rgb({red},{green},{blue})"


def closing_lines(results: Results, width: int | None) -> list[Line]:
    """The best points in words, what is missing, and the warnings."""
    said = [(best_line(row), BEST) for row in results.rows if row.is_best]
    if len(results.rows) < results.num_cases:
        said.append((f"{len(results.rows)} of {results.num_cases} rows were measured", BAD))
    said += [(f"warning: {text}", "") for text in warning_lines(results)]
    return [line(text, style) for words, style in said for text in _wrapped(words, width)]


def _wrapped(words: str, width: int | None) -> list[str]:
    """Broken between words, which a terminal would not do."""
    if width is None:
        return [words]
    return textwrap.wrap(words, max(width, 20), subsequent_indent="  ", break_on_hyphens=False)


def best_line(row: Row) -> str:
    """`best for dense, file to discard: --buffer-size 64MiB --num-buffers 4: 1.80 GB/s, ...`."""
    case = row.case
    options = (
        f"--buffer-size {format_exact_size(case.buffer_size)} --num-buffers {case.num_buffers}"
    )
    if case.readers > 1:
        options += f" --readers {case.readers}"
    found = [f"{_rate(row)} GB/s"]
    if row.limit:
        is_together = row.limit.stage == "together"
        what = "what its stages reach together" if is_together else f"the {row.limit.stage} limit"
        found.append(f"{row.limit.fraction:.0%} of {what}")
    if row.ratio_to_original is not None:
        found.append(f"{row.ratio_to_original:.2f} x the original's")
    what = f"{case.shape}, {case.source} to {case.sink}"
    return f"{MARK} best for {what}: {options}: {', '.join(found)}"


def short_line(row: Row) -> str:
    """A row's result in a few words, for a log file."""
    if row.failure is not None:
        return f"left out: {row.failure}"
    words = [f"{_rate(row)} GB/s"]
    if row.limit:
        words.append(share_of_limit(row.limit))
    if row.waiting_on:
        words.append(f"waiting on {row.waiting_on}")
    if row.wrong:
        words.append(f"{row.wrong} WRONG")
    return ", ".join(words)
