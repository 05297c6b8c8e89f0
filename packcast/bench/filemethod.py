"""packcast from files: the data phase of a transfer, over the bench's group."""

from __future__ import annotations

import random
import shutil
import time

import torch

from packcast.bench.check import digests_of_copy, sums_of, wrong_blocks, wrong_tensors
from packcast.bench.dataset import offer_of_case
from packcast.bench.methods import MethodRun, fill_with_poison
from packcast.bench.pagecache import evict
from packcast.errors import TransferError
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.tensor_destination import GivenTensors
from packcast.io.sinks.tensors import TensorSink
from packcast.io.sinks.verify import VerifySink
from packcast.io.sinks.write import WriteSink
from packcast.io.source import FileReader
from packcast.packed.chain import Chain
from packcast.packed.plan import check_staging
from packcast.transfer.data_plane import DataPlane

FileSink = DiscardSink | VerifySink | WriteSink | TensorSink


class FileMethod(MethodRun):
    """The data phase of `packcast send`. As there, a run ends when written files are durable."""

    _sink: FileSink | None = None
    _data_plane: DataPlane
    _chain: Chain | None = None
    _is_incomplete = False

    def prepare(self) -> None:
        case = self.case
        offer = offer_of_case(self.data, case, self.ranks)
        check_staging(case.buffer_size, offer.staging)
        reads = self.ranks.rank in self.readers
        if self.cold and (reads or case.sink == "verify"):
            evict(self.data.paths())
        reader = FileReader(self.data.files, self.data.opened().files) if reads else None
        self._landed: dict[str, torch.Tensor] = {}
        self.resources.callback(self._landed.clear)
        if not self.ranks.is_sender:
            self._sink = self._make_sink()
            self.resources.callback(self._sink.abort)
            self._sink.prepare()
        self._data_plane = DataPlane(
            offer,
            offer.chunks(),
            self.ranks.channel,
            self.run_id,
            reader=reader,
            sink=self._sink,
            tolerant=True,  # damaged blocks are counted
        )
        self.resources.callback(self._data_plane.close)
        self.counters = self._data_plane.counters
        if case.sink in ("land", "discard") and self.ranks.on_gpu:
            self._data_plane.prove_by_sums()

    def connect(self) -> None:
        """Over gloo chunks go along a chain of ranks, as in a transfer."""
        if not self.ranks.on_gpu:
            self._chain = self.open_chain(self.readers)

    def poison(self) -> None:
        fill_with_poison(*self._landed.values())
        self._data_plane.overwrite_buffers(random.randrange(256))

    def run(self) -> float:
        """Ends with the last byte, before the buffers are unpinned."""
        self._data_plane.read_ahead()
        moved = self._data_plane.run(self._chain or self.ranks.group)
        if self._chain is not None:
            self.sent_nbytes = self._chain.sent_nbytes
        self.pinned_nbytes = moved.pinned_nbytes
        if self._sink is None:
            return moved.ended
        begin = time.perf_counter()
        try:
            self._sink.finish()
        except TransferError:  # damaged blocks did not reach the sink: `check` counts them
            self._is_incomplete = True
        seconds = time.perf_counter() - begin
        self.counters.waited(self._sink.stage, seconds)
        return moved.ended + seconds

    def check(self) -> int:
        data, sink = self.data, self._sink
        if sink is None:
            return 0
        if isinstance(sink, TensorSink):
            sums = sums_of(self._landed[spec.name] for spec in data.specs)
            return wrong_tensors(sums, data.sums["file"])
        wrong = wrong_blocks(self._data_plane.block_digests(), data.blocks)
        if isinstance(sink, VerifySink):
            return max(wrong, sink.differing_tensors, sink.differing_files)
        if self._is_incomplete:
            return max(wrong, 1)
        if isinstance(sink, WriteSink):
            sink.publish()
            copy = digests_of_copy(self.write_folder, data.offered().files)
            return max(wrong, wrong_blocks(copy, data.blocks))
        return wrong

    def _make_sink(self) -> FileSink:
        files = self.data.offered().files
        match self.case.sink:
            case "write":
                self.resources.callback(shutil.rmtree, self.write_folder, ignore_errors=True)
                return WriteSink(self.write_folder, files, transfer_id=self.run_id, force=False)
            case "verify":
                return VerifySink(self.data.opened(), files)
            case "land":
                self.data.check_specs()
                device = self.ranks.device
                for spec in self.data.specs:
                    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
                    self._landed[spec.name] = tensor
                return TensorSink(files, GivenTensors(device, self._landed, strict=True))
            case "discard":
                return DiscardSink()
