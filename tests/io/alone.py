"""One process that sends a checkpoint to itself: source, ring and landing, and no group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from packcast.checkpoint.checkpoint import Checkpoint
from packcast.checkpoint.outgoing import FileSpec, outgoing_files
from packcast.io.landing import Landing, Sink
from packcast.io.pinned import Arena
from packcast.io.source import FileReader, FileSource
from packcast.io.staging import Buffers
from packcast.packed.counters import Counters
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import plan_chunks, slot_nbytes
from packcast.packed.ring import Ring
from packcast.packed.trailer import transfer_tag

Spoil = Callable[[torch.Tensor], object]


def make_buffers(buffer_size: int, num_buffers: int, *, helpers: bool) -> Buffers:
    """A CPU ring, poisoned; with helpers its slots lie where they can reach them."""
    nbytes = slot_nbytes(buffer_size)
    slots, memory = None, torch.empty(num_buffers * nbytes, dtype=torch.uint8)
    if helpers:
        slots = Arena(num_buffers * nbytes, is_pinned=False)
        memory = slots.tensor
    memory.fill_(0xA5)
    ring = Ring(torch.device("cpu"), nbytes, num_buffers, Counters(trace=True), memory=memory)
    return Buffers(ring, buffer_size, 0, transfer_tag("test"), helpers=helpers, slots=slots)


def specs_of(checkpoint: Checkpoint) -> list[FileSpec]:
    return [file.spec for file in outgoing_files(checkpoint)]


def run_alone(
    checkpoint: Checkpoint,
    sink: Sink,
    *,
    helpers: bool = False,
    buffer_size: int = 1 << 20,
    spoil: Spoil = lambda _: None,
) -> Sequence[str]:
    """From the checkpoint's files through a ring of two into `sink`; the files' digests.

    What it meets is its own, since nobody else takes part; `spoil` is the collective.
    """
    files = outgoing_files(checkpoint)
    specs = [file.spec for file in files]
    chunks = plan_chunks([spec.nbytes for spec in specs], buffer_size, [0])
    buffers = make_buffers(buffer_size, 2, helpers=helpers)
    reader = FileReader(files, checkpoint.files)
    source = FileSource(chunks, reader, buffers, num_hands=2)
    landing = Landing(sink, specs, buffers, num_hands=2)
    run_pipeline(
        chunks,
        rank=0,
        ring=buffers.ring,
        broadcast=lambda tensor, _: spoil(tensor),
        source=source,
        drain=landing,
    )
    assert source.digests.of_files() == landing.digests.of_files()
    return landing.digests.of_files()
