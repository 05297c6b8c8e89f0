"""What a rank of a bench takes the offered files for, as tensors."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest
import torch

from packcast.bench.stock import Stock, drop_stock, take_offer, write_stock
from packcast.bench.weights import make_layout
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.outgoing import FileSpec, outgoing_files
from packcast.errors import CheckpointError, DestinationError, TransferError
from packcast.units import MIB
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.waiting import Waiter
from tests.transfer.offers import offer_of


def files_of(path: Path, dtype: str) -> list[FileSpec]:
    write_safetensors(path, {"known": ("BF16", (3,)), "odd": (dtype, (2, 8))})
    return [file.spec for file in outgoing_files(open_checkpoint(path))]


@pytest.mark.parametrize(
    ("dtype", "expected"), [("U16", torch.uint16), ("F8_E4M3FNUZ", torch.float8_e4m3fnuz)]
)
def test_every_dtype_that_a_transfer_can_receive_can_be_measured(
    tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    stock = Stock("dense")
    take_offer(stock, offer_of(files_of(tmp_path / "a.safetensors", dtype)))
    stock.check_specs()
    assert [(spec.name, spec.dtype) for spec in stock.specs] == [
        ("known", torch.bfloat16),
        ("odd", expected),
    ]


def test_a_dtype_that_torch_has_not_is_the_checkpoints_fault_and_named(tmp_path: Path) -> None:
    stock = Stock("dense")
    take_offer(stock, offer_of(files_of(tmp_path / "a.safetensors", "F4")))
    with pytest.raises(CheckpointError, match=r"tensor odd in a\.safetensors is F4, which torch"):
        stock.check_specs()
    assert stock.specs_fault is not None
    # Nothing is sent or received with options of a transfer here.
    assert stock.specs_fault.hint is None


@pytest.mark.parametrize("attempt", range(20))
def test_what_is_dropped_while_it_is_written_is_gone_for_good(tmp_path: Path, attempt: int) -> None:
    """As an interrupt does it, from another thread, and then the process ends at once."""
    stock, folder = Stock("dense"), tmp_path / "above" / "made"
    begun, pieces = threading.Event(), itertools.count()

    def written(_: int) -> None:
        begun.set()
        while next(pieces) >= 40 and not stock.is_dropped:  # never through before the drop
            time.sleep(0.001)

    weights = make_layout("dense", 64 * MIB)
    writing = Waiter(lambda: write_stock(stock, folder, weights, written))
    begun.wait(attempt % 2 * 20)
    time.sleep(attempt * 0.002)
    drop_stock(stock)
    assert not folder.exists()
    with pytest.raises((TransferError, DestinationError)):
        writing.result()
    assert not folder.exists()
