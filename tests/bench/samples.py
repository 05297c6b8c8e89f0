"""Measurements as a bench would hand them over: made up, but of the shape of real ones."""

from __future__ import annotations

from collections.abc import Sequence

from packcast.bench.model import (
    BenchSink,
    BenchView,
    Case,
    Environment,
    Limit,
    Measured,
    Method,
    RankRun,
    Run,
    SourceKind,
)
from packcast.units import GIB, MIB

ENVIRONMENT = Environment(
    versions={"packcast": "0.1.0", "python": "3.11.2", "torch": "2.11.0", "nccl": "2.28.3"},
    backend="nccl",
    world_size=2,
    ranks=(
        {
            "rank": 0,
            "host": "node|1",
            "device": "cuda:0",
            "gpu": "NVIDIA H100",
            "cores": 64,
            "pool": "native",
        },
        {
            "rank": 1,
            "host": "node|1",
            "device": "cuda:1",
            "gpu": "NVIDIA H100",
            "cores": 64,
            "pool": "native",
        },
    ),
    file_systems={"/dev/shm": "tmpfs"},
)
LIMITS = (
    Limit(stage="read", bytes_per_second=44e9, detail="16 threads", per_rank={0: 44e9}),
    Limit(stage="h2d", bytes_per_second=54e9),
    Limit(stage="broadcast", bytes_per_second=365e9, detail="1 GiB per call"),
    Limit(stage="broadcast", bytes_per_second=322e9, buffer_size=64 * MIB),
    Limit(stage="d2h", bytes_per_second=54e9),
    Limit(stage="write", bytes_per_second=4.8e9, detail="16 threads", per_rank={1: 4.8e9}),
    Limit(
        stage="together",
        bytes_per_second=4.6e9,
        detail="read + h2d + broadcast + d2h + write at once, 64MiB x 4",
        readers=1,
        sink="write",
        per_rank={0: 4.7e9, 1: 4.6e9},
    ),
)
STAGES: dict[str, set[str]] = {
    "discard": {"read", "h2d", "broadcast", "d2h"},
    "land": {"read", "h2d", "broadcast"},
    "write": {"read", "h2d", "broadcast", "d2h", "write", "together"},
}


def case(
    method: Method = "packcast",
    *,
    shape: str = "dense",
    source: SourceKind = "file",
    sink: BenchSink = "discard",
    readers: int = 1,
    buffer_size: int = 64 * MIB,
    num_buffers: int = 4,
) -> Case:
    return Case(
        method=method,
        shape=shape,
        source=source,
        sink=sink,
        readers=readers,
        buffer_size=buffer_size,
        num_buffers=num_buffers,
    )


def run(*seconds: float, warmup: bool = False, wrong: int = 0, **waiting: float) -> Run:
    """Times by rank; `waiting` by stage is rank 1's."""
    parts = [
        RankRun(
            rank=rank,
            seconds=taken,
            wrong=wrong if rank == 1 else 0,
            waiting=waiting if rank == 1 else {"broadcast": 0.001},
            busy={"broadcast": taken / 2},
            loop_seconds=0.04 * (1 + rank),
            peak_device_nbytes=260 * MIB,
            peak_pinned_nbytes=512 * MIB,
        )
        for rank, taken in enumerate(seconds)
    ]
    return Run(tuple(parts), warmup)


def measured(
    of: Case,
    gigabytes_per_second: Sequence[float],
    *,
    nbytes: int = 8 * GIB,
    wrong: int = 0,
    waiting: str = "write",
    failure: str | None = None,
) -> Measured:
    """A warm-up at half the first speed, then a run at each speed; rank 1 is the slower one."""
    times = [nbytes / (rate * 1e9) for rate in gigabytes_per_second]
    runs = [run(times[0], 2 * times[0], warmup=True)] if times else []
    runs += [run(t * 0.9, t, wrong=wrong, **{waiting: t / 2}) for t in times]
    bearing = tuple(
        limit
        for limit in LIMITS
        if limit.stage in (STAGES[of.sink] if of.source == "file" else {"broadcast"})
        and limit.buffer_size in (None, of.buffer_size)
    )
    return Measured(case=of, nbytes=nbytes, runs=tuple(runs), limits=bearing, failure=failure)


def a_bench() -> list[Measured]:
    """Two combinations with baselines; a row that did not fit, one that is wrong."""
    found = []
    for size, at_two, at_four in ((4, 21.0, 24.5), (16, 33.0, 43.6), (64, 35.5, 37.0)):
        for count, rate in ((2, at_two), (4, at_four)):
            one = case(buffer_size=size * MIB, num_buffers=count)
            found.append(measured(one, [rate, rate * 1.02, rate * 0.97], waiting="read"))
    big = case(buffer_size=16 * GIB, num_buffers=4)
    found.append(measured(big, [], failure="no room for 4 buffers of 16 GiB on rank 1"))
    original = case("original", buffer_size=GIB, num_buffers=2)
    found.append(measured(original, [4.2, 4.25, 4.1], waiting="read"))
    for size, rate, wrong in ((16, 4.4, 0), (64, 4.6, 3)):
        one = case(sink="write", buffer_size=size * MIB)
        found.append(measured(one, [rate, rate, rate], wrong=wrong))
    return [*found, measured(case("original", sink="write", buffer_size=GIB), [1.9, 2.0, 2.1])]


def show(view: BenchView, measurements: Sequence[Measured]) -> None:
    """Tell a view all of it, in the order in which a bench would."""
    view.environment(ENVIRONMENT, len(measurements))
    for limit in LIMITS:
        view.limit(limit)
    for one in measurements:
        for index in range(len(one.runs)):
            view.begun(one.case, index, len(one.runs))
        view.measured(one)
