"""A rank of a bench, started as a process of its own: `python -m tests.bench.entry SETTINGS`.

SETTINGS is JSON; the last argument is a file for what the sender finds. `fault` in SETTINGS makes
this process do something wrong or slowly, below packcast, where any of its ways would meet it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from packcast import bench
from packcast.bench.model import BenchSettings, BenchView, Case, Environment, Limit, Measured
from packcast.errors import PackcastError
from packcast.group.leave import Leaver, watch_signals
from packcast.units import KIB

Broadcast = Callable[[Any, int], None]


class Recorder(BenchView):
    """Keeps everything, as JSON, in a file that is written anew each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {"limits": [], "measured": [], "begun": [], "warnings": []}

    def environment(self, environment: Environment, num_cases: int) -> None:
        self._found["environment"] = dataclasses.asdict(environment)
        self._found["num_cases"] = num_cases

    def limit(self, limit: Limit) -> None:
        self._keep("limits", dataclasses.asdict(limit))

    def begun(self, case: Case, run: int, runs: int) -> None:
        self._keep("begun", [case.method, case.source, case.sink, case.buffer_size, run, runs])

    def measured(self, measured: Measured) -> None:
        self._keep("measured", dataclasses.asdict(measured))

    def warn(self, text: str) -> None:
        self._keep("warnings", text)

    def _keep(self, what: str, item: object) -> None:
        self._found[what].append(item)
        self._path.write_text(json.dumps(self._found))


def main(argv: list[str]) -> int:
    given = json.loads(argv[0])
    fault = given.pop("fault", None)
    for name in ("checkpoint", "directory", "write_directory"):
        given[name] = Path(given[name]) if given.get(name) else None
    lists = ("shapes", "sources", "sinks", "readers", "buffer_sizes", "num_buffers")
    settings = BenchSettings(**given | {name: tuple(given[name]) for name in lists})

    def say(error: PackcastError) -> None:
        print(f"packcast: error: {error.message}", file=sys.stderr)

    leaver = Leaver(say)
    watch_signals(leaver)
    if fault:
        FAULTS[fault["kind"]](**fault.get("with", {}))
    try:
        return bench.run(settings, Recorder(Path(argv[1])), leaver)
    except PackcastError as error:
        leaver.leave(error)


def damage_broadcasts(rank: int, at_least: int = 64 * KIB) -> None:
    """On one rank, a byte within every larger broadcast comes out wrong."""
    import torch

    def damaged(broadcast: Broadcast, tensor: torch.Tensor, root: int) -> None:
        broadcast(tensor, root)
        data = tensor.view(-1).view(torch.uint8) if tensor.is_contiguous() else tensor
        if os.environ["RANK"] == str(rank) and data.numel() >= at_least:
            # Neither in a trailer nor in what a limit's check looks at.
            data[data.numel() // 3] ^= 0x40

    change_broadcasts(damaged)


def change_broadcasts(instead: Callable[[Broadcast, Any, int], None]) -> None:
    """In this process, what `instead` does with the true one is done for every broadcast."""
    from packcast.group import processgroup
    from packcast.transfer import moving

    true_one = processgroup.broadcast_over

    def changed(*args: Any) -> Broadcast:
        return partial(instead, true_one(*args))

    for module in (processgroup, moving):
        patched: Any = module
        patched.broadcast_over = changed


def slow_reads(seconds: float) -> None:
    """Every read of a source file takes a while longer."""
    slow_tasks({"READ"}, seconds)


def slow_broadcasts(seconds: float) -> None:
    """Every broadcast takes a while longer, on all ranks."""

    def slowly(broadcast: Broadcast, tensor: Any, root: int) -> None:
        time.sleep(seconds)
        broadcast(tensor, root)

    change_broadcasts(slowly)


def slow_sinks(rank: int, seconds: float) -> None:
    """On one rank, every sink takes a while longer for each run of bytes."""
    if os.environ["RANK"] == str(rank):
        slow_tasks({"WRITE", "COMPARE"}, seconds)


def slow_tasks(names: set[str], seconds: float) -> None:
    """In this process, every grain of host I/O of these kinds takes a while longer."""
    from packcast.io.threads import ThreadPool

    os.environ["PACKCAST_POOL"] = "python"
    really_do = ThreadPool._do_grain

    def slowly(pool: ThreadPool, index: int, first: int, last: int) -> None:
        if pool._work.task.name in names:
            time.sleep(seconds)
        really_do(pool, index, first, last)

    patched: Any = ThreadPool
    patched._do_grain = slowly


def stand_ins(fails_on: int | None = None, no_group_on: int | None = None) -> None:
    """Others' loaders are there, also without GPUs; on one rank one of them fails in mid load.

    With `no_group_on` that rank has a default group of its own already, which none can make twice.
    """
    import torch.distributed as dist

    from packcast.bench import lead

    sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))
    if fails_on is not None:
        os.environ["STAND_IN_FAILS"] = str(fails_on)
    if os.environ["RANK"] == str(no_group_on):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    patched: Any = lead
    patched.plan_series = partial(with_foreign_loaders, patched.plan_series)


def with_foreign_loaders(plan: Callable[..., Any], *args: Any, **where: Any) -> Any:
    """The plan of a machine with GPUs."""
    return plan(*args, **where | {"on_gpu": True})


FAULTS = {
    "stand ins": stand_ins,
    "damage": damage_broadcasts,
    "slow reads": slow_reads,
    "slow broadcasts": slow_broadcasts,
    "slow sinks": slow_sinks,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
