"""An end that is closed by another thread than the loop's, which waits in it: the loop goes on.

So it is where a library's caller gives up a transfer whose thread is stuck.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from packcast.io.hands import Order, ThreadHands

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.errors import PackcastError, TransferError
from packcast.io import source
from packcast.io.landing import Landing
from packcast.io.source import FileReader, FileSource
from packcast.io.work import perform
from packcast.packed.plan import BLOCK, plan_chunks
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.sinks import MemorySink
from tests.helpers.waiting import Waiter
from tests.io.alone import make_buffers, specs_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """One file of three chunks."""
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (3 * BLOCK - 1000,))})
    return open_checkpoint(tmp_path / "m.safetensors")


def test_who_waits_for_a_sink_that_hangs_goes_on_when_the_landing_is_closed(
    checkpoint: Checkpoint,
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hang(file: int, offset: int) -> None:
        begun.set()
        go_on.wait(20)

    specs, buffers = specs_of(checkpoint), make_buffers(BLOCK, 2, helpers=False)
    chunks = plan_chunks([spec.nbytes for spec in specs], BLOCK, [0])
    reading = FileSource(
        chunks, FileReader(outgoing_files(checkpoint), checkpoint.files), buffers, num_hands=1
    )
    landing = Landing(MemorySink(specs, hang), specs, buffers, num_hands=1)
    slot = buffers.ring.take(chunks[0])
    reading.fill(chunks[0], slot)
    landing.drain(chunks[0], slot)
    assert begun.wait(20)
    finishing = Waiter(landing.finish)
    assert finishing.waits()
    landing.close()
    with pytest.raises(TransferError, match="is over"):
        finishing.result()
    go_on.set()
    reading.close()


def test_who_waits_for_what_is_read_next_goes_on_when_the_source_is_closed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()

    class HeldUp(ThreadHands):
        """Its first job is done at once, but whoever brought it is kept until the end."""

        def submit(self, orders: Sequence[Order]) -> None:
            for job, memory, done in orders:
                done(perform(job, memory))
            held.wait(20)

        def close(self) -> None:
            held.set()
            super().close()

    monkeypatch.setattr(source, "make_hands", lambda *_: HeldUp(1, "test"))
    buffers = make_buffers(BLOCK, 2, helpers=False)
    specs = specs_of(checkpoint)
    chunks = plan_chunks([spec.nbytes for spec in specs], BLOCK, [0])
    reading = FileSource(
        chunks, FileReader(outgoing_files(checkpoint), checkpoint.files), buffers, num_hands=1
    )
    slots = [buffers.ring.take(chunk) for chunk in chunks[:2]]
    reading.fill(chunks[0], slots[0])
    filling = Waiter(lambda: reading.fill(chunks[1], slots[1]))
    assert filling.waits()
    reading.close()
    with pytest.raises(TransferError, match="is over"):
        filling.result()


def test_hands_that_cannot_take_a_job_are_told_of_and_not_waited_for(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ThreadHands):
        def submit(self, orders: Sequence[Order]) -> None:
            raise MemoryError

    monkeypatch.setattr(source, "make_hands", lambda *_: Broken(1, "test"))
    buffers = make_buffers(BLOCK, 2, helpers=False)
    chunks = plan_chunks([spec.nbytes for spec in specs_of(checkpoint)], BLOCK, [0])
    reader = FileReader(outgoing_files(checkpoint), checkpoint.files)
    reading = FileSource(chunks, reader, buffers, num_hands=1)
    with pytest.raises(PackcastError, match="reading failed: MemoryError"):
        reading.fill(chunks[0], buffers.ring.take(chunks[0]))
    reading.close()
