"""`--plot`: throughput against buffer size as a picture. Imports matplotlib only when needed.

Draws on a figure of its own: no display, no window, no state of pyplot.
"""

from __future__ import annotations

from pathlib import Path

from packcast.bench.model import OURS, Results
from packcast.bench.stats import shown
from packcast.errors import DestinationError
from packcast.units import MIB

_MARKERS = "os^DvPX"


def write_plot(path: Path, results: Results) -> None:
    """A line for each of packcast's methods, buffer counts and readers; a dashed level for each
    baseline. Raises DestinationError."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    levels: dict[str, float] = {}
    for row in shown(results.rows):
        case = row.case
        name = f"{case.method}, {case.shape} {case.source} to {case.sink}"
        if row.rate is None:
            continue
        if case.method in OURS:
            name += f", {case.num_buffers} buffers{case.more_readers}"
            lines.setdefault(name, []).append((case.buffer_size / MIB, row.rate / 1e9))
        else:
            levels[name] = row.rate / 1e9
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(lines.items()):
        sizes, rates = zip(*sorted(points), strict=True)
        axes.plot(sizes, rates, label=name, marker=_MARKERS[i % len(_MARKERS)])
    for i, (name, level) in enumerate(levels.items()):
        axes.axhline(level, label=name, linestyle="--", color=f"C{len(lines) + i}")
    axes.set_xscale("log", base=2)
    ticks = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xticks(ticks, [f"{size:g}" for size in ticks])
    axes.set(xlabel="buffer size (MiB)", ylabel="GB/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if lines or levels:
        axes.legend(fontsize="small")
    axes.set_title(results.command_line, fontsize="small", wrap=True)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DestinationError(f"--plot: {path}: {error.strerror}") from error
