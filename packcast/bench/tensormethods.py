"""Methods that end in new tensors: the library functions, the original's algorithm, `load_file`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from packcast.bench.baselines import original_consumer, original_producer
from packcast.bench.check import sums_of, wrong_tensors
from packcast.bench.methods import MethodRun, RunFailed
from packcast.bench.model import SENDER
from packcast.bench.pagecache import evict
from packcast.errors import PackcastError
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer
from packcast.packed.counters import counting
from packcast.packed.layout import TensorSpec
from packcast.packed.tensor_bytes import as_bytes, from_bytes

Pairs = list[tuple[str, torch.Tensor]]


class PackedMethod(MethodRun):
    """Packed broadcasts on the original's wire, by packcast (`compat`) or the original's algorithm.

    Resident weights, or tensors that the sender loads from its files one by one. The workers drop
    them, keep them, or keep and then save them. Dropped tensors are checked by a second pass, which
    is not timed.
    """

    def prepare(self) -> None:
        case = self.case
        self._kept: Pairs = []
        self.resources.callback(self._kept.clear)
        self.data.check_specs()
        if case.method == "original":
            check_original_can(self.data.specs, case.buffer_size)
        largest = max((spec.nbytes for spec in self.data.specs), default=0)
        total = sum(spec.nbytes for spec in self.data.specs)
        # A buffer exceeds its size by up to a tensor, and the next one is made while it is in use.
        buffers = min(2 * total, (case.num_buffers + 1) * (case.buffer_size + largest))
        self.check_room(buffers + (total if case.sink in ("land", "write") else 0))
        if self.ranks.is_sender and case.source == "file":
            self.data.opened()  # a failure later would leave the others waiting
            if self.cold:
                evict(self.data.paths())

    def warm(self) -> None:
        """A first pass, so that memory is allocated; for `compat` another one, which is counted:
        timing each stage would slow the measured run down."""
        if self.case.source != "resident":
            return
        self._move(keep=False)
        if self.case.method == "compat":
            with counting(self.counters):
                self._move(keep=False)

    def run(self) -> None:
        self._move(keep=self.case.sink != "discard")
        if self.case.sink == "write" and not self.ranks.is_sender:
            self._save()

    def check(self) -> int:
        sums: list[int] = []
        if self.case.sink == "discard":
            sums = self._move(keep=False, add_up=True)
        if self.ranks.is_sender:
            return 0
        if self.case.sink == "write":
            sums = sums_of(self._saved())
        elif self.case.sink == "land":
            sums = sums_of(tensor for _, tensor in self._kept)
        return wrong_tensors(sums, self.data.sums[self.case.source])

    def _move(self, *, keep: bool, add_up: bool = False) -> list[int]:
        """Send or receive all tensors; returns their sums if wanted."""
        case, ranks = self.case, self.ranks
        sums: list[int] = []

        def take(pairs: Pairs) -> None:
            if keep:
                self._kept += pairs
            if add_up:
                sums.extend(sums_of(tensor for _, tensor in pairs))

        def tensor_of(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
            return pair[1]

        sizes = (case.buffer_size, case.num_buffers)
        described = ((spec.name, (spec.shape, spec.dtype)) for spec in self.data.specs)
        tensors = iter(self.data.resident.items())
        if case.source == "file" and ranks.is_sender:
            tensors = self.data.tensors(ranks.device)
        if case.method == "compat" and ranks.is_sender:
            packed_broadcast_producer(tensors, ranks, SENDER, tensor_of, *sizes)
        elif case.method == "compat":
            packed_broadcast_consumer(described, ranks, SENDER, take, *sizes, borrow=not keep)
        elif ranks.is_sender:
            original_producer(tensors, ranks, SENDER, tensor_of, *sizes, ranks.device)
        else:
            original_consumer(described, ranks, SENDER, take, *sizes, ranks.device)
        ranks.synchronize()  # the original leaves its last buffers in flight
        return sums

    def _save(self) -> None:
        """Save the kept tensors shard by shard, as the original's users do."""
        folder, tensors = self.write_folder, dict(self._kept)
        self.resources.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            for path, names in self._shards():
                save_file({name: tensors[name] for name in names}, path)
        except Exception as error:  # safetensors has errors of its own
            raise RunFailed(f"save_file: {error}") from error

    def _saved(self) -> Iterator[torch.Tensor]:
        for path, names in self._shards():
            with safe_open(path, framework="pt", device="cpu") as shard:
                for name in names:
                    yield shard.get_tensor(name)

    def _shards(self) -> Iterator[tuple[Path, Sequence[str]]]:
        for spec in self.data.offered().files:
            if spec.header:
                name = spec.name.replace("/", "_")
                yield self.write_folder / name, spec.header.tensors.names


class LoadFileMethod(MethodRun):
    """Every rank loads the files itself, with safetensors' `load_file`."""

    def prepare(self) -> None:
        self._loaded: dict[str, torch.Tensor] = {}
        self.resources.callback(self._loaded.clear)
        self.data.check_specs()
        self.data.opened()
        if self.cold:
            evict(self.data.paths())

    def run(self) -> None:
        device = self.ranks.device
        try:
            for shard in self.data.opened().shards:
                for name, tensor in load_file(shard.path, device=str(device)).items():
                    # On a CPU the file is mapped, and is read only when it is used.
                    self._loaded[name] = _copy_of(tensor) if device.type == "cpu" else tensor
        except Exception as error:
            raise RunFailed(f"load_file: {error}") from error

    def check(self) -> int:
        sums = sums_of(self._loaded[spec.name] for spec in self.data.specs)
        return wrong_tensors(sums, self.data.sums["file"])


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Byte for byte: a clone changes booleans that are neither 0 nor 1."""
    return from_bytes(as_bytes("", tensor, tensor.device).clone(), tensor.shape, tensor.dtype)


def check_original_can(specs: Sequence[TensorSpec], buffer_size: int) -> None:
    """Raise PackcastError if the original's algorithm fails on these tensors.

    It fails on one rank in the middle of a run, and leaves the others waiting.
    """
    offset = 0
    for spec in specs:
        if not spec.shape:
            raise PackcastError(f"the original cannot carry {spec.name}, which has no dimension")
        if offset % spec.dtype.itemsize:
            raise PackcastError(f"the original cannot carry {spec.name}: it is not aligned")
        offset += spec.nbytes
        if offset > buffer_size:
            offset = 0
