"""The sweep on one rank. Every rank runs the same steps, and all know after each if it failed.

Calls the view, which shows something on the sender only; does not know how the ranks have met.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

from packcast.bench.dataset import Dataset, make_resident, share_files, share_truth
from packcast.bench.environment import environment_of
from packcast.bench.filemethod import FileMethod
from packcast.bench.limits import LimitMethod
from packcast.bench.methods import MethodRun, RunFailed
from packcast.bench.model import (
    SENDER,
    BenchSettings,
    BenchView,
    Case,
    RankRun,
    Results,
    Row,
    Run,
    ShapeKind,
    SourceKind,
)
from packcast.bench.pagecache import check_can_be_cold
from packcast.bench.ranks import Ranks, StepFailed
from packcast.bench.residentmethods import (
    ChainMethod,
    GlooBroadcastMethod,
    PerTensorMethod,
    ReplayMethod,
)
from packcast.bench.stats import busy_of, shown, waiting_of, with_limits
from packcast.bench.sweep import plan_cases, reads_everywhere
from packcast.bench.tensormethods import LoadFileMethod, PackedMethod
from packcast.bench.weights import Weight, check_space, make_layout
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.errors import PackcastError, TransferError, VerificationError
from packcast.packed.counters import Counters

_METHODS: dict[str, type[MethodRun]] = {
    "compat": PackedMethod,
    "original": PackedMethod,
    "limit": LimitMethod,
    "chain": ChainMethod,
    "gloo broadcast": GlooBroadcastMethod,
    "per-tensor": PerTensorMethod,
    "load_file": LoadFileMethod,
}


class Runner:
    """One rank's part in a bench. `counters` and `position` are read by other threads."""

    def __init__(
        self, settings: BenchSettings, ranks: Ranks, view: BenchView, warning: str | None
    ) -> None:
        self._settings = settings
        self._ranks = ranks
        self._view = view
        self._results = Results(warnings=(warning,) if warning else ())
        self._name = ""
        self._write_folder: Path | None = None
        self._data = Dataset("")
        self._is_over = False
        self._method: MethodRun | None = None
        self._pulse = Counters()
        self._doing = "the beginning"
        self._num_runs = self._num_turns = 0

    def run(self) -> int:
        """The whole sweep; returns the exit code, the same on all ranks."""
        settings, ranks = self._settings, self._ranks
        self._name = f"packcast-bench-{ranks.share(uuid.uuid4().hex[:12])}"
        self._write_folder = settings.write_directory / self._name / f"rank-{ranks.rank}"
        if settings.cold and "file" in settings.sources:
            ranks.attempt(lambda: check_can_be_cold(settings.checkpoint or settings.directory))
        sizes = self._sizes()
        plan = plan_cases(settings, sizes, world_size=ranks.world_size, on_gpu=ranks.on_gpu)
        if settings.checkpoint is None:
            for shape, cases in plan.items():
                ranks.attempt(partial(self._check_space, shape, cases))
        num_cases = sum(map(len, plan.values()))
        environment = environment_of(settings, ranks)
        self._update(environment=environment, num_cases=num_cases)
        self._num_turns = num_cases * (settings.warmup + settings.runs)
        for shape, cases in plan.items():
            self._measure_shape(shape, cases)
        if any(row.wrong for row in self._results.rows):
            return VerificationError.exit_code
        any_measured = any(row.failure is None for row in shown(self._results.rows))
        return 0 if any_measured else TransferError.exit_code

    # -- for other threads -----------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """They change whenever something has moved on this rank."""
        method = self._method
        return method.counters if method and method.counters.totals() else self._pulse

    def moved(self) -> int:
        """A number that grows whenever something has moved, for heartbeats."""
        method = self._method
        totals = method.counters.totals().values() if method else ()
        return self._pulse.nbytes("read") + sum(total.nbytes for total in totals)

    def position(self) -> str:
        """What this rank is doing, for a sentence."""
        return self._doing

    def show_partial_rows(self) -> None:
        """For an early end: show the view all rows, complete or not."""
        self._view.found(self._results)

    def remove_files(self) -> None:
        """Remove all files that the bench has made; from any thread, at any time."""
        self._is_over = True
        with suppress(Exception):
            if self._method is not None:
                self._method.close()
        self._data.drop()
        if self._write_folder is not None:
            shutil.rmtree(self._write_folder, ignore_errors=True)
            with suppress(OSError):
                self._write_folder.parent.rmdir()  # only the last rank of the host succeeds

    # -- the plan --------------------------------------------------------------------------------

    def _sizes(self) -> dict[str, int]:
        """The bytes of each shape, or of the sender's checkpoint."""
        path, ranks = self._settings.checkpoint, self._ranks
        if path is None:
            shapes = self._settings.shapes
            return {shape: sum(w.nbytes for w in self._weights(shape)) for shape in shapes}
        mine = ranks.attempt(lambda: open_checkpoint(path).nbytes if ranks.is_sender else 0)
        return {path.name or str(path): int(ranks.share(mine))}

    def _check_space(self, shape: str, cases: Sequence[Case]) -> None:
        """Raise DestinationError where there is no room for the files of a shape and copies."""
        if not any(case.source == "file" for case in cases):
            return
        settings, ranks = self._settings, self._ranks
        num_workers = ranks.on_my_host(range(1, ranks.world_size))
        copies = [
            (settings.directory, int(self._host_needs_files(cases))),
            (settings.write_directory, num_workers * any(case.sink == "write" for case in cases)),
        ]
        check_space(self._weights(shape), copies)

    def _weights(self, shape: str) -> Sequence[Weight]:
        return make_layout(cast(ShapeKind, shape), self._settings.size)

    def _host_needs_files(self, cases: Sequence[Case]) -> bool:
        return self._ranks.on_my_host([SENDER]) > 0 or any(map(reads_everywhere, cases))

    # -- one shape -------------------------------------------------------------------------------

    def _measure_shape(self, shape: str, cases: Sequence[Case]) -> None:
        self._data = data = Dataset(shape)
        if self._is_over:  # checked after the assignment: `remove_files` may have missed it
            data.drop()
        if self._settings.checkpoint is None:
            data.specs = tuple(weight.spec for weight in self._weights(shape))
        from_files = [case for case in cases if case.source == "file"]
        if from_files or self._settings.checkpoint is not None:
            self._make_files(shape, from_files)
            self._measure_tables(from_files, data.offered().nbytes)
        resident = [case for case in cases if case.source == "resident"]
        if resident:
            self._doing = "making the weights"
            nbytes = sum(spec.nbytes for spec in data.specs)
            try:
                self._ranks.attempt(lambda: make_resident(data, self._ranks))
            except StepFailed as error:
                rows = [Row(case=case, nbytes=nbytes, failure=error.message) for case in resident]
                rows = [replace(row, is_complete=True) for row in rows]
                self._num_runs += len(rows) * (self._settings.warmup + self._settings.runs)
                self._update(rows=(*self._results.rows, *rows))
            else:
                if self._settings.check:
                    self._share_truth("resident", resident)
                self._measure_tables(resident, nbytes)
        data.drop()
        self._ranks.release_memory()

    def _make_files(self, shape: str, cases: Sequence[Case]) -> None:
        """Write the files on each host that needs them, open them, and share the offer."""
        settings, ranks = self._settings, self._ranks
        path = settings.checkpoint
        self._doing = "writing the weights" if path is None else "opening the files"
        self._view.doing(self._doing, 0.0)
        if path is None:
            folder = settings.directory / f"{self._name}-{shape}"
            path = folder if self._host_needs_files(cases) else None
            is_first_of_host = ranks.hosts.index(ranks.hosts[ranks.rank]) == ranks.rank

            def write() -> None:
                if path is not None and is_first_of_host:
                    self._data.write(folder, self._weights(shape), self._beat)

            ranks.attempt(write)
        share_files(self._data, settings, ranks, path)
        if settings.check:
            self._share_truth("file", cases)

    def _share_truth(self, source: SourceKind, cases: Sequence[Case]) -> None:
        self._doing = "computing what is right"
        blocks = source == "file" and any(case.method == "packcast" for case in cases)
        loading = ("original", "load_file")
        loads = any(case.sink == "land" or case.method in loading for case in cases)
        sums = source == "resident" or (loads and self._data.specs_fault is None)
        share_truth(self._data, self._ranks, source, blocks=blocks, sums=sums)
        self._beat()

    # -- one table -------------------------------------------------------------------------------

    def _measure_tables(self, cases: Sequence[Case], nbytes: int) -> None:
        """The runs of one table's cases take turns, so that drift affects all alike."""
        tables: dict[object, list[Case]] = {}
        for case in cases:
            tables.setdefault(case.combination, []).append(case)
        for table in tables.values():
            first = len(self._results.rows)
            rows = [Row(case=case, nbytes=nbytes) for case in table]
            self._update(rows=(*self._results.rows, *rows))
            for turn in range(self._settings.warmup + self._settings.runs):
                for index in range(first, first + len(table)):
                    if self._results.rows[index].failure is None:
                        self._take_turn(index, turn)

    def _take_turn(self, index: int, turn: int) -> None:
        """One run of a row on all ranks, and the row with it."""
        settings, row = self._settings, self._results.rows[index]
        num_turns = settings.warmup + settings.runs
        text = f"{row.case}, run {turn + 1} of {num_turns}"
        self._view.doing(text, self._num_runs / max(1, self._num_turns))
        self._num_runs += 1
        try:
            run = Run(self._run_once(row, turn), is_warmup=turn < settings.warmup)
        except StepFailed as error:
            row = replace(row, failure=error.message, is_complete=True)
        else:
            row = replace(row, runs=(*row.runs, run), is_complete=turn == num_turns - 1)
        rows = list(self._results.rows)
        rows[index] = row
        updated = with_limits(rows)
        self._update(updated[index] if row.is_complete else None, rows=updated)

    def _run_once(self, row: Row, turn: int) -> tuple[RankRun, ...]:
        """Raises StepFailed on all ranks where the row cannot be measured on one of them."""
        ranks, case = self._ranks, row.case
        assert self._write_folder is not None
        if case.source == "file" and case.readers > len(self._data.able):
            text = f"only {len(self._data.able)} ranks can read {case.shape}"
            raise StepFailed(text, TransferError(text))
        ranks.release_memory()
        self._doing = str(case)
        kind = FileMethod if case.source == "file" else ReplayMethod
        self._method = method = _METHODS.get(case.method, kind)(
            case=case,
            ranks=ranks,
            data=self._data,
            run_id=f"{self._name}-{self._num_runs}",
            turn=turn,
            nbytes=row.nbytes,
            cold=self._settings.cold,
            write_folder=self._write_folder / "copy",
        )
        try:
            ranks.attempt(method.prepare)
            ranks.attempt(method.connect, PackcastError)
            self._beat()
            seconds = ranks.attempt(method.time, RunFailed)
            peak = ranks.peak_device_nbytes()
            totals = method.counters.totals()
            part = RankRun(
                rank=ranks.rank,
                seconds=seconds,
                wrong=method.check() if self._settings.check else None,
                waiting=waiting_of(totals) if case.source == "file" else busy_of(totals, seconds),
                loop_seconds=method.counters.loop_seconds,
                sent_nbytes=method.sent_nbytes,
                peak_device_nbytes=peak,
                peak_pinned_nbytes=method.pinned_nbytes,
            )
            self._beat()
            return tuple(RankRun(**fields) for fields in ranks.gather(asdict(part)))
        finally:
            self._method = None
            method.close()

    def _update(self, news: Row | None = None, **changes: object) -> None:
        self._results = replace(self._results, **changes)  # type: ignore[arg-type]
        self._view.found(self._results, news)

    def _beat(self) -> None:
        now = time.perf_counter()
        self._pulse.add("read", 0, 1, now, now)
