"""Ways in which every rank loads the files itself: safetensors' own, and others' loaders.

The others are imported only where they are installed, and only when their turn comes; what they
do wrong becomes a row without numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from packcast.bench.cases import FOREIGN_METHODS
from packcast.bench.check import sums_of, wrong_tensors
from packcast.bench.pagecache import evict
from packcast.bench.ways import Job, Plain, RunFailed
from packcast.errors import PackcastError
from packcast.packed.tensors import as_bytes, from_bytes


def installed_loaders() -> list[str]:
    """The foreign loaders that could be imported here; none of them is."""
    return [name for name in FOREIGN_METHODS if importlib.util.find_spec(name) is not None]


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Byte for byte: a clone would tidy up booleans that are neither 0 nor 1."""
    return from_bytes(as_bytes("", tensor, tensor.device).clone(), tensor.shape, tensor.dtype)


class LoadCase(Plain):
    """All tensors on every rank's device, read by every rank from the files."""

    def __init__(self, job: Job, *, cold: bool) -> None:
        super().__init__(job)
        self._cold = cold
        self._loaded: dict[str, torch.Tensor] = {}

    def prepare(self) -> None:
        self.job.stock.shards()
        self.job.stock.check_specs()
        if self.job.case.method != "load_file":
            try:
                importlib.import_module(self.job.case.method)
            except Exception as error:
                raise PackcastError(f"{self.job.case.method}: {error}") from error
        if self._cold:
            evict(self.job.stock.paths())

    def run(self) -> None:
        method = self.job.case.method
        try:
            self._load(method)
        except Exception as error:  # whatever a foreign loader raises
            raise RunFailed(f"{method}: {error}") from error

    def _load(self, method: str) -> None:
        paths = [path for path, _ in self.job.stock.shards()]
        if method == "load_file":
            device = self.job.team.device
            for path in paths:
                for name, tensor in load_file(path, device=str(device)).items():
                    # On a CPU it maps the file, and reads nothing until somebody looks.
                    self._loaded[name] = _copy_of(tensor) if device.type == "cpu" else tensor
        elif method == "instanttensor":
            self._loaded.update(self._by_instanttensor(paths))
        else:
            self._loaded.update(self._by_fastsafetensors(paths))

    def check(self) -> int:
        stock = self.job.stock
        found = sums_of(self._loaded[spec.name] for spec in stock.specs)
        return wrong_tensors(found, stock.sums["file"])

    def close(self) -> None:
        self._loaded = {}

    def _by_instanttensor(self, paths: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
        """As its README says: all files at once, over the group; its buffer is reused."""
        module: Any = importlib.import_module("instanttensor")
        team = self.job.team
        with module.safe_open(
            [str(path) for path in paths],
            framework="pt",
            device=team.device.index,
            process_group=team.group,
        ) as shards:
            for name, tensor in shards.tensors():
                yield name, tensor.clone()

    def _by_fastsafetensors(self, paths: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
        """As engines do: each rank reads one file of as many as there are ranks, and the tensors
        are broadcast. Without GPUDirect Storage, which few machines have; a tensor is valid only
        until its buffer is closed."""
        module: Any = importlib.import_module("fastsafetensors")
        team = self.job.team
        for begin in range(0, len(paths), team.world_size):
            with ExitStack() as ending:
                loader = module.SafeTensorsFileLoader(team.group, team.device, nogds=True)
                ending.callback(loader.close)
                some = enumerate(paths[begin : begin + team.world_size])
                loader.add_filenames({rank: [str(path)] for rank, path in some})
                buffers = loader.copy_files_to_device()
                ending.callback(buffers.close)
                for name in list(buffers.key_to_rank_lidx):
                    yield name, buffers.get_tensor(name).clone()
