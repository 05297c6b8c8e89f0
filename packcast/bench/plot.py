"""`--plot`: throughput against buffer size as a picture. Needs matplotlib, asked for late.

Draws on a figure of its own: no display, no window, no state of pyplot.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from packcast.bench.export import gigabytes
from packcast.bench.model import Environment
from packcast.bench.results import Results
from packcast.bench.rows import Row, grouped
from packcast.bench.targets import file_target
from packcast.errors import DestinationError, UsageError
from packcast.units import MIB, format_rate, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
# Okabe and Ito's (2008): told apart by colour-blind people; the markers differ as well.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
_LIMIT_COLOUR, _BASELINE_COLOUR = "#000000", "#666666"
_MOST_TICKS = 12
_ACROSS = 3  # panels in a row
# Names of lines at the right edge keep this distance, as a share of the height.
_LABEL_GAP = 0.055


@dataclass(frozen=True, slots=True)
class _Level:
    """A line straight across, in GB/s."""

    rate: float
    label: str
    colour: str
    line: str


def check_plot(option: str, text: str) -> Path:
    """The file to draw into, if it can be drawn; raises UsageError. Imports matplotlib."""
    path = file_target(option, text)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{option}: {text} must end in {' or '.join(SUFFIXES)}")
    try:
        # Now, not at the end: where a signal ends the bench, few seconds are left to draw.
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        is_there = error.name is None or error.name.partition(".")[0] != "matplotlib"
        raise UsageError(
            f"{option} needs matplotlib, which "
            + (f"cannot be imported: {error}" if is_there else "is not installed"),
            hint="pip install 'packcast[plot]'",
        ) from None
    return path


def write_plot(path: Path, results: Results) -> None:
    """A panel per combination of shape, source and sink; raises DestinationError."""
    from matplotlib.figure import Figure

    groups = [rows for rows in grouped(results.rows).values() if _points(rows)]
    if not groups:
        return
    across = min(_ACROSS, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(1.2 + 6.2 * across, 0.6 + 4.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, rows in zip(panels, groups, strict=False):
        _draw(axes, rows)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    if results.environment:
        figure.suptitle(_title(results.environment))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DestinationError(f"--plot: {path}: {error.strerror}") from error


def _title(environment: Environment) -> str:
    gpus = dict.fromkeys(str(rank["gpu"]) for rank in environment.ranks if rank.get("gpu"))
    on = f" on {', '.join(gpus)}" if gpus else ""
    return f"packcast bench: {environment.world_size} ranks{on}, {environment.backend}"


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    """One panel: our lines, then limits and baselines straight across them."""
    shape, source, sink = rows[0].combination
    sizes = sorted({nbytes // MIB for nbytes, _ in _points(rows)})
    axes.set_title(f"{shape} ({format_size(max(row.nbytes for row in rows))}), {source} to {sink}")
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    step = -(-len(sizes) // _MOST_TICKS)
    axes.set_xticks(sizes[::step], [str(size) for size in sizes[::step]])
    axes.minorticks_off()
    axes.set_xlabel("buffer size, MiB")
    axes.set_ylabel("GB/s")
    _draw_ours(axes, rows)
    levels = [*_limits(rows), *_baselines(rows)]
    top = 1.12 * max([*(level.rate for level in levels), *(rate for _, rate in _points(rows))])
    axes.set_ylim(0, top)
    for level in levels:
        axes.axhline(level.rate, color=level.colour, linestyle=level.line, linewidth=1.2, zorder=1)
    heights = spread_apart([level.rate / top for level in levels], _LABEL_GAP)
    for level, height in zip(levels, heights, strict=True):
        axes.annotate(
            level.label,
            (1.0, height),
            xytext=(5, 0),
            textcoords="offset points",
            xycoords="axes fraction",
            verticalalignment="center",
            color=level.colour,
            fontsize=8,
        )
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_ours(axes: Axes, rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row.is_ours and row.seconds is not None:
            case = row.case
            lines.setdefault((case.method, case.readers, case.num_buffers), []).append(row)
    counts = sorted({count for _, _, count in lines})
    several = len({method for method, _, _ in lines}) > 1, len({n for _, n, _ in lines}) > 1
    dashes = dict(zip(dict.fromkeys(key[:2] for key in lines), _DASHES * len(lines), strict=False))
    for (method, readers, count), found in sorted(lines.items()):
        found.sort(key=lambda row: row.case.buffer_size)
        place = counts.index(count) % len(_COLOURS)
        sizes = [row.case.buffer_size / MIB for row in found]
        words = [f"{count} buffers" if count > 1 else "1 buffer"]
        words += [method] if several[0] else []
        words += [f"{readers} readers" if readers > 1 else "1 reader"] if several[1] else []
        axes.plot(
            sizes,
            [(row.bytes_per_second or 0.0) / 1e9 for row in found],
            color=_COLOURS[place],
            marker=_MARKERS[place],
            linestyle=dashes[method, readers],
            label=", ".join(words),
            zorder=3,
        )
        extremes = [(row.seconds.max, row.seconds.min, row.nbytes) for row in found if row.seconds]
        axes.fill_between(
            sizes,
            [nbytes / most / 1e9 for most, _, nbytes in extremes],
            [nbytes / least / 1e9 for _, least, nbytes in extremes],
            color=_COLOURS[place],
            alpha=0.12,
            linewidth=0,
            zorder=2,
        )
    _ring_best(axes, rows)
    if lines:
        # Below the picture: inside it some line would run through the legend.
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncols=min(4, len(lines) + 1),
            frameon=False,
            fontsize=9,
        )


def _ring_best(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.is_best:
            axes.scatter(
                [row.case.buffer_size / MIB],
                [(row.bytes_per_second or 0.0) / 1e9],
                s=170,
                facecolors="none",
                edgecolors="#000000",
                linewidths=1.3,
                label=f"best: {format_rate(row.bytes_per_second or 0.0)}",
                zorder=4,
            )


def _points(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """What is drawn of ours: size and the fastest run's GB/s."""
    return [
        (row.case.buffer_size, row.nbytes / row.seconds.min / 1e9)
        for row in rows
        if row.is_ours and row.seconds is not None
    ]


def _limits(rows: Sequence[Row]) -> list[_Level]:
    """Each limit that binds some case here, once."""
    ours = [row for row in rows if row.is_ours]
    several = len({row.case.readers for row in ours}) > 1
    levels = {}
    for row in ours:
        if row.limit:
            rate = row.limit.bytes_per_second
            readers = f", {row.case.readers} readers" if several and row.case.readers > 1 else ""
            label = f"limit: {row.limit.stage}{readers} {gigabytes(rate)}"
            levels[label] = _Level(rate / 1e9, label, _LIMIT_COLOUR, "--")
    return list(levels.values())


def _baselines(rows: Sequence[Row]) -> list[_Level]:
    """Each baseline at its best, whatever buffers it has."""
    best: dict[str, float] = {}
    for row in rows:
        if not row.is_ours and row.bytes_per_second is not None:
            method = row.case.method
            best[method] = max(best.get(method, 0.0), row.bytes_per_second)
    return [
        _Level(rate / 1e9, f"{method} {gigabytes(rate)}", _BASELINE_COLOUR, ":")
        for method, rate in best.items()
    ]


def spread_apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved as little as a simple sweep can, so that none is nearer than `gap`."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = list(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    # What was pushed out at the top pushes back down.
    ceiling = 1.0
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed
