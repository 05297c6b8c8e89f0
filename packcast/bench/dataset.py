"""One rank's copy of the weights being measured: files, tensors, and their true digests and sums.

Made and dropped between tables, never while a run is timed.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from packcast.bench.check import digests_of_files, sums_of
from packcast.bench.model import SENDER, BenchSettings, Case, SourceKind
from packcast.bench.ranks import Ranks
from packcast.bench.weights import Weight, write_weights
from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import OutgoingFile, outgoing_files
from packcast.errors import (
    CheckpointError,
    DestinationError,
    PackcastError,
    TransferError,
    UsageError,
)
from packcast.io.sinks.tensor_destination import torch_dtype
from packcast.io.source import FileReader
from packcast.packed.layout import TensorSpec
from packcast.packed.plan import plan_chunks, plan_digest
from packcast.transfer.offer import Offer
from packcast.transfer.protocol import RankAssignment

_REMOVAL_LIMIT_S = 2.0


@dataclass(slots=True)
class Dataset:
    """One shape on one rank. `checkpoint` and `files` are empty on a rank that cannot read them.

    `folder` is set where this rank has written the files itself and has to remove them. `offer` is
    the sender's description of the files. `blocks` and `sums` are computed by the sender: digests
    of each file's blocks, sums of tensors.
    """

    shape: str
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    files: tuple[OutgoingFile, ...] = ()
    offer: Offer | None = None
    able: tuple[int, ...] = (SENDER,)  # the ranks that see the sender's files
    specs: tuple[TensorSpec, ...] = ()
    specs_fault: CheckpointError | None = None
    resident: dict[str, torch.Tensor] = field(default_factory=dict)
    blocks: list[bytes] = field(default_factory=list)
    sums: dict[SourceKind, list[int]] = field(default_factory=dict)
    _dropping: threading.Lock = field(default_factory=threading.Lock)
    _is_dropped: bool = False

    def check_specs(self) -> None:
        """Raise CheckpointError where torch cannot represent all tensors."""
        if self.specs_fault is not None:
            raise self.specs_fault

    def opened(self) -> Checkpoint:
        """The checkpoint; raises CheckpointError where this rank cannot read it."""
        if self.checkpoint is None:
            raise CheckpointError(f"this rank cannot read {self.shape}")
        return self.checkpoint

    def offered(self) -> Offer:
        assert self.offer is not None, "shared before any case from files"
        return self.offer

    def paths(self) -> list[Path]:
        """Every file of the checkpoint."""
        return [file.path for file in self.opened().files]

    def tensors(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of every shard, loaded one by one as the original's users do."""
        for file in self.opened().shards:
            with safe_open(file.path, framework="pt", device=str(device)) as shard:
                for name in file.header.tensors.names if file.header else ():
                    yield name, shard.get_tensor(name)

    def write(self, folder: Path, weights: Sequence[Weight], written: Callable[[], object]) -> None:
        """Write generated weights. Stops when another thread calls `drop`."""

        def go_on(_: int) -> None:
            if self._is_dropped:
                raise TransferError("the bench is over")
            written()

        try:
            with self._dropping:
                go_on(0)
                folder.mkdir(parents=True)
                self.folder = folder
            write_weights(folder, weights, go_on)
        except OSError as error:
            raise DestinationError(f"cannot write {folder}: {error.strerror}") from error

    def drop(self) -> None:
        """Free the tensors and remove the files that were made. Idempotent, from any thread."""
        with self._dropping:
            self._is_dropped = True
        self.resident.clear()
        deadline = time.monotonic() + _REMOVAL_LIMIT_S
        # Threads that still write may add another file meanwhile.
        while self.folder and self.folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(self.folder, ignore_errors=True)
            time.sleep(0.01)


