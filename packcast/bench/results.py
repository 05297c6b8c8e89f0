"""All that a bench has found so far: what exporters, plots and tables are made from. Plain data,
and the few words that all of them use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packcast.bench.model import Case, Environment, Limit
from packcast.bench.rows import Reached, Row
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
    size, count = buffer_words(case)
    buffers = f" {size} x {count}" if case.num_buffers else ""
    return f"{case.method} {case.shape} {case.source}->{case.sink}{buffers}{readers}"


def buffer_words(case: Case) -> tuple[str, str]:
    """The size and the number of buffers, for a table: `64MiB` and `4`; dashes without any."""
    if not case.num_buffers:
        return "-", "-"
    return format_exact_size(case.buffer_size), str(case.num_buffers)


def limit_label(limit: Limit) -> str:
    """`broadcast, 64MiB per call`, `read, 2 readers`; without more words, 1 GiB per call."""
    words: list[str] = [limit.stage]
    if limit.sink is not None:
        words.append(f"file to {limit.sink}")
    if limit.buffer_size is not None:
        words.append(f"{format_exact_size(limit.buffer_size)} per call")
    if limit.readers is not None and limit.readers > 1:
        words.append(f"{limit.readers} readers")
    return ", ".join(words)


def share_of_limit(limit: Reached) -> str:
    """`95% of read`, or `95% together` of what all stages reach at the same time."""
    share = f"{limit.fraction:.0%}"
    return f"{share} together" if limit.stage == "together" else f"{share} of {limit.stage}"


def facts(environment: Environment) -> list[tuple[str, str]]:
    """The environment as lines of a header: what, and the words for it."""
    lines = [("versions", ", ".join(f"{k} {v}" for k, v in environment.versions.items()))]
    lines.append(("group", f"{environment.world_size} ranks, {environment.backend}"))
    hosts: dict[str, list[Mapping[str, object]]] = {}
    for rank in environment.ranks:
        hosts.setdefault(str(rank.get("host", "?")), []).append(rank)
    lines += [("host", f"{host}: {_machine(ranks)}") for host, ranks in hosts.items()]
    if environment.file_systems:
        systems = (f"{path} ({kind})" for path, kind in environment.file_systems.items())
        lines.append(("files in", ", ".join(systems)))
    return lines


def _machine(ranks: Sequence[Mapping[str, object]]) -> str:
    """`2 ranks on cuda:0, cuda:1 (2 x NVIDIA H100), 64 cores, native I/O threads`."""
    devices = ", ".join(dict.fromkeys(str(rank.get("device", "?")) for rank in ranks))
    gpus = Counter(str(rank["gpu"]) for rank in ranks if rank.get("gpu"))
    names = ", ".join(f"{number} x {name}" if number > 1 else name for name, number in gpus.items())
    cores = {str(rank["cores"]) for rank in ranks if rank.get("cores")}
    words = f"{len(ranks)} ranks" if len(ranks) > 1 else "1 rank"
    words += f" on {devices}" + (f" ({names})" if names else "")
    words += f", {', '.join(sorted(cores))} cores" if cores else ""
    pools = {str(rank["pool"]) for rank in ranks if rank.get("pool")}
    return words + (f", {' and '.join(sorted(pools))} I/O threads" if pools else "")


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
