"""Ways that carry tensors: replays, the library functions, the original, one at a time.

The sender's tensors are resident, or are loaded from its files one after the other.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from packcast.bench.baselines import original_consumer, original_producer
from packcast.bench.check import sums_of, wrong_tensors
from packcast.bench.pagecache import evict
from packcast.bench.stock import file_tensors
from packcast.bench.ways import Job, Plain, RunFailed
from packcast.errors import PackcastError
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer
from packcast.packed.counters import counting
from packcast.packed.layout import TensorSpec, check_plan
from packcast.packed.replay import ReplayReceiver, ReplaySender

Pairs = list[tuple[str, torch.Tensor]]


class ReplayCase(Plain):
    """Resident weights into the workers' own tensors, by the pair that is made for it."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._pair: ReplaySender | ReplayReceiver | None = None

    def prepare(self) -> None:
        case = self.job.case
        try:
            check_plan(self.job.stock.specs, case.buffer_size, case.num_buffers)
        except ValueError as error:
            raise PackcastError(str(error)) from error
        _check_room(self.job, case.buffer_size * case.num_buffers)

    def connect(self) -> None:
        """Make the pair, which compares plans."""
        job = self.job
        if job.team.is_sender:
            self._pair = ReplaySender(
                job.stock.resident,
                job.team,
                job.team.sender,
                buffer_size=job.case.buffer_size,
                num_buffers=job.case.num_buffers,
            )
        else:
            self._pair = ReplayReceiver(job.team, job.team.sender, job.stock.resident)
        # As who sends the same tensors every step does.
        self._pair.bind(job.stock.resident)

    def warm(self) -> None:
        """What a pair learns in its first pass serves all later ones; the second is counted."""
        self.run()
        with counting(self.counters):
            self.run()

    def poison(self) -> None:
        poison_resident(self.job)

    def run(self) -> None:
        if isinstance(self._pair, ReplaySender):
            self._pair.send()
        elif self._pair is not None:
            self._pair.receive()

    def check(self) -> int:
        return wrong_resident(self.job)

    def close(self) -> None:
        self._pair = None


