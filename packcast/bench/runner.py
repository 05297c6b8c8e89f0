"""The sweep on one rank. Every rank runs it alike, and after each step all know whether it failed.

Tells the view, which is there on the sender only; knows nothing of how ranks meet.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

from packcast.bench.chainmethods import ChainMethod, GlooBroadcastMethod
from packcast.bench.dataset import Dataset, make_resident, share_files, share_truth
from packcast.bench.environment import environment_of
from packcast.bench.filemethod import FileMethod
from packcast.bench.limits import LimitMethod
from packcast.bench.methods import Job, MethodRun, RunFailed, time_run
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
from packcast.bench.stats import busy_of, shown, waiting_of, with_limits, wrong_of
from packcast.bench.sweep import plan_cases, reads_everywhere
from packcast.bench.tensormethods import LoadFileMethod, OneByOneMethod, PackedMethod, ReplayMethod
from packcast.bench.weights import Weight, check_space, make_layout, specs_of
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.errors import PackcastError, TransferError, VerificationError
from packcast.packed.counters import Counters


class Runner:
    """One rank's side of a bench, from the first table to the last."""

    def __init__(
        self, settings: BenchSettings, ranks: Ranks, view: BenchView, warning: str | None
    ) -> None:
        self._settings = settings
        self._ranks = ranks
        self._view = view
        self._results = Results(warnings=(warning,) if warning else ())
        self._name = ""
        self._write_folder = settings.write_directory
        self._data = Dataset("")
        self._is_over = False
        self._method: MethodRun | None = None
        self._pulse = Counters()
        self._doing = "the beginning"
        self._num_runs = self._num_turns = 0

    def run(self) -> int:
        """Everything; returns the exit code, the same on all ranks."""
        settings, ranks = self._settings, self._ranks
        self._name = f"packcast-bench-{ranks.share(_new_name())}"
        self._write_folder = settings.write_directory / self._name / f"rank-{ranks.rank}"
        if settings.cold and "file" in settings.sources:
            ranks.attempt(lambda: check_can_be_cold(settings.checkpoint or settings.directory))
        sizes = {shape: self._nbytes_of(shape) for shape in self._shapes()}
        plan = plan_cases(settings, sizes, world_size=ranks.world_size, on_gpu=ranks.on_gpu)
        if settings.checkpoint is None:
            for shape, cases in plan.items():
                ranks.attempt(partial(self._check_space, shape, cases))
        num_cases = sum(map(len, plan.values()))
        environment = environment_of(settings, ranks)
        self._tell(environment=environment, num_cases=num_cases)
        self._num_turns = num_cases * (settings.warmup + settings.runs)
        for shape, cases in plan.items():
            self._measure_shape(shape, cases)
        if any(wrong_of(row) for row in self._results.rows):
            return VerificationError.exit_code
        measured = any(row.failure is None for row in shown(self._results.rows))
        return 0 if measured else TransferError.exit_code

    # -- for other threads -----------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """They change whenever something has moved here."""
        method = self._method
        return method.counters if method and method.counters.totals() else self._pulse

    def moved(self) -> int:
        """A number that grows whenever something has moved, for heartbeats."""
        method = self._method
        done = method.counters.totals().values() if method else ()
        return self._pulse.nbytes("read") + sum(total.nbytes for total in done)

    def position(self) -> str:
        """What this rank is at, for a sentence."""
        return self._doing

    def show_partial_rows(self) -> None:
        """An end before the end: the view is told of rows with some of their runs."""
        self._view.found(self._results)

    def remove_files(self) -> None:
        """Remove what lies on disks; from any thread, at any time."""
        self._is_over = True
        with suppress(Exception):
            if self._method is not None:
                self._method.close()
        self._data.drop()
        if self._name:
            shutil.rmtree(self._write_folder, ignore_errors=True)
            with suppress(OSError):
                self._write_folder.parent.rmdir()  # the last rank of the host

    # -- the plan --------------------------------------------------------------------------------

    def _shapes(self) -> Sequence[str]:
        checkpoint = self._settings.checkpoint
        return [checkpoint.name or str(checkpoint)] if checkpoint else self._settings.shapes

    def _nbytes_of(self, shape: str) -> int:
        """A given checkpoint's are the sender's."""
        path, ranks = self._settings.checkpoint, self._ranks
        if path is None:
            return sum(weight.nbytes for weight in self._weights(shape))
        mine = ranks.attempt(lambda: open_checkpoint(path).nbytes if ranks.is_sender else 0)
        return int(ranks.share(mine))

    def _check_space(self, shape: str, cases: Sequence[Case]) -> None:
        """Raise DestinationError where the files of a shape, and copies of them, have no room."""
        if any(case.source == "file" for case in cases):
            copies = 0
            if any(case.sink == "write" for case in cases):
                copies = self._ranks.on_my_host(range(self._ranks.world_size))
                copies -= self._ranks.hosts[SENDER] == self._ranks.hosts[self._ranks.rank]
            check_space(
                self._weights(shape),
                self._settings.directory,
                self._settings.write_directory,
                is_written=self._host_needs_files(cases),
                copies=copies,
            )

    def _weights(self, shape: str) -> Sequence[Weight]:
        kind: ShapeKind = next(kind for kind in self._settings.shapes if kind == shape)
        return make_layout(kind, self._settings.size)

    def _host_needs_files(self, cases: Sequence[Case]) -> bool:
        here = self._ranks.hosts[self._ranks.rank]
        return here == self._ranks.hosts[SENDER] or any(map(reads_everywhere, cases))

    # -- one shape -------------------------------------------------------------------------------

    def _measure_shape(self, shape: str, cases: Sequence[Case]) -> None:
        self._data = data = Dataset(shape)
        if self._is_over:  # asked only now, or `remove_files` could have missed this one
            data.drop()
        if self._settings.checkpoint is None:
            data.specs = specs_of(self._weights(shape))
        from_files = [case for case in cases if case.source == "file"]
        if from_files or self._settings.checkpoint is not None:
            self._make_files(shape, from_files)
            for table in _tables(from_files):
                self._measure_table(table, data.offered().nbytes)
        resident = [case for case in cases if case.source == "resident"]
        if resident:
            self._doing = "making the weights"
            nbytes = sum(spec.nbytes for spec in data.specs)
            try:
                self._ranks.attempt(lambda: make_resident(data, self._ranks))
            except StepFailed as error:
                self._give_up(resident, nbytes, error.message)
            else:
                if self._settings.check:
                    self._share_truth("resident", resident)
                for table in _tables(resident):
                    self._measure_table(table, nbytes)
        self._data.drop()
        self._ranks.release_memory()

    def _make_files(self, shape: str, cases: Sequence[Case]) -> None:
        """Write and open the files where they are needed, and let all know of them."""
        settings, ranks = self._settings, self._ranks
        self._doing = "writing the weights" if settings.checkpoint is None else "opening the files"
        self._view.doing(self._doing, 0.0)
        path = settings.checkpoint
        if path is None:
            folder = settings.directory / f"{self._name}-{shape}"
            path = folder if self._host_needs_files(cases) else None
            # One rank of each host writes them.
            if path is not None and ranks.hosts.index(ranks.hosts[ranks.rank]) == ranks.rank:
                ranks.attempt(lambda: self._data.write(folder, self._weights(shape), self._beat))
            else:
                ranks.attempt(lambda: None)
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

    def _measure_table(self, cases: Sequence[Case], nbytes: int) -> None:
        """Warm-up and runs of all its cases, in turn, so that drift affects all alike."""
        first = len(self._results.rows)
        rows = [Row(case=case, nbytes=nbytes) for case in cases]
        self._tell(rows=(*self._results.rows, *rows))
        turns = self._settings.warmup + self._settings.runs
        for turn in range(turns):
            for index, case in enumerate(cases):
                row = self._results.rows[first + index]
                if row.failure is None:
                    self._take_turn(first + index, case, turn)

    def _take_turn(self, index: int, case: Case, turn: int) -> None:
        """One run of a row on all ranks, and what becomes of the row."""
        settings, row = self._settings, self._results.rows[index]
        is_warmup = turn < settings.warmup
        self._view.doing(
            f"{case}, run {turn + 1} of {settings.warmup + settings.runs}",
            self._num_runs / max(1, self._num_turns),
        )
        self._num_runs += 1
        try:
            parts = self._run_once(case, turn, row.nbytes)
        except StepFailed as error:
            row = replace(row, failure=error.message, is_complete=True)
        else:
            is_last = turn == settings.warmup + settings.runs - 1
            row = replace(
                row, runs=(*row.runs, Run(parts, is_warmup=is_warmup)), is_complete=is_last
            )
        rows = list(self._results.rows)
        rows[index] = row
        known = with_limits(rows)
        self._tell(known[index] if row.is_complete else None, rows=known)

    def _run_once(self, case: Case, turn: int, nbytes: int) -> tuple[RankRun, ...]:
        """Raises StepFailed on all ranks where the row cannot be measured on one of them."""
        ranks, settings = self._ranks, self._settings
        if case.source == "file" and case.readers > len(self._data.able):
            text = f"only {len(self._data.able)} ranks can read {case.shape}"
            raise StepFailed(text, TransferError(text))
        ranks.release_memory()
        job = Job(
            case=case,
            ranks=ranks,
            data=self._data,
            run_id=f"{self._name}-{self._num_runs}",
            turn=turn,
            nbytes=nbytes,
            cold=settings.cold,
        )
        self._doing = str(case)
        self._method = method = self._method_of(job)
        try:
            ranks.attempt(method.prepare)
            ranks.attempt(method.connect, PackcastError)
            self._beat()
            seconds = ranks.attempt(lambda: time_run(method, ranks), RunFailed)
            peak = ranks.peak_device_nbytes()
            totals = method.counters.totals()
            part = RankRun(
                rank=ranks.rank,
                seconds=seconds,
                wrong=method.check() if settings.check else None,
                waiting=(waiting_of(totals) if case.source == "file" else busy_of(totals, seconds)),
                loop_seconds=method.counters.loop_seconds,
                sent_nbytes=method.sent_nbytes,
                peak_device_nbytes=peak,
                peak_pinned_nbytes=method.pinned_nbytes,
            )
            self._beat()
            return tuple(RankRun(**told) for told in ranks.gather(asdict(part)))
        finally:
            self._method = None
            method.close()

    def _method_of(self, job: Job) -> MethodRun:
        case, copy = job.case, self._write_folder / "copy"
        match case.method:
            case "packcast":
                return FileMethod(job, copy) if case.source == "file" else ReplayMethod(job)
            case "compat" | "original":
                return PackedMethod(job, copy)
            case "limit":
                return LimitMethod(job, copy)
            case "chain":
                return ChainMethod(job)
            case "gloo broadcast":
                return GlooBroadcastMethod(job)
            case "per-tensor":
                return OneByOneMethod(job)
            case "load_file":
                return LoadFileMethod(job)

    # -- small things ----------------------------------------------------------------------------

    def _give_up(self, cases: Sequence[Case], nbytes: int, failure: str) -> None:
        """Rows that cannot be measured, all for one reason."""
        rows = [Row(case=case, nbytes=nbytes, failure=failure, is_complete=True) for case in cases]
        self._num_runs += len(cases) * (self._settings.warmup + self._settings.runs)
        self._tell(rows=(*self._results.rows, *rows))

    def _tell(self, news: Row | None = None, **changes: object) -> None:
        self._results = replace(self._results, **changes)  # type: ignore[arg-type]
        self._view.found(self._results, news)

    def _beat(self) -> None:
        now = time.perf_counter()
        self._pulse.add("read", 0, 1, now, now)


def _tables(cases: Sequence[Case]) -> Iterator[list[Case]]:
    tables: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        tables.setdefault(case.combination, []).append(case)
    yield from tables.values()


def _new_name() -> str:
    return uuid.uuid4().hex[:12]
