"""Methods that carry tensors: replays, the library functions, the baselines.

The sender's tensors are resident, or are loaded from its files one after the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from packcast.bench.baselines import original_consumer, original_producer
from packcast.bench.check import sums_of, wrong_tensors
from packcast.bench.methods import Job, MethodRun, RunFailed, check_room, fill_with_poison
from packcast.bench.model import SENDER
from packcast.bench.pagecache import evict
from packcast.errors import PackcastError
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer
from packcast.packed.counters import counting
from packcast.packed.layout import TensorSpec, check_plan
from packcast.packed.replay import ReplayReceiver, ReplaySender
from packcast.packed.tensor_bytes import as_bytes, from_bytes

Pairs = list[tuple[str, torch.Tensor]]


class ResidentMethod(MethodRun):
    """Resident weights into the workers' own tensors."""

    def poison(self) -> None:
        if not self.job.ranks.is_sender:
            fill_with_poison(*self.job.data.resident.values())

    def check(self) -> int:
        data = self.job.data
        if self.job.ranks.is_sender:
            return 0
        found = sums_of(data.resident[spec.name] for spec in data.specs)
        return wrong_tensors(found, data.sums["resident"])


class ReplayMethod(ResidentMethod):
    """By the pair that is made for it."""

    _pair: ReplaySender | ReplayReceiver | None = None

    def prepare(self) -> None:
        case = self.job.case
        try:
            check_plan(self.job.data.specs, case.buffer_size, case.num_buffers)
        except ValueError as error:
            raise PackcastError(str(error)) from error
        check_room(self.job, case.buffer_size * case.num_buffers)

    def connect(self) -> None:
        """Make the pair, which compares plans; bound, as who sends the same every step does."""
        ranks, case, resident = self.job.ranks, self.job.case, self.job.data.resident
        if ranks.is_sender:
            self._pair = ReplaySender(
                resident, ranks, SENDER, buffer_size=case.buffer_size, num_buffers=case.num_buffers
            )
        else:
            self._pair = ReplayReceiver(ranks, SENDER, resident)
        self._pair.bind(resident)

    def warm(self) -> None:
        """What a pair learns in its first pass serves all later ones; the second is counted."""
        self.run()
        with counting(self.counters):
            self.run()

    def run(self) -> None:
        if isinstance(self._pair, ReplaySender):
            self._pair.send()
        elif self._pair is not None:
            self._pair.receive()

    def close(self) -> None:
        self._pair = None


class OneByOneMethod(ResidentMethod):
    """One broadcast for each tensor; as bytes, since not every backend carries every dtype."""

    def warm(self) -> None:
        self.run()

    def run(self) -> None:
        for tensor in self.job.data.resident.values():
            if tensor.numel():
                self.job.ranks.broadcast(tensor.view(-1).view(torch.uint8), SENDER)


