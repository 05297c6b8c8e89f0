"""packcast itself, from files: the data path of a transfer, once per run, over our group."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import torch

from packcast.bench.check import digests_of_copy, sums_of, wrong_blocks, wrong_tensors
from packcast.bench.dataset import offer_of_case
from packcast.bench.methods import Job, MethodRun, fill_with_poison
from packcast.bench.pagecache import evict
from packcast.errors import TransferError
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.tensor_destination import GivenTensors
from packcast.io.sinks.tensors import TensorSink
from packcast.io.sinks.verify import VerifySink
from packcast.io.sinks.write import WriteSink
from packcast.io.source import FileReader
from packcast.packed.chain import Chain
from packcast.packed.plan import check_buffers, check_staging
from packcast.transfer.data_plane import DataPlane

FileSink = DiscardSink | VerifySink | WriteSink | TensorSink


class FileMethod(MethodRun):
    """One run of `packcast send` as far as its data phase goes.

    Written files are made durable within the run, as the tool does, and named after it.
    """

    def __init__(self, job: Job, write_folder: Path) -> None:
        super().__init__(job)
        self._write_folder = write_folder
        self._sink: FileSink | None = None
        self._data_plane: DataPlane | None = None
        self._chain: Chain | None = None
        self._incomplete = False
        self._landed: dict[str, torch.Tensor] = {}  # a worker's own tensors

    def prepare(self) -> None:
        job, case = self.job, self.job.case
        check_buffers(case.buffer_size, case.num_buffers)
        offer = offer_of_case(job.data, case, job.ranks)
        check_staging(case.buffer_size, offer.staging)
        reads = job.ranks.rank in job.readers
        if job.cold and (reads or case.sink == "verify"):
            evict(job.data.paths())
        reader = FileReader(job.data.files, job.data.opened().files) if reads else None
        if not job.ranks.is_sender:
            self._sink = self._make_sink()
            self._sink.prepare()
        self._data_plane = DataPlane(
            offer,
            offer.chunks(),
            job.ranks.channel,
            job.run_id,
            reader=reader,
            sink=self._sink,
            tolerant=True,  # a damaged block is counted, not the end
        )
        self.counters = self._data_plane.counters
        if case.sink in ("land", "discard") and job.ranks.on_gpu:
            self._data_plane.prove_by_sums()

    def connect(self) -> None:
        """Over gloo chunks go along a chain of ranks, as in a transfer."""
        if not self.job.ranks.on_gpu:
            self._chain = self.job.ranks.open_chain(self.job.readers, self.job.run_id)

    def poison(self) -> None:
        fill_with_poison(*self._landed.values())
        self._made().overwrite_buffers(random.randrange(256))

    def run(self) -> float:
        """The moment of the last byte: buffers that are unpinned afterwards are no part of it."""
        data_plane, ranks = self._made(), self.job.ranks
        data_plane.read_ahead()
        moved = data_plane.run(self._chain or ranks.group)
        if self._chain is not None:
            self.sent_nbytes = self._chain.sent_nbytes
        self.pinned_nbytes = moved.pinned_nbytes
        if self._sink is None:
            return moved.ended
        begin = time.perf_counter()
        try:
            self._sink.finish()
        except TransferError:
            # A sink that was kept from damaged blocks is not complete, which `check` will tell.
            self._incomplete = True
        seconds = time.perf_counter() - begin
        data_plane.counters.waited(self._sink.stage, seconds)
        return moved.ended + seconds

    def check(self) -> int:
        data, sink = self.job.data, self._sink
        if sink is None:
            return 0
        if isinstance(sink, TensorSink):
            found = sums_of(self._landed[spec.name] for spec in data.specs)
            return wrong_tensors(found, data.sums["file"])
        wrong = wrong_blocks(self._made().block_digests(), data.blocks)
        if isinstance(sink, VerifySink):
            return max(wrong, sink.differing_tensors, sink.differing_files)
        if self._incomplete:
            return max(wrong, 1)
        if isinstance(sink, WriteSink):
            sink.publish()
            copy = digests_of_copy(self._write_folder, data.offered().files)
            return max(wrong, wrong_blocks(copy, data.blocks))
        return wrong

    def close(self) -> None:
        if self._chain is not None:
            self._chain.close()
            self._chain = None
        if self._data_plane is not None:
            self._data_plane.close()
            self._data_plane = None
        if self._sink is not None:
            self._sink.abort()
            self._sink = None
        self._landed.clear()
        if self.job.case.sink == "write":
            shutil.rmtree(self._write_folder, ignore_errors=True)

    def _made(self) -> DataPlane:
        assert self._data_plane is not None, "prepare comes first"
        return self._data_plane

    def _make_sink(self) -> FileSink:
        job, files = self.job, self.job.data.offered().files
        if job.case.sink == "write":
            return WriteSink(self._write_folder, files, transfer_id=job.run_id, force=False)
        if job.case.sink == "verify":
            return VerifySink(job.data.opened(), files)
        if job.case.sink == "land":
            job.data.check_specs()
            device = job.ranks.device
            self._landed = {
                spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
                for spec in job.data.specs
            }
            return TensorSink(files, GivenTensors(device, self._landed, strict=True))
        return DiscardSink()
