"""A rank of a bench as a process: `python -m tests.bench.entry SETTINGS FILE`.

SETTINGS is JSON; the sender writes its results to FILE. `fault` in SETTINGS makes this process do
something wrong or slowly, below all methods.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from packcast import bench
from packcast.bench.export import to_json
from packcast.bench.model import BenchSettings, BenchView, Results, Row
from packcast.errors import PackcastError
from packcast.launch.exit import ProcessExit, watch_signals
from packcast.settings import Settings
from packcast.units import KIB

Change = Callable[[Any, int], None]  # a broadcast's memory, its root


class Recorder(BenchView):
    """Writes all results as JSON to a file, each time anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._doing: list[str] = []

    def doing(self, text: str, share_done: float) -> None:
        self._doing.append(text)

    def found(self, results: Results, news: Row | None = None) -> None:
        found = json.loads(to_json(results)) | {"doing": self._doing}
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.rename(self._path)


def main(argv: list[str]) -> int:
    given = json.loads(argv[0])
    fault = given.pop("fault", None)
    for name in ("checkpoint", "directory", "write_directory"):
        given[name] = Path(given[name]) if given.get(name) else None
    lists = ("shapes", "sources", "sinks", "readers", "buffer_sizes", "num_buffers")
    given |= {name: tuple(given[name]) for name in lists}
    names = ("checkpoint", "backend", "join_timeout_s", "stall_timeout_s")
    transfer = {name: given.pop(name) for name in names if name in given}
    settings = BenchSettings(transfer=Settings(command="send", **transfer), **given)

    def say(error: PackcastError) -> None:
        print(f"packcast: error: {error.message}", file=sys.stderr)

    exit_handler = ProcessExit(say)
    watch_signals(exit_handler)
    if fault:
        FAULTS[fault["kind"]](**fault.get("with", {}))
    try:
        return bench.run(settings, Recorder(Path(argv[1])), exit_handler)
    except PackcastError as error:
        exit_handler.leave(error)


def damage(rank: int, at_least: int = 64 * KIB) -> None:
    """On one rank, a byte of every large broadcast is received wrong."""
    import torch

    def change(tensor: Any, root: int) -> None:
        data = tensor.view(-1).view(torch.uint8) if tensor.is_contiguous() else tensor
        if os.environ["RANK"] == str(rank) and root != rank and data.numel() >= at_least:
            data[data.numel() // 3] ^= 0x40  # not in a trailer

    after_broadcasts(change)


def slow_broadcasts(seconds: float) -> None:
    """Every broadcast takes a while longer, on all ranks."""
    after_broadcasts(lambda tensor, root: time.sleep(seconds))


def after_broadcasts(change: Change) -> None:
    """In this process, `change` is called after every broadcast, along a chain or not."""
    from packcast.launch import processgroup
    from packcast.packed.chain import Chain
    from packcast.transfer import group

    true_one, true_carry = processgroup.broadcast_over, Chain.carry

    def changed(*args: Any) -> Change:
        def broadcast(tensor: Any, root: int) -> None:
            true_broadcast(tensor, root)
            change(tensor, root)

        true_broadcast = true_one(*args)
        return broadcast

    def carry(chain: Chain, memory: Any, root: int) -> Any:
        passed = true_carry(chain, memory, root)
        change(memory, root)
        return passed

    patched: list[Any] = [processgroup, group, Chain]
    patched[0].broadcast_over = patched[1].broadcast_over = changed
    patched[2].carry = carry


def slow_tasks(names: list[str], seconds: float, rank: int | None = None) -> None:
    """On one rank or all, each block of host I/O of these kinds takes a while longer."""
    from packcast.io.threads import ThreadPool

    if rank is not None and os.environ["RANK"] != str(rank):
        return
    os.environ["PACKCAST_POOL"] = "python"
    really_do = ThreadPool._do_grain

    def slowly(pool: ThreadPool, index: int, first: int, last: int) -> None:
        if pool._work.task.name in names:
            time.sleep(seconds)
        really_do(pool, index, first, last)

    patched: Any = ThreadPool
    patched._do_grain = slowly


def full_disk(rank: int) -> None:
    """On one rank no space can be reserved."""
    from packcast.io import syscalls

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ["RANK"] == str(rank):
        patched: Any = syscalls
        patched.fallocate = refuse


def no_memory(rank: int) -> None:
    """On one rank there is no memory for a ring."""
    from packcast.transfer import device_memory

    def refuse(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    if os.environ["RANK"] == str(rank):
        patched: Any = device_memory
        patched.Ring = refuse


def other_settings(rank: int) -> None:
    """One rank has other settings."""
    from packcast import bench as module

    run = module.run
    if os.environ["RANK"] == str(rank):
        patched: Any = module
        patched.run = lambda settings, *rest: run(dataclasses.replace(settings, runs=7), *rest)


FAULTS: dict[str, Callable[..., None]] = {
    "damage": damage,
    "slow broadcasts": slow_broadcasts,
    "slow reads": partial(slow_tasks, ["READ"]),
    "slow sinks": partial(slow_tasks, ["WRITE", "COMPARE"]),
    "full disk": full_disk,
    "no memory": no_memory,
    "other settings": other_settings,
}

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as packcast does: taking torch's modules down takes a third of a second