def share_files(data: Dataset, settings: BenchSettings, ranks: Ranks, path: Path | None) -> None:
    """Open the files at `path`, if this rank has them, and share the sender's offer. All ranks."""

    def open_files() -> str | None:
        if path is None:
            return None
        try:
            data.checkpoint = open_checkpoint(path)
            data.files = outgoing_files(data.checkpoint)
        except PackcastError:
            if ranks.is_sender or settings.checkpoint is None:
                raise
            return None  # a given checkpoint may be on the sender's host alone
        return data.checkpoint.fingerprint()

    fingerprints = ranks.gather(ranks.attempt(open_files))
    data.able = tuple(i for i, one in enumerate(fingerprints) if one == fingerprints[SENDER])
    if ranks.rank not in data.able:
        data.checkpoint = None
    data.offer = _share_offer(data, settings, ranks)
    try:
        data.specs = tuple(
            TensorSpec(tensor.name, tensor.shape, torch_dtype(tensor, spec.name))
            for spec in data.offer.files
            if spec.header
            for tensor in spec.header.tensors
        )
    except UsageError as fault:  # its hint is for a transfer
        data.specs_fault = CheckpointError(fault.message)


def _share_offer(data: Dataset, settings: BenchSettings, ranks: Ranks) -> Offer:
    """The sender's description of the files, as the ranks of a transfer receive it."""
    assignment = RankAssignment(
        rank=ranks.rank,
        device=str(ranks.device),
        ranks_on_host=ranks.on_my_host(range(ranks.world_size)),
        readers_on_host=1,
    )
    offer: Offer | None = None
    if ranks.is_sender:
        sizes = [file.spec.nbytes for file in data.files]
        buffer_size = settings.buffer_sizes[0]
        offer = Offer(
            files=tuple(file.spec for file in data.files),
            buffer_size=buffer_size,
            num_buffers=settings.num_buffers[0],
            staging=settings.transfer.staging,
            readers=(SENDER,),
            chain=ranks.order,
            plan=plan_digest(sizes, buffer_size, plan_chunks(sizes, buffer_size, (SENDER,))),
            digest="xxh3_128",
            include=(),
            exclude=(),
            samples=(),
            world_size=ranks.world_size,
            backend="nccl" if ranks.on_gpu else "gloo",
            reason="",
            loud=False,
            assignment=assignment,
        )
    text = ranks.share(offer.to_bytes().decode("latin-1") if offer else None)
    return offer or Offer.from_bytes(text.encode("latin-1"), assignment)


def offer_of_case(data: Dataset, case: Case, ranks: Ranks) -> Offer:
    """The offer of the files with the case's buffers and readers."""
    base = data.offered()
    sizes = [spec.nbytes for spec in base.files]
    readers = data.able[: case.readers]
    chunks = plan_chunks(sizes, case.buffer_size, readers)
    assignment = base.assignment.model_copy(
        update={"readers_on_host": max(1, ranks.on_my_host(readers))}
    )
    return base.model_copy(
        update={
            "buffer_size": case.buffer_size,
            "num_buffers": case.num_buffers,
            "readers": readers,
            "plan": plan_digest(sizes, case.buffer_size, chunks),
            "assignment": assignment,
        }
    )


def make_resident(data: Dataset, ranks: Ranks) -> None:
    """Random tensors on this rank's device, different on each rank.

    Raises PackcastError where the device has no room.
    """
    data.check_specs()
    generator = torch.Generator(device=ranks.device).manual_seed(1 + ranks.rank)
    try:
        for spec in data.specs:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=ranks.device)
            data.resident[spec.name] = tensor
            if tensor.numel():
                flat = tensor.view(-1).view(torch.uint8)
                whole = flat.numel() // 8 * 8
                flat[:whole].view(torch.int64).random_(generator=generator)
                flat[whole:].random_(generator=generator)
    except RuntimeError as error:  # out of memory; the CPU's is a plain one
        data.resident.clear()
        raise PackcastError(f"no room for the weights on {ranks.device}") from error


def share_truth(
    data: Dataset, ranks: Ranks, source: SourceKind, *, blocks: bool, sums: bool
) -> None:
    """Share the sender's digests of the files' blocks and its sums of tensors. All ranks."""
    if blocks:
        digests: list[str] = []
        if ranks.is_sender:
            specs = [file.spec for file in data.files]
            read = FileReader(data.files, data.opened().files).read
            digests = [table.hex() for table in digests_of_files(specs, read)]
        data.blocks = [bytes.fromhex(table) for table in ranks.share(digests)]
    if sums:
        values: list[int] = []
        if ranks.is_sender:
            from_files = source == "file"
            pairs = data.tensors(ranks.device) if from_files else data.resident.items()
            values = sums_of(tensor for _, tensor in pairs)
        data.sums[source] = ranks.share(values)
