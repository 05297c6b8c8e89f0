"""packcast beside others' loaders: every rank ends with every tensor on its GPU, in turns.

    torchrun --no-python --nproc-per-node 2 python tests/bench/peers.py CKPT [--runs 5]

Each loader is called as its own description says is fastest where every rank wants all. packcast
has one reader here, which keeps the files; the other ranks receive into tensors that are there.
instanttensor and fastsafetensors are measured where they are installed. Nothing of them is in
the package. Times are of the slowest rank, medians, from a common start.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from packcast import receive_checkpoint, send_checkpoint

Tensors = dict[str, torch.Tensor]


def by_packcast(folder: Path, device: torch.device, into: Tensors) -> float:
    """Its data phase only: the other loaders find their group made, too."""
    if dist.get_rank() == 0:
        return send_checkpoint(str(folder)).seconds
    return receive_checkpoint(into=into).seconds


def by_load_file(paths: list[Path], device: torch.device) -> Tensors:
    loaded = {k: v for path in paths for k, v in load_file(path, device=str(device)).items()}
    if device.type == "cuda":
        return loaded
    # On a CPU it maps the files, and reads nothing until somebody looks.
    return {name: tensor.clone() for name, tensor in loaded.items()}


def by_instanttensor(paths: list[Path], device: torch.device) -> Tensors:
    """All files in one call: each rank reads a part of every chunk, and NCCL gathers them.

    By itself it reads past the page cache; here the files are in it.
    """
    module: Any = importlib.import_module("instanttensor")
    backend = None if in_memory(paths) else module.BackendPolicy.BUFFERED
    with module.safe_open(
        [str(path) for path in paths],
        framework="pt",
        device=device,
        process_group=dist.group.WORLD,
        copy=True,  # before 0.2 what came were views of a buffer that is used again
        backend=backend,
    ) as shards:
        return dict(shards.tensors())


def by_fastsafetensors(paths: list[Path], device: torch.device) -> Tensors:
    """Each rank reads one file of as many as there are ranks, which are broadcast in runs while
    the next ones are read. Without GPUDirect Storage, which few machines have."""
    module: Any = importlib.import_module("fastsafetensors")
    if not in_memory(paths):
        os.environ.setdefault("FASTSAFETENSORS_ODIRECT", "0")
    loader = module.ParallelLoader(
        dist.group.WORLD,
        [str(path) for path in paths],
        use_tqdm_on_load=False,
        device=str(device),
        nogds=True,
    )
    try:
        with closing(loader.iterate_weights()) as tensors:
            return dict(tensors)
    finally:
        loader.close()


def in_memory(paths: list[Path]) -> bool:
    """Files of /dev/shm are in memory alone; the others above a disk."""
    return all(path.resolve().is_relative_to("/dev/shm") for path in paths)


def tensors_of(paths: list[Path], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    for path in paths:
        with safe_open(path, framework="pt", device=str(device)) as shard:
            for name in shard.keys():  # noqa: SIM118, it is no mapping
                yield name, shard.get_tensor(name)


def timed(step: Callable[[], object]) -> tuple[float, object]:
    """Seconds of the slowest rank, or what the step says itself."""
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = result if isinstance(result, float) else time.perf_counter() - began
    worst = [0.0] * dist.get_world_size()
    dist.all_gather_object(worst, seconds)
    return max(worst), result


def is_right(found: object, truth: Tensors) -> bool:
    """Every tensor with every byte; `found` is no mapping where they came into `truth`'s place."""
    if not isinstance(found, dict):
        return True
    return found.keys() == truth.keys() and all(
        torch.equal(found[name].view(torch.uint8), truth[name].view(torch.uint8)) for name in truth
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    paths = sorted(asked.checkpoint.glob("*.safetensors"))
    truth = {name: tensor.clone() for name, tensor in tensors_of(paths, device)}
    nbytes = sum(tensor.nbytes for tensor in truth.values())
    into = {name: torch.empty_like(tensor) for name, tensor in truth.items()}
    steps: dict[str, Callable[[], object]] = {
        "packcast": lambda: by_packcast(asked.checkpoint, device, into),
        "load_file": lambda: by_load_file(paths, device),
    }
    for name, load in (
        ("instanttensor", by_instanttensor),
        ("fastsafetensors", by_fastsafetensors),
    ):
        if importlib.util.find_spec(name) is not None and on_gpu:
            steps[name] = lambda load=load: load(paths, device)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(asked.runs + 1):  # the first one warms up
        for name, step in steps.items():
            for tensor in into.values():
                tensor.view(torch.uint8).fill_(turn + 1)
            took, found = timed(step)
            if name == "packcast" and dist.get_rank() != 0:
                found = into
            assert is_right(found, truth), f"{name} loads other bytes"
            if turn:
                seconds[name].append(took)
            del found
            gc.collect()
    if dist.get_rank() == 0:
        print(f"{nbytes / 1e9:.2f} GB, {dist.get_world_size()} ranks, medians of {asked.runs}")
        ours = seconds["packcast"]
        for name, times in seconds.items():
            ratio = statistics.median(b / a for a, b in zip(ours, times, strict=True))
            rate = nbytes / statistics.median(times) / 1e9
            print(f"{name:16s} {rate:8.2f} GB/s   packcast is {ratio:.2f} times as fast")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
