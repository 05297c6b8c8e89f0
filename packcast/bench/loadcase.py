"""Ways in which every rank loads the files itself: safetensors' own, and others' loaders.

What a foreign loader does wrong becomes a row without numbers, and no rank waits for it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from collections.abc import Callable, Generator
from contextlib import closing

import torch
from safetensors.torch import load_file

from packcast.bench.cases import FOREIGN_METHODS
from packcast.bench.check import sums_of, wrong_tensors
from packcast.bench.loaders import by_fastsafetensors, by_instanttensor
from packcast.bench.pagecache import evict, is_in_memory_only
from packcast.bench.ways import GivenUp, Job, Plain, RunFailed
from packcast.errors import PackcastError
from packcast.group.defaultgroup import DefaultGroup, Forsaken
from packcast.packed.tensors import as_bytes, from_bytes
from packcast.units import format_size

OpenGroup = Callable[[str], DefaultGroup]

_LOADERS = {"instanttensor": by_instanttensor, "fastsafetensors": by_fastsafetensors}


def installed_loaders() -> list[str]:
    """The foreign loaders that could be imported here; none of them is."""
    return [name for name in FOREIGN_METHODS if importlib.util.find_spec(name) is not None]


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Byte for byte: a clone would tidy up booleans that are neither 0 nor 1."""
    return from_bytes(as_bytes("", tensor, tensor.device).clone(), tensor.shape, tensor.dtype)


class LoadCase(Plain):
    """All tensors on every rank's device, read by every rank from the files.

    `open_group` makes torch's default group under a name of its own, which foreign loaders want:
    it is there for their runs only.
    """

    def __init__(self, job: Job, open_group: OpenGroup, *, cold: bool) -> None:
        super().__init__(job)
        self._open_group = open_group
        self._cold = cold
        self._paged = False
        self._group: DefaultGroup | None = None
        self._loaded: dict[str, torch.Tensor] = {}

    def prepare(self) -> None:
        paths = [path for path, _ in self.job.stock.shards()]
        self.job.stock.check_specs()
        if self.job.case.method in FOREIGN_METHODS:
            try:
                importlib.import_module(self.job.case.method)
            except Exception as error:
                raise PackcastError(f"{self.job.case.method}: {error}") from error
            self._check_room()
        self._paged = not self._cold and not any(map(is_in_memory_only, paths))
        if self._cold:
            evict(self.job.stock.paths())

    def connect(self) -> None:
        """Not in the run: who loads a model has such a group already."""
        if self.job.case.method in FOREIGN_METHODS:
            try:
                self._group = self._open_group(self.job.run_id)
            except Forsaken as error:
                raise GivenUp(error.message) from error

    def run(self) -> float:
        """The moment of the last byte: asking whether the others have failed is no part of it."""
        method = self.job.case.method
        try:
            with closing(self._tensors()) as tensors:
                self._loaded.update(tensors)
            self.job.team.synchronize()
            ended = time.perf_counter()
        except Exception as error:  # whatever a foreign loader raises
            self._check_the_others()
            if self._group is not None:
                self._group.give_up()
            reason = (str(error) or repr(error)).splitlines()[0]
            raise RunFailed(f"{method}: {reason}") from error
        self._check_the_others()
        return ended

    def check(self) -> int:
        """A tensor that is missing, or on another device, is as wrong as one with other bytes."""
        stock, device = self.job.stock, self.job.team.device
        there = [
            (self._loaded[spec.name], right)
            for spec, right in zip(stock.specs, stock.sums["file"], strict=True)
            if spec.name in self._loaded and self._loaded[spec.name].device == device
        ]
        found = sums_of(tensor for tensor, _ in there)
        return len(stock.specs) - len(there) + wrong_tensors(found, [right for _, right in there])

    def close(self) -> None:
        self._loaded = {}
        group, self._group = self._group, None
        if group is not None:
            gc.collect()  # of what others leave in cycles, on the device or holding the group
            group.close()

    def _tensors(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        paths = [path for path, _ in self.job.stock.shards()]
        device = self.job.team.device
        load = _LOADERS.get(self.job.case.method)
        if load is not None:
            assert self._group is not None, "connect comes first"
            yield from load(paths, device, self._group.group, paged=self._paged)
            return
        for path in paths:
            for name, tensor in load_file(path, device=str(device)).items():
                # On a CPU it maps the file, and reads nothing until somebody looks.
                yield name, _copy_of(tensor) if device.type == "cpu" else tensor

    def _check_room(self) -> None:
        """Raise PackcastError where a foreign loader would find no memory once others wait for it:
        for all weights, and for two of the largest file at once."""
        device = self.job.team.device
        nbytes = sum(spec.nbytes for spec in self.job.stock.specs)
        nbytes += 2 * max((path.stat().st_size for path in self.job.stock.paths()), default=0)
        if device.type == "cuda" and nbytes > torch.cuda.mem_get_info(device)[0]:
            raise PackcastError(f"{device} has no room for {format_size(nbytes)}")

    def _check_the_others(self) -> None:
        """Raise GivenUp if another rank has failed: what came then, or broke then, is no wonder."""
        if self._group is not None and self._group.is_given_up():
            raise GivenUp(f"{self.job.case.method}: another rank has failed")
