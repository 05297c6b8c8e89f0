"""Copies chunks from slots into tensors: one kernel per chunk, with tables made once.

Plain copies where there is no kernel. Works on the current stream.
"""

from __future__ import annotations

import torch

from packcast.io.sinks.planned import PlannedTensors
from packcast.io.sinks.tensor_destination import bytes_of
from packcast.packed.gather import move_on, pieces_each, table_of, tables_of
from packcast.packed.streams import Stream

TABLE_COLUMNS = 3


class Scatter:
    """Copies each chunk of the plan into the tensors of `planned`.

    The tables of chunks whose tensors have their memory already are made here, on the current
    stream: 24 bytes on the device for every tensor, or every 64 KiB of one. The table of another
    chunk is made when it comes and goes through host memory of `table_rows` rows, pinned beside a
    GPU.
    """

    def __init__(self, planned: PlannedTensors, device: torch.device) -> None:
        self._planned = planned
        self._device = device
        self._move = move_on(device)
        self.table_rows = 0
        if self._move is not None:
            rows = planned.rows
            self._tables = tables_of(rows, planned.addresses, device, planned.is_settled)
            is_late = torch.tensor(
                [not settled for settled in planned.is_settled], dtype=torch.bool
            )
            self.table_rows = max(pieces_each(rows)[is_late].tolist(), default=0)
            self._late_table = torch.empty(
                (self.table_rows, TABLE_COLUMNS), dtype=torch.int64, device=device
            )

    @property
    def device_nbytes(self) -> int:
        """Device memory of the tables."""
        if self._move is None:
            return 0
        return self._late_table.nbytes + sum(table.nbytes for table in self._tables)

    def copy(self, chunk: int, slot: torch.Tensor, host_table: torch.Tensor) -> None:
        """Give the chunk's copies to the current stream, always the same one.

        `host_table` must not change until the copies are done.
        """
        self._planned.begin(chunk)
        if self._move is None:
            self._copy_rows(chunk, slot)
            return
        table = self._tables[chunk]
        if not self._planned.is_settled[chunk]:
            made = table_of(self._planned.rows, self._planned.addresses, chunk)
            host_table = host_table[: len(made)].copy_(made)
            table = self._late_table[: len(made)].copy_(host_table, non_blocking=True)
        if len(table):
            self._move(table, slot, into_slot=False)

    def landed(self, chunk: int) -> None:
        """The copies of this chunk and of all before it are done and verified."""
        self._planned.landed(chunk)

    def give_up(self, stream: Stream) -> None:
        """The stream of the copies may still be busy, or stuck: keep its memory from reuse after it
        is dropped here. Any thread."""
        self._planned.stop()
        in_use = self._planned.unfinished()
        if self._move is not None:
            in_use += [*self._tables[:1], self._late_table]
        stream.hold(in_use)

    def _copy_rows(self, chunk: int, slot: torch.Tensor) -> None:
        rows = self._planned.rows.of(chunk)
        targets, sources = [], []
        columns = (rows.tensor, rows.offset, rows.slot_offset, rows.nbytes)
        for tensor, offset, at, nbytes in zip(*(each.tolist() for each in columns), strict=True):
            memory = self._planned.memory[tensor]
            if nbytes and memory is not None:
                targets.append(bytes_of(memory)[offset : offset + nbytes])
                sources.append(slot[at : at + nbytes])
        if targets:
            torch._foreach_copy_(targets, sources)