class OneByOneCase(Plain):
    """Resident weights into the workers' own tensors, one broadcast each."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # As bytes, since not every backend carries every dtype.
        self._flat = [
            tensor.view(-1).view(torch.uint8)
            for tensor in job.stock.resident.values()
            if tensor.numel()
        ]

    def warm(self) -> None:
        """A first pass, as all ways from device to device have."""
        self.run()

    def poison(self) -> None:
        poison_resident(self.job)

    def run(self) -> None:
        team = self.job.team
        for data in self._flat:
            team.broadcast(data, team.sender)

    def check(self) -> int:
        return wrong_resident(self.job)


class PackedCase(Plain):
    """Packed broadcasts on the original's wire: ours, borrowed, or the original's algorithm.

    From resident weights or from files; tensors are dropped, kept, or kept and then saved.
    Dropped tensors are checked by a second pass of the same kind, which is not timed.
    """

    def __init__(self, job: Job, write_folder: Path, *, cold: bool) -> None:
        super().__init__(job)
        self._write_folder = write_folder
        self._cold = cold
        self._kept: Pairs = []

    def prepare(self) -> None:
        job, case = self.job, self.job.case
        job.stock.check_specs()
        if case.method == "original":
            check_original_can(job.stock.specs, case.buffer_size)
        largest = max((spec.nbytes for spec in job.stock.specs), default=0)
        total = sum(spec.nbytes for spec in job.stock.specs)
        # Each buffer is exceeded by up to a tensor, and made anew while the last one is in use.
        buffers = min(2 * total, (case.num_buffers + 1) * (case.buffer_size + largest))
        _check_room(job, buffers + (total if case.sink in ("land", "write") else 0))
        if job.team.is_sender and case.source == "file":
            job.stock.shards()  # or the others would wait for tensors that never come
            if self._cold:
                evict(job.stock.paths())

    def warm(self) -> None:
        """A first pass, as all ways from device to device have; memory is there afterwards.

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
        if self.job.case.sink == "write" and not self.job.team.is_sender:
            self._save()

    def check(self) -> int:
        job = self.job
        if job.case.sink == "discard":
            sums = self._move(keep=False, weigh=True)
        elif job.case.sink == "write":
            sums = [] if job.team.is_sender else sums_of(self._saved())
        else:
            sums = sums_of(tensor for _, tensor in self._kept)
        return 0 if job.team.is_sender else wrong_tensors(sums, job.stock.sums[job.case.source])

    def close(self) -> None:
        self._kept = []
        if self.job.case.sink == "write":
            shutil.rmtree(self._write_folder, ignore_errors=True)

    def _move(self, *, keep: bool, weigh: bool = False) -> list[int]:
        job, case, team = self.job, self.job.case, self.job.team
        sums: list[int] = []

        def take(pairs: Pairs) -> None:
            if keep:
                self._kept += pairs
            if weigh:
                sums.extend(sums_of(tensor for _, tensor in pairs))

        sizes = (case.buffer_size, case.num_buffers)
        described = ((spec.name, (spec.shape, spec.dtype)) for spec in job.stock.specs)
        if case.method == "compat" and team.is_sender:
            packed_broadcast_producer(self._sent(), team, team.sender, _value, *sizes)
        elif case.method == "compat":
            packed_broadcast_consumer(described, team, team.sender, take, *sizes, borrow=not keep)
        elif team.is_sender:
            original_producer(self._sent(), team, team.sender, _value, *sizes, team.device)
        else:
            original_consumer(described, team, team.sender, take, *sizes, team.device)
        # The original leaves its last buffers in flight.
        team.synchronize()
        return sums

    def _sent(self) -> Iterator[tuple[str, torch.Tensor]]:
        stock = self.job.stock
        if self.job.case.source == "file":
            return file_tensors(stock, self.job.team.device)
        return iter(stock.resident.items())

    def _save(self) -> None:
        """As the original's users save what they have kept: shard by shard."""
        tensors = dict(self._kept)
        try:
            self._write_folder.mkdir(parents=True)
            for name, members in self._shards():
                chosen = {member: tensors[member] for member in members}
                save_file(chosen, self._write_folder / name)
        except Exception as error:  # safetensors has its own, OSError and others beside
            raise RunFailed(f"save_file: {error}") from error

    def _saved(self) -> Iterator[torch.Tensor]:
        for name, members in self._shards():
            with safe_open(self._write_folder / name, framework="pt", device="cpu") as shard:
                for member in members:
                    yield shard.get_tensor(member)

    def _shards(self) -> list[tuple[str, list[str]]]:
        offer = self.job.stock.offer
        assert offer is not None, "the sender has offered"
        return [
            (spec.name.replace("/", "_"), [tensor.name for tensor in spec.header.tensors])
            for spec in offer.files
            if spec.header
        ]


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


def poison_resident(job: Job) -> None:
    """Overwrite the workers' tensors with a byte that the sender's do not repeat."""
    if not job.team.is_sender:
        byte = random.randrange(256)
        for tensor in job.stock.resident.values():
            if tensor.numel():
                tensor.view(-1).view(torch.uint8).fill_(byte)


def wrong_resident(job: Job) -> int:
    """How many of this worker's tensors are not the sender's."""
    if job.team.is_sender:
        return 0
    found = sums_of(job.stock.resident[spec.name] for spec in job.stock.specs)
    return wrong_tensors(found, job.stock.sums["resident"])


def _value(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
    return pair[1]


def _check_room(job: Job, nbytes: int) -> None:
    """Raise PackcastError unless the device could hold so much more now.

    In the middle of a run it would be too late: the others would be left in a collective.
    """
    device = job.team.device
    try:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if nbytes > free:
                raise torch.OutOfMemoryError
        else:
            torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        case = job.case
        raise PackcastError(
            f"{device} has no room for {case.num_buffers} buffers of {case.buffer_size >> 20}MiB"
        ) from error
