"""An end that is closed by another thread than the loop's, which waits in it: the loop goes on.

So it is where a library's caller gives up a transfer whose thread is stuck.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.errors import TransferError
from packcast.io.landing import Landing
from packcast.io.source import FileReader, FileSource
from packcast.packed.plan import BLOCK, plan_chunks
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.sinks import MemorySink
from tests.helpers.waiting import Waiter
from tests.io.alone import make_buffers, specs_of
from tests.io.pools import Gate

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
