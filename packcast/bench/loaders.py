"""Others' loaders, called as their own descriptions say is fastest where every rank wants all.

Each takes torch's default group, which all ranks have made, and yields tensors that stay; what
they do wrong is for the caller. They are imported only when their turn comes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Pairs = Iterator[tuple[str, torch.Tensor]]


def by_instanttensor(
    paths: Sequence[Path], device: torch.device, group: dist.ProcessGroup, *, paged: bool
) -> Pairs:
    """All files in one call: each rank reads a part of every chunk, and NCCL gathers them.

    By itself it reads past the page cache; where the files are `paged`, in memory above a disk,
    it is told to read from there. In memory alone it finds out.

    While it waits no other thread of this process runs (it holds the GIL, as of 0.2.2). So where a
    rank fails in mid load, those that wait cannot be let go: their heartbeats fail, and the bench
    ends.
    """
    module: Any = importlib.import_module("instanttensor")
    told = "INSTANTTENSOR_BACKEND" in os.environ
    backend = module.BackendPolicy.BUFFERED if paged and not told else None
    names = [str(path) for path in paths]
    # Before 0.2 there was no `copy`, and what came were views of a buffer that is used again.
    with module.safe_open(
        names, framework="pt", device=device, process_group=group, copy=True, backend=backend
    ) as shards:
        yield from shards.tensors()


def by_fastsafetensors(
    paths: Sequence[Path], device: torch.device, group: dist.ProcessGroup, *, paged: bool
) -> Pairs:
    """Each rank reads one file of as many as there are ranks, which are broadcast in runs while
    the next ones are read. Without GPUDirect Storage, which few machines have.

    By itself it reads past the page cache too, unless the files are in memory alone.
    """
    module: Any = importlib.import_module("fastsafetensors")
    names = [str(path) for path in paths]
    with ExitStack() as ending:
        if paged and "FASTSAFETENSORS_ODIRECT" not in os.environ:
            # Read from os.environ, which is this bench's own.
            os.environ["FASTSAFETENSORS_ODIRECT"] = "0"
            ending.callback(os.environ.pop, "FASTSAFETENSORS_ODIRECT", None)
        loader = module.ParallelLoader(
            group, names, use_tqdm_on_load=False, device=str(device), nogds=True
        )
        ending.callback(loader.close)
        yield from ending.enter_context(closing(loader.iterate_weights()))
