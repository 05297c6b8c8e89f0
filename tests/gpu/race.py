"""One rank of the race hunt: small buffers, poisoned slots, delays everywhere, bytes compared.

Run by torchrun with one rank per GPU; `test_race.py` does. Prints one line per round and exits 1
on the first byte that is wrong.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.io import native
from packcast.io.landing import Landing
from packcast.io.source import FileReader, FileSource
from packcast.io.staging import Buffers
from packcast.packed.counters import Counters
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import plan_chunks, slot_nbytes
from packcast.packed.ring import Ring
from packcast.packed.trailer import transfer_tag
from tests.helpers.checkpoints import sharded
from tests.helpers.native import built
from tests.helpers.sinks import MemorySink

MIB = 1 << 20
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 20


def dawdling_threads() -> None:
    """Native I/O threads that nap, each time before they begin; Python's where none compile."""
    library = built("-DPACKCAST_JITTER_NS=4000000")
    if library is not None:
        opened = native.open_library(library)
        patched: Any = native
        patched.installed = lambda: opened


def one_round(seed: int, rank: int, world_size: int, folder: Path) -> bool:
    """Send once with everything drawn from `seed`; True if every byte is right on this rank."""
    dice, mine = random.Random(seed), random.Random(seed * 1000 + rank)
    if rank == 0:
        sharded(folder, dice.randint(1, 3), dice.randint(1, 8) * MIB, seed=seed)
    dist.barrier()
    dice = random.Random(seed + 1)
    num_readers = dice.randint(1, world_size)
    buffer_size, num_buffers = dice.randint(1, 3) * MIB, dice.randint(1, 3)
    staging, pool = dice.randint(2, 9) * MIB, dice.choice(("native", "python"))
    os.environ["PACKCAST_POOL"] = pool
    checkpoint = open_checkpoint(folder)
    files = outgoing_files(checkpoint)
    specs = [file.spec for file in files]
    chunks = plan_chunks([s.nbytes for s in specs], buffer_size, range(num_readers))
    ring = Ring(
        torch.device("cuda", torch.cuda.current_device()),
        slot_nbytes(buffer_size),
        num_buffers,
        Counters(),
    )
    ring.overwrite(0xA5)
    torch.cuda.synchronize()
    buffers = Buffers(ring, buffer_size, staging, transfer_tag(str(seed)))
    reader = FileReader(files, checkpoint.files)
    own = [chunk for chunk in chunks if chunk.root == rank]
    source = FileSource(own, reader, buffers, num_threads=3) if own else None
    sink = MemorySink(specs, lambda file, offset: time.sleep(mine.random() * 0.004))
    landing = Landing(chunks, sink, specs, buffers, num_threads=3)

    def broadcast(tensor: torch.Tensor, root: int) -> None:
        for stream in (ring.fill, ring.comm, ring.drain):
            if mine.random() < 0.4:
                with stream:
                    torch.cuda._sleep(mine.randint(1, 3_000_000))
        dist.broadcast(tensor, root)
        if mine.random() < 0.4:
            torch.cuda._sleep(mine.randint(1, 3_000_000))

    run_pipeline(chunks, rank=rank, ring=ring, broadcast=broadcast, source=source, drain=landing)
    by_name = {file.name: file.path for file in checkpoint.files}
    right = all(
        by_name[spec.name].read_bytes() == bytes(got)
        for spec, got in zip(specs, sink.bytes, strict=True)
    )
    print(
        f"round {seed}: rank {rank} {'right' if right else 'WRONG'}, {num_readers} readers,"
        f" {num_buffers} x {buffer_size // MIB} MiB, staging {staging // MIB} MiB,"
        f" {len(chunks)} chunks, {pool}",
        flush=True,
    )
    return right


def main() -> None:
    """All rounds, on every rank."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device())
    dawdling_threads()
    dist.init_process_group("nccl", device_id=device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    root = Path(tempfile.gettempdir()) / f"packcast-race-{os.environ['MASTER_PORT']}"
    wrong = torch.zeros(1, device=device)
    for seed in range(ROUNDS):
        wrong += not one_round(seed, rank, world_size, root / str(seed))
        dist.all_reduce(wrong)
    dist.destroy_process_group()
    if wrong.item():
        sys.exit(1)


if __name__ == "__main__":
    main()
