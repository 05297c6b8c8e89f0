"""Invented results of a bench."""

from __future__ import annotations

from collections.abc import Sequence

from packcast.bench.model import (
    BenchSink,
    Case,
    Environment,
    LimitStage,
    Method,
    RankRun,
    Results,
    Row,
    Run,
    SourceKind,
)
from packcast.bench.stats import with_limits
from packcast.units import GIB, MIB

ENVIRONMENT = Environment(
    versions={"packcast": "0.1.0", "python": "3.11.2", "torch": "2.11.0", "nccl": "2.28.3"},
    backend="nccl",
    world_size=2,
    ranks=tuple(
        {
            "rank": rank,
            "host": "node|1",
            "device": f"cuda:{rank}",
            "gpu": "NVIDIA H100",
            "cores": 64,
            "pool": "native",
        }
        for rank in range(2)
    ),
    file_systems={"/dev/shm": "tmpfs"},
)


def case(
    method: Method = "packcast",
    *,
    shape: str = "dense",
    source: SourceKind = "file",
    sink: BenchSink = "discard",
    readers: int = 1,
    buffer_size: int = 64 * MIB,
    num_buffers: int = 4,
    limit: LimitStage | None = None,
    is_default: bool = False,
) -> Case:
    return Case(
        method="limit" if limit else method,
        shape=shape,
        source=source,
        sink=sink,
        readers=readers,
        buffer_size=buffer_size,
        num_buffers=num_buffers,
        limit=limit,
        is_default=is_default,
    )


def run(*seconds: float, warmup: bool = False, wrong: int = 0, **waiting: float) -> Run:
    """Times by rank; `wrong`, and `waiting` by stage, are rank 1's."""
    parts = [
        RankRun(
            rank=rank,
            seconds=taken,
            wrong=wrong if rank == 1 else 0,
            waiting=waiting if rank == 1 else {"broadcast": 0.001},
            loop_seconds=0.04 * (1 + rank),
            peak_device_nbytes=260 * MIB,
            peak_pinned_nbytes=512 * MIB,
        )
        for rank, taken in enumerate(seconds)
    ]
    return Run(tuple(parts), warmup)


def row(
    of: Case,
    gigabytes_per_second: Sequence[float],
    *,
    nbytes: int = 8 * GIB,
    wrong: int = 0,
    waiting: str = "write",
    failure: str | None = None,
) -> Row:
    """A warm-up at half the first speed, then a run at each speed; rank 1 is the slower one."""
    times = [nbytes / (rate * 1e9) for rate in gigabytes_per_second]
    runs = [run(times[0], 2 * times[0], warmup=True)] if times else []
    runs += [run(t * 0.9, t, wrong=wrong, **{waiting: t / 2}) for t in times]
    return Row(case=of, nbytes=nbytes, runs=tuple(runs), failure=failure, is_complete=True)


def a_bench(*, wrong: int = 0) -> Results:
    """Two tables with baselines and limits, and a row that did not fit."""
    found = []
    for size, at_two, at_four in ((4, 21.0, 24.5), (16, 33.0, 43.6), (64, 35.5, 37.0)):
        for count, rate in ((2, at_two), (4, at_four)):
            is_default = (size, count) == (64, 4)
            one = case(buffer_size=size * MIB, num_buffers=count, is_default=is_default)
            found.append(row(one, [rate, rate * 1.02, rate * 0.97], waiting="read"))
    big = case(buffer_size=16 * GIB)
    found.append(row(big, [], failure="rank 1: no room for 4 buffers of 16GiB"))
    original = case("original", buffer_size=GIB, num_buffers=2)
    found.append(row(original, [4.2, 4.25, 4.1], waiting="read"))
    found += [row(case(limit="read"), [43.0, 44.0]), row(case(limit="broadcast"), [365.0])]
    for size, rate in ((16, 4.4), (64, 4.6)):
        one = case(sink="write", buffer_size=size * MIB)
        found.append(row(one, [rate, rate, rate], wrong=wrong if size == 64 else 0))
    found.append(row(case(limit="together", sink="write"), [4.7, 5.0]))
    found.append(row(case("original", sink="write", buffer_size=GIB), [1.9, 2.0, 2.1]))
    return Results(
        command_line="packcast bench",
        environment=ENVIRONMENT,
        num_cases=len(found),
        rows=with_limits(found),
    )
