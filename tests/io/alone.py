"""One process that sends a checkpoint to itself: source, ring and landing, and no group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from packcast.checkpoint.checkpoint import Checkpoint
from packcast.checkpoint.outgoing import FileSpec, OutgoingFile, outgoing_files
from packcast.io.landing import Landing, Sink
from packcast.io.source import FileReader, FileSource
from packcast.io.staging import Buffers
from packcast.packed.counters import Counters
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import plan_chunks, slot_nbytes
from packcast.packed.ring import Ring
from packcast.packed.trailer import transfer_tag


class Kept(dict[str, torch.Tensor]):
    """Takes every tensor, each once."""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        assert name not in self
        self[name] = tensor

    def finish(self) -> None: ...

    def stop(self) -> None: ...


Spoil = Callable[[torch.Tensor], object]


def make_buffers(buffer_size: int, num_buffers: int, *, staging_nbytes: int = 0) -> Buffers:
    """A CPU ring, poisoned. With staging it is as beside a GPU that copies at once: memory of its
    own lies between files and slots; the test says what pins it (see the fixture `cudart`)."""
    ring = Ring(torch.device("cpu"), slot_nbytes(buffer_size), num_buffers, Counters(trace=True))
    ring.overwrite(0xA5)
    if staging_nbytes:
        ring.is_host = False
    return Buffers(ring, buffer_size, staging_nbytes, transfer_tag("test"))


def specs_of(checkpoint: Checkpoint) -> list[FileSpec]:
    return [file.spec for file in outgoing_files(checkpoint)]


def run_alone(
    checkpoint: Checkpoint,
    sink: Sink,
    *,
    files: Sequence[OutgoingFile] = (),
    buffer_size: int = 1 << 20,
    num_buffers: int = 2,
    staging_nbytes: int = 0,
    spoil: Spoil = lambda _: None,
    tolerant: bool = False,
) -> Landing:
    """From the checkpoint's files through a ring into `sink`; `spoil` is the collective.

    What it meets is its own, since nobody else takes part.
    """
    files = files or outgoing_files(checkpoint)
    specs = [file.spec for file in files]
    chunks = plan_chunks([spec.nbytes for spec in specs], buffer_size, [0])
    buffers = make_buffers(buffer_size, num_buffers, staging_nbytes=staging_nbytes)
    with ExitStack() as ending:
        source = FileSource(chunks, FileReader(files, checkpoint.files), buffers, num_threads=2)
        ending.callback(source.close)
        landing = Landing(chunks, sink, specs, buffers, num_threads=2, tolerant=tolerant)
        ending.callback(landing.close)
        source.read_ahead()
        run_pipeline(
            chunks,
            rank=0,
            ring=buffers.ring,
            broadcast=lambda tensor, _: spoil(tensor),
            source=source,
            drain=landing,
            begin=lambda chunk, _: source.begin(chunk),
        )
    if not tolerant:
        assert source.digests().of_files() == landing.digests().of_files()
    return landing
