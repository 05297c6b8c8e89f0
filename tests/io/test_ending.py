"""An end that is closed by another thread than the loop's, which waits in it: the loop goes on.

So it is where a library's caller gives up a transfer whose thread is stuck.
"""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.errors import TransferError
from packcast.io.landing import Landing
from packcast.io.source import FileReader, FileSource
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import BLOCK, plan_chunks
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.processes import num_descriptors
from tests.helpers.sinks import MemorySink
from tests.helpers.waiting import Waiter
from tests.io.alone import make_buffers, specs_of
from tests.io.cuda import Cudart
from tests.io.pools import Gate, no_thread_left

pytestmark = pytest.mark.usefixtures("pool")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """One file of three chunks."""
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (3 * BLOCK - 1000,))})
    return open_checkpoint(tmp_path / "m.safetensors")


def test_who_waits_for_the_sink_goes_on_when_the_landing_is_closed(checkpoint: Checkpoint) -> None:
    specs, buffers = specs_of(checkpoint), make_buffers(BLOCK, 2)
    chunks = plan_chunks([spec.nbytes for spec in specs], BLOCK, [0])
    landing = Landing(chunks, MemorySink(specs), specs, buffers, num_threads=2)
    finishing = Waiter(landing.finish)  # of chunks that never come
    assert finishing.waits()
    landing.close()
    with pytest.raises(TransferError, match="is over"):
        finishing.result()


def test_who_waits_for_what_is_read_next_goes_on_when_the_source_is_closed(
    checkpoint: Checkpoint, held_reads: Callable[[int], Gate]
) -> None:
    gate = held_reads(BLOCK + BLOCK // 2)
    buffers = make_buffers(BLOCK, 2)
    chunks = plan_chunks([spec.nbytes for spec in specs_of(checkpoint)], BLOCK, [0])
    reader = FileReader(outgoing_files(checkpoint), checkpoint.files)
    reading = FileSource(chunks, reader, buffers, num_threads=1)
    slots = [buffers.ring.take(chunk) for chunk in chunks[:2]]
    reading.fill(chunks[0], slots[0])
    filling = Waiter(lambda: reading.fill(chunks[1], slots[1]))
    gate.await_reached()
    assert filling.waits()
    reading.close()  # although the thread is stuck in its read
    with pytest.raises(TransferError, match="is over"):
        filling.result()
    gate.open()
    reading.close()


@pytest.mark.parametrize("staging_blocks", [0, 3])
def test_memory_of_a_transfer_does_not_wait_for_the_garbage_collector(
    checkpoint: Checkpoint, cudart: Cudart, staging_blocks: int
) -> None:
    buffers = make_buffers(BLOCK, 2, staging_nbytes=staging_blocks * BLOCK)
    chunks = plan_chunks([spec.nbytes for spec in specs_of(checkpoint)], BLOCK, [0])
    reader = FileReader(outgoing_files(checkpoint), checkpoint.files)
    source = FileSource(chunks, reader, buffers, num_threads=2)
    for chunk in chunks:
        source.fill(chunk, buffers.ring.take(chunk))
    source.close()
    memory = weakref.ref(buffers.ring.memory)
    gc.disable()
    try:
        del source, buffers, reader
        assert memory() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(20))
def test_a_transfer_may_be_ended_at_any_time_and_is_over_soon(
    checkpoint: Checkpoint, seed: int, pauses: None, cudart: Cudart
) -> None:
    dice = random.Random(seed)
    num_before = num_descriptors()
    specs = specs_of(checkpoint)
    buffers = make_buffers(BLOCK, 2, staging_nbytes=dice.choice([0, 3]) * BLOCK)
    chunks = plan_chunks([spec.nbytes for spec in specs], BLOCK, [0])
    reader = FileReader(outgoing_files(checkpoint), checkpoint.files)
    with no_thread_left():
        source = FileSource(chunks, reader, buffers, num_threads=2)
        landing = Landing(chunks, MemorySink(specs), specs, buffers, num_threads=2)

        def move() -> None:
            run_pipeline(
                chunks,
                rank=0,
                ring=buffers.ring,
                broadcast=lambda *_: time.sleep(0.0005),
                source=source,
                drain=landing,
                begin=lambda chunk, _: source.begin(chunk),
            )

        moving = Waiter(move)
        time.sleep(dice.random() * 0.006)
        began = time.monotonic()
        for end in dice.sample([source, landing], 2):
            end.close()
        with suppress(TransferError):  # unless it was through before
            moving.result()
        assert time.monotonic() - began < 3
    assert num_descriptors() <= num_before
    assert cudart.pinned == []
