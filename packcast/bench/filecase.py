"""packcast itself, from files: the data path of a transfer, once per run, over the bench's group.

Knows how an offer becomes this case's; what is measured around it is told elsewhere.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from packcast.bench.check import digests_of_copy, sums_of, wrong_blocks, wrong_tensors
from packcast.bench.pagecache import evict
from packcast.bench.ways import Job as CaseJob
from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import TransferError
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.shelf import GivenTensors
from packcast.io.sinks.tensors import TensorSink
from packcast.io.sinks.verify import VerifySink
from packcast.io.sinks.write import WriteSink
from packcast.io.source import FileReader
from packcast.packed.counters import Counters
from packcast.packed.plan import check_buffers, check_staging, plan_chunks, plan_digest
from packcast.transfer.moving import Mover
from packcast.transfer.offer import Offer

FileSink = DiscardSink | VerifySink | WriteSink | TensorSink


class FileCase:
    """One run of `packcast send` as far as its data phase goes; a Way.

    Written files are made durable within the run, as the tool does, and named after it.
    """

    def __init__(self, job: CaseJob, write_folder: Path, *, cold: bool) -> None:
        self._job = job
        self._write_folder = write_folder
        self._cold = cold
        self._sink: FileSink | None = None
        self._mover: Mover | None = None
        self._incomplete = False
        self._landed: dict[str, torch.Tensor] = {}  # a worker's own tensors
        self.pinned_nbytes = 0

    @property
    def counters(self) -> Counters:
        return self._mover.counters if self._mover else Counters()

    def prepare(self) -> None:
        job, case = self._job, self._job.case
        check_buffers(case.buffer_size, case.num_buffers)
        offer = offer_of_case(job)
        check_staging(case.buffer_size, offer.staging)
        chunks = offer.chunks()
        if self._cold and (job.team.rank in job.readers or case.sink == "verify"):
            evict(job.stock.paths())
        reader = None
        if job.team.rank in job.readers:
            reader = FileReader(job.stock.files, job.stock.opened().files)
        if not job.team.is_sender:
            self._sink = self._make_sink(offer.files)
            self._sink.prepare()
        self._mover = Mover(
            offer, chunks, job.run_id, reader=reader, sink=self._sink, tolerant=job.checked
        )
        if case.sink in ("land", "discard") and job.team.device.type == "cuda":
            self._mover.prove_by_sums()

    def connect(self) -> None:
        """The group is there."""

    def warm(self) -> None:
        """A transfer's first pass is its only one."""

    def poison(self) -> None:
        byte = random.randrange(256)
        self._made().overwrite_buffers(byte)
        for tensor in self._landed.values():
            tensor.view(-1).view(torch.uint8).fill_(byte)

    def run(self) -> float:
        """The moment of the last byte: buffers that are unpinned afterwards are no part of it."""
        mover, team = self._made(), self._job.team
        mover.read_ahead()
        moved = mover.run(team.group, team.channel)
        self.pinned_nbytes = moved.pinned_nbytes
        if self._sink is None:
            return moved.ended
        begin = time.perf_counter()
        try:
            self._sink.finish()
        except TransferError:
            # A sink that was kept from damaged blocks is not complete, which `check` will tell.
            if not self._job.checked:
                raise
            self._incomplete = True
        seconds = time.perf_counter() - begin
        mover.counters.waited(self._sink.stage, seconds)
        return moved.ended + seconds

    def check(self) -> int:
        truth, sink = self._job.stock.blocks, self._sink
        if sink is None:
            return 0
        if isinstance(sink, TensorSink):
            found = sums_of(self._landed[spec.name] for spec in self._job.stock.specs)
            return wrong_tensors(found, self._job.stock.sums["file"])
        assert truth is not None, "the sender has told"
        wrong = wrong_blocks(self._made().block_digests(), truth)
        if isinstance(sink, VerifySink):
            return max(wrong, sink.differing_tensors, sink.differing_files)
        if self._incomplete:
            return max(wrong, 1)
        if isinstance(sink, WriteSink):
            sink.publish()
            files = self._made_files()
            return max(wrong, wrong_blocks(digests_of_copy(self._write_folder, files), truth))
        return wrong

    def close(self) -> None:
        if self._mover is not None:
            self._mover.close()
            self._mover = None
        if self._sink is not None:
            self._sink.abort()
            self._sink = None
        self._landed.clear()
        if self._job.case.sink == "write":
            shutil.rmtree(self._write_folder, ignore_errors=True)

    def _made(self) -> Mover:
        assert self._mover is not None, "prepare comes first"
        return self._mover

    def _made_files(self) -> tuple[FileSpec, ...]:
        return offer_of_case(self._job).files

    def _make_sink(self, files: Sequence[FileSpec]) -> FileSink:
        job = self._job
        if job.case.sink == "write":
            return WriteSink(self._write_folder, files, transfer_id=job.run_id, force=False)
        if job.case.sink == "verify":
            return VerifySink(job.stock.opened(), files)
        if job.case.sink == "land":
            job.stock.check_specs()
            device = job.team.device
            self._landed = {
                spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
                for spec in job.stock.specs
            }
            return TensorSink(files, GivenTensors(device, self._landed, strict=True))
        return DiscardSink()


def offer_of_case(job: CaseJob) -> Offer:
    """What the sender would offer for this case: the shape's offer with the case's own numbers."""
    base, case, team = job.stock.offer, job.case, job.team
    assert base is not None, "the sender has offered"
    sizes = [spec.nbytes for spec in base.files]
    chunks = plan_chunks(sizes, case.buffer_size, job.readers)
    return replace(
        base,
        buffer_size=case.buffer_size,
        num_buffers=case.num_buffers,
        readers=job.readers,
        plan=plan_digest(sizes, case.buffer_size, chunks),
        place=replace(base.place, readers_on_host=max(1, team.on_my_host(job.readers))),
    )