class PackedMethod(MethodRun):
    """Packed broadcasts on the original's wire: ours, borrowed, or the original's algorithm.

    From resident weights or from files; tensors are dropped, kept, or kept and then saved.
    Dropped tensors are checked by a second pass of the same kind, which is not timed.
    """

    def __init__(self, job: Job, write_folder: Path) -> None:
        super().__init__(job)
        self._write_folder = write_folder
        self._kept: Pairs = []

    def prepare(self) -> None:
        job, case = self.job, self.job.case
        job.data.check_specs()
        if case.method == "original":
            check_original_can(job.data.specs, case.buffer_size)
        largest = max((spec.nbytes for spec in job.data.specs), default=0)
        total = sum(spec.nbytes for spec in job.data.specs)
        # Each buffer is exceeded by up to a tensor, and made anew while the last one is in use.
        buffers = min(2 * total, (case.num_buffers + 1) * (case.buffer_size + largest))
        check_room(job, buffers + (total if case.sink in ("land", "write") else 0))
        if job.ranks.is_sender and case.source == "file":
            job.data.opened()  # or the others would wait for tensors that never come
            if job.cold:
                evict(job.data.paths())

    def warm(self) -> None:
        """A first pass, as all methods from device to device have; memory is there afterwards.

        Ours has another one, which is counted: to time each stage would slow the run down.
        """
        if self.job.case.source != "resident":
            return
        self._move(keep=False)
        if self.job.case.method == "compat":
            with counting(self.counters):
                self._move(keep=False)

    def run(self) -> None:
        self._move(keep=self.job.case.sink != "discard")
        if self.job.case.sink == "write" and not self.job.ranks.is_sender:
            self._save()

    def check(self) -> int:
        job = self.job
        if job.case.sink == "discard":
            sums = self._move(keep=False, weigh=True)
        elif job.case.sink == "write":
            sums = [] if job.ranks.is_sender else sums_of(self._saved())
        else:
            sums = sums_of(tensor for _, tensor in self._kept)
        return 0 if job.ranks.is_sender else wrong_tensors(sums, job.data.sums[job.case.source])

    def close(self) -> None:
        self._kept = []
        if self.job.case.sink == "write":
            shutil.rmtree(self._write_folder, ignore_errors=True)

    def _move(self, *, keep: bool, weigh: bool = False) -> list[int]:
        job, case, ranks = self.job, self.job.case, self.job.ranks
        sums: list[int] = []

        def take(pairs: Pairs) -> None:
            if keep:
                self._kept += pairs
            if weigh:
                sums.extend(sums_of(tensor for _, tensor in pairs))

        def value(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
            return pair[1]

        sizes = (case.buffer_size, case.num_buffers)
        described = ((spec.name, (spec.shape, spec.dtype)) for spec in job.data.specs)
        if case.method == "compat" and ranks.is_sender:
            packed_broadcast_producer(self._sent(), ranks, SENDER, value, *sizes)
        elif case.method == "compat":
            packed_broadcast_consumer(described, ranks, SENDER, take, *sizes, borrow=not keep)
        elif ranks.is_sender:
            original_producer(self._sent(), ranks, SENDER, value, *sizes, ranks.device)
        else:
            original_consumer(described, ranks, SENDER, take, *sizes, ranks.device)
        # The original leaves its last buffers in flight.
        ranks.synchronize()
        return sums

    def _sent(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.job.case.source == "file":
            return self.job.data.tensors(self.job.ranks.device)
        return iter(self.job.data.resident.items())

    def _save(self) -> None:
        """As the original's users save what they have kept: shard by shard."""
        tensors = dict(self._kept)
        try:
            self._write_folder.mkdir(parents=True)
            for path, names in self._shards():
                save_file({name: tensors[name] for name in names}, path)
        except Exception as error:  # safetensors has its own, OSError and others beside
            raise RunFailed(f"save_file: {error}") from error

    def _saved(self) -> Iterator[torch.Tensor]:
        for path, names in self._shards():
            with safe_open(path, framework="pt", device="cpu") as shard:
                for name in names:
                    yield shard.get_tensor(name)

    def _shards(self) -> list[tuple[Path, list[str]]]:
        return [
            (
                self._write_folder / spec.name.replace("/", "_"),
                [tensor.name for tensor in spec.header.tensors],
            )
            for spec in self.job.data.offered().files
            if spec.header
        ]


class LoadFileMethod(MethodRun):
    """Every rank loads the files itself, by safetensors' own `load_file`."""

    _loaded: dict[str, torch.Tensor]

    def prepare(self) -> None:
        self._loaded = {}
        self.job.data.check_specs()
        self.job.data.opened()
        if self.job.cold:
            evict(self.job.data.paths())

    def run(self) -> None:
        device = self.job.ranks.device
        try:
            for file in self.job.data.opened().files:
                if file.header is None:
                    continue
                for name, tensor in load_file(file.path, device=str(device)).items():
                    # On a CPU it maps the file, and reads nothing until somebody looks.
                    self._loaded[name] = _copy_of(tensor) if device.type == "cpu" else tensor
        except Exception as error:
            raise RunFailed(f"load_file: {error}") from error

    def check(self) -> int:
        found = sums_of(self._loaded[spec.name] for spec in self.job.data.specs)
        return wrong_tensors(found, self.job.data.sums["file"])

    def close(self) -> None:
        self._loaded = {}


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Byte for byte: a clone would tidy up booleans that are neither 0 nor 1."""
    return from_bytes(as_bytes("", tensor, tensor.device).clone(), tensor.shape, tensor.dtype)


def check_original_can(specs: Sequence[TensorSpec], buffer_size: int) -> None:
    """Raise PackcastError where the original's algorithm breaks on these tensors.

    It does so on one end, in mid stream, and leaves the other one waiting: so it is foretold.
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
