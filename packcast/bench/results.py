"""All that a bench has found so far: what exporters, plots and tables are made from. Plain data,
and the few words that all of them use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from packcast.bench.model import Case, Environment, Limit
from packcast.bench.rows import Row
from packcast.bench.stats import Advice
from packcast.units import format_exact_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The state after some of `num_cases` cases.

    `command_line` is what was typed, as far as this process knows. `warnings` are of the bench as
    a whole; each row has its own. `exit_code` is None while it runs.
    """

    command_line: str
    environment: Environment | None = None
    num_cases: int = 0
    limits: tuple[Limit, ...] = ()
    rows: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()
    exit_code: int | None = None
    error: str | None = None


def case_label(case: Case) -> str:
    """`packcast dense file->discard 64MiB x 4`, with the readers where they are several."""
    readers = f", {case.readers} readers" if case.readers > 1 else ""
    size = format_exact_size(case.buffer_size)
    where = f"{case.shape} {case.source}->{case.sink}"
    return f"{case.method} {where} {size} x {case.num_buffers}{readers}"


def limit_label(limit: Limit) -> str:
    """`broadcast, 64MiB per call`, `read, 2 readers`; without more words, 1 GiB per call."""
    words: list[str] = [limit.stage]
    if limit.buffer_size is not None:
        words.append(f"{format_exact_size(limit.buffer_size)} per call")
    if limit.readers is not None and limit.readers > 1:
        words.append(f"{limit.readers} readers")
    return ", ".join(words)


def facts(environment: Environment) -> list[tuple[str, str]]:
    """The environment as lines of a header: what, and the words for it."""
    lines = [("versions", ", ".join(f"{k} {v}" for k, v in environment.versions.items()))]
    lines.append(("group", f"{environment.world_size} ranks, {environment.backend}"))
    hosts: dict[str, list[str]] = {}
    for rank in environment.ranks:
        words = [str(rank[key]) for key in ("device", "gpu") if rank.get(key)]
        if rank.get("cores"):
            words.append(f"{rank['cores']} cores")
        hosts.setdefault(str(rank.get("host", "?")), []).append(" ".join(words))
    for host, ranks in hosts.items():
        alike = {words: ranks.count(words) for words in ranks}
        devices = ", ".join(f"{n} x {w}" if n > 1 else w for w, n in alike.items())
        lines.append(("host", f"{host}: {devices}"))
    if environment.file_systems:
        systems = (f"{path} ({kind})" for path, kind in environment.file_systems.items())
        lines.append(("files in", ", ".join(systems)))
    return lines


def warning_lines(results: Results) -> list[str]:
    """Everything odd, each kind once, with where it was met and what to do."""
    met: dict[tuple[str, str], list[Row]] = {}
    advice: dict[tuple[str, str], Advice] = {}
    for row in results.rows:
        for one in row.warnings:
            # Of spreads and first runs every row has its own numbers: the first stand for all.
            key = (str(one.kind), one.text if one.kind == "impossible" else "")
            met.setdefault(key, []).append(row)
            advice.setdefault(key, one)
    lines = list(results.warnings)
    for key, rows in met.items():
        lines.append(f"{_where(rows)}: {advice[key].text}; {advice[key].advice}")
    return lines


def _where(rows: list[Row]) -> str:
    first = case_label(rows[0].case)
    more = len(rows) - 1
    return f"{first} (and {more} more)" if more else first


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """The best of each combination."""
    return [row for row in rows if row.is_best]
