"""What one rank has of the weights being measured: files, tensors, and what they should be.

Made and dropped between series, never while a run is timed.
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
from packcast.bench.model import SourceKind
from packcast.bench.team import Team
from packcast.bench.weights import Weight, write_weights
from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import OutgoingFile, outgoing_files
from packcast.checkpoint.tensors import Tensor
from packcast.errors import (
    CheckpointError,
    DestinationError,
    PackcastError,
    TransferError,
    UsageError,
)
from packcast.io.sinks.shelf import torch_dtype
from packcast.io.source import FileReader
from packcast.packed.layout import TensorSpec
from packcast.transfer.offer import Offer

_REMOVAL_LIMIT_S = 2.0


@dataclass(slots=True)
class Stock:
    """One shape on one rank. What is None is not there (yet), or not on this rank.

    `folder` is set where this rank wrote the files itself and has to remove them. `blocks` and
    `sums` are what the sender says is right: digests of each file's blocks, tensors' sums.
    """

    shape: str
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    files: tuple[OutgoingFile, ...] = ()
    offer: Offer | None = None
    specs: tuple[TensorSpec, ...] = ()
    specs_fault: CheckpointError | None = None
    resident: dict[str, torch.Tensor] = field(default_factory=dict)
    blocks: list[bytes] | None = None
    sums: dict[SourceKind, list[int]] = field(default_factory=dict)
    dropping: threading.Lock = field(default_factory=threading.Lock)
    is_dropped: bool = False

    def check_specs(self) -> None:
        """Raise CheckpointError where torch cannot represent all tensors."""
        if self.specs_fault is not None:
            raise self.specs_fault

    def reader(self) -> FileReader:
        """Opens the files anew; raises CheckpointError where this rank has none."""
        return FileReader(self.files, self.opened().files)

    def paths(self) -> list[Path]:
        """Every file of the checkpoint on this rank's host."""
        return [file.path for file in self.opened().files]

    def shards(self) -> list[tuple[Path, Sequence[Tensor]]]:
        """Each shard with its tensors, in the order of all."""
        files = self.opened().files
        return [(file.path, file.header.tensors) for file in files if file.header]

    def opened(self) -> Checkpoint:
        """The checkpoint; raises CheckpointError where this rank has none."""
        if self.checkpoint is None:
            raise CheckpointError(f"this rank cannot read {self.shape}")
        return self.checkpoint


def write_stock(
    stock: Stock, folder: Path, weights: Sequence[Weight], written: Callable[[int], object]
) -> None:
    """Write generated weights; whoever ends the bench drops the stock, maybe meanwhile."""

    def go_on(nbytes: int) -> None:
        if stock.is_dropped:
            raise TransferError("the bench is over")
        written(nbytes)

    try:
        with stock.dropping:  # nothing is made behind its back
            go_on(0)
            folder.mkdir(parents=True)
            stock.folder = folder
        write_weights(folder, weights, go_on)
    except OSError as error:
        raise DestinationError(f"cannot write {folder}: {error.strerror}") from error


def open_stock(stock: Stock, path: Path) -> None:
    """Take the checkpoint at `path`, written for the bench or given."""
    stock.checkpoint = open_checkpoint(path)
    stock.files = outgoing_files(stock.checkpoint)


def drop_stock(stock: Stock) -> None:
    """Free tensors and remove files that were made for it. Idempotent, from any thread."""
    with stock.dropping:
        stock.is_dropped = True
    stock.resident.clear()
    if stock.folder is None:
        return
    deadline = time.monotonic() + _REMOVAL_LIMIT_S
    while True:
        shutil.rmtree(stock.folder, ignore_errors=True)
        # Threads that are still writing may have made another file in it.
        if not stock.folder.exists() or time.monotonic() > deadline:
            return
        time.sleep(0.01)


def specs_of_weights(weights: Sequence[Weight]) -> tuple[TensorSpec, ...]:
    """What the generated weights are as tensors."""
    return tuple(TensorSpec(w.name, w.shape, torch.bfloat16) for w in weights)


def take_offer(stock: Stock, offer: Offer) -> None:
    """What the sender says the files are, and as tensors, if torch has them all."""
    stock.offer = offer
    try:
        stock.specs = tuple(
            TensorSpec(tensor.name, tensor.shape, torch_dtype(tensor, spec.name))
            for spec in offer.files
            if spec.header
            for tensor in spec.header.tensors
        )
    except UsageError as fault:
        # Its hint is for a transfer; in a bench only what loads tensors cannot be measured.
        stock.specs_fault = CheckpointError(fault.message)


def make_resident(stock: Stock, team: Team) -> None:
    """Tensors on this rank's device: random on all, so that nothing is right by chance.

    Raises PackcastError where the device has no room.
    """
    stock.check_specs()
    generator = torch.Generator(device=team.device).manual_seed(1 + team.rank)
    try:
        for spec in stock.specs:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=team.device)
            stock.resident[spec.name] = tensor
            if tensor.numel():
                flat = tensor.view(-1).view(torch.uint8)
                whole = flat.numel() // 8 * 8
                flat[:whole].view(torch.int64).random_(generator=generator)
                flat[whole:].random_(generator=generator)
    except RuntimeError as error:  # out of memory; the CPU's is a plain one
        stock.resident.clear()
        raise PackcastError(f"no room for the weights on {team.device}") from error


def file_tensors(stock: Stock, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of every shard, loaded as the original's users load them."""
    for path, tensors in stock.shards():
        with safe_open(path, framework="pt", device=str(device)) as shard:
            for tensor in tensors:
                yield tensor.name, shard.get_tensor(tensor.name)


def true_blocks(stock: Stock) -> list[bytes]:
    """Digests of the files as they lie on the sender's disk."""
    return digests_of_files([file.spec for file in stock.files], stock.reader().read)


def true_sums(stock: Stock, source: SourceKind, device: torch.device) -> list[int]:
    """Sums of the sender's tensors, in order."""
    if source == "file":
        return sums_of(tensor for _, tensor in file_tensors(stock, device))
    return sums_of(stock.resident[spec.name] for spec in stock.specs)
