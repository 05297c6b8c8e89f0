"""What one rank has of the weights being measured: files, tensors, and what they should be.

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
from packcast.packed.chain_order import chain_order
from packcast.packed.layout import TensorSpec
from packcast.packed.plan import plan_chunks, plan_digest
from packcast.transfer.offer import Offer
from packcast.transfer.protocol import RankAssignment

_REMOVAL_LIMIT_S = 2.0


@dataclass(slots=True)
class Dataset:
    """One shape on one rank. What is None is not there (yet), or not on this rank.

    `folder` is set where this rank wrote the files itself and has to remove them. `offer` is what a
    sender would say of the files. `blocks` and `sums` are what the sender says is right: digests of
    each file's blocks, tensors' sums.
    """

    shape: str
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    files: tuple[OutgoingFile, ...] = ()
    offer: Offer | None = None
    able: tuple[int, ...] = (SENDER,)  # ranks that see the sender's files
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
        """The checkpoint; raises CheckpointError where this rank has none."""
        if self.checkpoint is None:
            raise CheckpointError(f"this rank cannot read {self.shape}")
        return self.checkpoint

    def offered(self) -> Offer:
        """What all ranks know of the files."""
        assert self.offer is not None, "it is shared before any case from files"
        return self.offer

    def paths(self) -> list[Path]:
        """Every file of the checkpoint on this rank's host."""
        return [file.path for file in self.opened().files]

    def tensors(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of every shard, loaded as the original's users load them."""
        for file in self.opened().files:
            if file.header:
                with safe_open(file.path, framework="pt", device=str(device)) as shard:
                    for tensor in file.header.tensors:
                        yield tensor.name, shard.get_tensor(tensor.name)

    def write(self, folder: Path, weights: Sequence[Weight], written: Callable[[], object]) -> None:
        """Write generated weights; whoever ends the bench drops them, maybe meanwhile."""

        def go_on(_: int) -> None:
            if self._is_dropped:
                raise TransferError("the bench is over")
            written()

        try:
            with self._dropping:  # nothing is made behind its back
                go_on(0)
                folder.mkdir(parents=True)
                self.folder = folder
            write_weights(folder, weights, go_on)
        except OSError as error:
            raise DestinationError(f"cannot write {folder}: {error.strerror}") from error

    def drop(self) -> None:
        """Free tensors and remove files that were made for it. Idempotent, from any thread."""
        with self._dropping:
            self._is_dropped = True
        self.resident.clear()
        if self.folder is None:
            return
        deadline = time.monotonic() + _REMOVAL_LIMIT_S
        while True:
            shutil.rmtree(self.folder, ignore_errors=True)
            # Threads that are still writing may have made another file in it.
            if not self.folder.exists() or time.monotonic() > deadline:
                return
            time.sleep(0.01)


def share_files(data: Dataset, settings: BenchSettings, ranks: Ranks, path: Path | None) -> None:
    """Open the files at `path` where this rank has them, and let all know what the sender has."""

    def open_mine() -> str | None:
        if path is None:
            return None
        data.checkpoint = open_checkpoint(path)
        data.files = outgoing_files(data.checkpoint)
        return data.checkpoint.fingerprint()

    def open_if_there() -> str | None:
        # Of a given checkpoint the sender's is the one that counts; others may not see it.
        try:
            return open_mine()
        except PackcastError:
            if ranks.is_sender or settings.checkpoint is None:
                raise
            return None

    fingerprint = ranks.attempt(open_if_there)
    found = ranks.gather(fingerprint)
    data.able = tuple(rank for rank, one in enumerate(found) if one == found[SENDER])
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
    except UsageError as fault:
        # Its hint is for a transfer; in a bench only what loads tensors cannot be measured.
        data.specs_fault = CheckpointError(fault.message)


def _share_offer(data: Dataset, settings: BenchSettings, ranks: Ranks) -> Offer:
    """The sender's description of the files, as the ranks of a transfer get it."""
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
            staging=settings.staging,
            readers=(SENDER,),
            chain=tuple(chain_order([str(host) for host in ranks.hosts])),
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
    told = ranks.share(offer.to_bytes().decode("latin-1") if offer else None)
    return offer or Offer.from_bytes(told.encode("latin-1"), assignment)


def offer_of_case(data: Dataset, case: Case, ranks: Ranks) -> Offer:
    """What the sender would offer for this case: the files' offer with the case's own numbers."""
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
    """Tensors on this rank's device: random on all, so that nothing is right by chance.

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
    """What is right, from the sender's mouth: digests of files' blocks, sums of tensors."""
    if blocks:
        tables: list[str] = []
        if ranks.is_sender:
            specs = [file.spec for file in data.files]
            read = FileReader(data.files, data.opened().files).read
            tables = [table.hex() for table in digests_of_files(specs, read)]
        data.blocks = [bytes.fromhex(table) for table in ranks.share(tables)]
    if sums:
        found: list[int] = []
        if ranks.is_sender and source == "file":
            found = sums_of(tensor for _, tensor in data.tensors(ranks.device))
        elif ranks.is_sender:
            found = sums_of(data.resident[spec.name] for spec in data.specs)
        data.sums[source] = ranks.share(found)
