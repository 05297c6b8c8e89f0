"""What every rank does on the sender's orders: make weights, measure limits, run cases.

One order at a time, the same on all ranks, so that their collectives meet. Knows neither the sweep
nor who gives the orders.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from packcast.bench.bottleneck import busy_of, lanes_of, waiting_of
from packcast.bench.cases import case_from_json
from packcast.bench.facts import facts_of_rank, free_device_nbytes
from packcast.bench.filecase import FileCase
from packcast.bench.limits import (
    Pace,
    Start,
    pace_of_broadcast,
    pace_of_copies,
    pace_of_read,
    pace_of_write,
)
from packcast.bench.loadcase import LoadCase, OpenGroup, installed_loaders
from packcast.bench.messages import Answer
from packcast.bench.model import BenchSettings, ShapeKind, SourceKind
from packcast.bench.pagecache import check_can_be_cold
from packcast.bench.stock import (
    Stock,
    drop_stock,
    make_resident,
    open_stock,
    specs_of_weights,
    take_offer,
    true_blocks,
    true_sums,
    write_stock,
)
from packcast.bench.team import Team
from packcast.bench.tensorcase import OneByOneCase, PackedCase, ReplayCase
from packcast.bench.together import Together, pace_together
from packcast.bench.ways import GivenUp, Job, RunFailed, Way, time_run
from packcast.bench.weights import make_layout
from packcast.errors import PackcastError
from packcast.packed.counters import Counters
from packcast.transfer.offer import Offer

Order = Mapping[str, Any]

# Steps in which a rank may fail alone: no rank waits for another in them, and the answer tells.
_MAY_FAIL = frozenset({"write", "open", "resident", "prepare", "connect", "limit"})


class BenchRank:
    """One rank's side of a bench, from the first order to the last."""

    def __init__(
        self, settings: BenchSettings, team: Team, bench_id: str, open_group: OpenGroup
    ) -> None:
        self.team = team
        self.bench_id = bench_id
        self.stock = Stock("")
        self._is_over = False
        self._settings = settings
        self._open_group = open_group
        self._name = f"packcast-bench-{bench_id[:12]}"
        self._write_root = settings.write_directory / self._name / f"rank-{team.rank}"
        self._way: Way | None = None
        self._source: SourceKind = "file"  # the way's
        self._pulse = Counters()
        self._doing = "the beginning"
        self._steps: dict[str, Callable[[Order], Answer]] = {
            "facts": self._facts,
            "shape": self._shape,
            "write": self._write,
            "open": self._open,
            "resident": self._resident,
            "truth": self._truth,
            "limit": self._limit,
            "prepare": self._prepare,
            "connect": self._connect,
            "run": self._run,
            "close": self._close,
            "drop": self._drop,
        }

    @property
    def counters(self) -> Counters:
        """They change whenever something has moved here."""
        return self._way.counters if self._way and self._way.counters.totals() else self._pulse

    def moved(self) -> int:
        """A number that grows whenever something has moved, for heartbeats."""
        way = self._way
        done = way.counters.totals() if way else {}
        return self._pulse.nbytes("read") + sum(total.nbytes for total in done.values())

    def position(self) -> str:
        """What this rank is at, for a sentence."""
        return self._doing

    def do(self, order: Order) -> Answer:
        """Carry out one order; the answer has `error` where this rank alone could not."""
        step = str(order["step"])
        self._doing = step if self._way is None else f"{step} of a case"
        try:
            answer = self._steps[step](order)
        except RunFailed as error:
            answer = {"error": error.message, "given_up": isinstance(error, GivenUp)}
        except (PackcastError, OSError, RuntimeError, MemoryError) as error:
            if step not in _MAY_FAIL:
                raise
            answer = {"error": _first_line(error)}
        self._beat()
        return {"error": None} | answer

    def abandon(self) -> None:
        """Remove what lies on disks; from any thread, at any time."""
        self._is_over = True
        with suppress(Exception):
            if self._way is not None:
                self._way.close()
        drop_stock(self.stock)
        self._remove_copies()

    # -- weights ---------------------------------------------------------------------------------

    def _facts(self, _: Order) -> Answer:
        settings, team = self._settings, self.team
        if settings.cold and "file" in settings.sources:
            check_can_be_cold(settings.checkpoint or settings.directory)
        return {
            "facts": facts_of_rank(team.rank, team.device),
            "installed": installed_loaders(),
            "free": free_device_nbytes(team.device),
        }

    def _shape(self, order: Order) -> Answer:
        """A new shape; whoever is asked to take part in the next steps has its name."""
        self.stock = Stock(str(order["shape"]))
        if self._is_over:  # asked only now, or `abandon` could have missed this one
            drop_stock(self.stock)
        if self._settings.checkpoint is None:
            self.stock.specs = specs_of_weights(make_layout(_kind(order), self._settings.size))
        return {}

    def _write(self, order: Order) -> Answer:
        if self.team.rank in order["ranks"]:
            weights = make_layout(_kind(order), self._settings.size)
            write_stock(self.stock, self._folder(), weights, lambda _: self._beat())
        return {}

    def _open(self, order: Order) -> Answer:
        """The fingerprint of the files that this rank sees, if any."""
        path = self._settings.checkpoint or self._folder()
        if self.team.host not in order["hosts"]:
            return {"fingerprint": None}
        open_stock(self.stock, path)
        return {"fingerprint": self.stock.opened().fingerprint()}

    def take_offer(self, offer: Offer) -> None:
        """The sender's description of the files, which comes as a message of its own kind."""
        take_offer(self.stock, offer)

    def _resident(self, _: Order) -> Answer:
        make_resident(self.stock, self.team)
        return {}

    def _truth(self, order: Order) -> Answer:
        """What is right, from the sender's mouth: blocks as hex, sums as numbers."""
        if "blocks" in order:
            self.stock.blocks = [bytes.fromhex(table) for table in order["blocks"]]
        if "sums" in order:
            self.stock.sums[order["source"]] = list(order["sums"])
        return {}

    def find_truth(self, source: Any, *, blocks: bool) -> Answer:
        """On the sender: what `truth` will say."""
        if blocks:
            return {"blocks": [table.hex() for table in true_blocks(self.stock)]}
        return {"source": source, "sums": true_sums(self.stock, source, self.team.device)}

    def _drop(self, _: Order) -> Answer:
        drop_stock(self.stock)
        self._remove_copies()
        self.team.release_memory()
        return {}

    # -- limits ----------------------------------------------------------------------------------

    def _limit(self, order: Order) -> Answer:
        started = False

        def start() -> None:
            nonlocal started
            started = True
            self.team.start_together()

        try:
            pace = self._pace(order, start)
        finally:
            if not started:  # it failed before; the others wait for this rank all the same
                start()
            self.team.release_memory()
        return asdict(pace)

    def _pace(self, order: Order, start: Start) -> Pace:
        team, stage = self.team, order["stage"]
        ranks: list[int] = order["ranks"]
        takes_part = team.rank in ranks
        if stage == "broadcast":
            return pace_of_broadcast(team, start, order["nbytes"], count=order["count"])
        if stage == "write":
            return pace_of_write(
                team,
                start,
                self._write_root / "limit",
                order["nbytes"],
                takes_part=takes_part,
                num_threads=order["threads"],
            )
        if stage == "together":
            return self._pace_together(order, start)
        if stage in ("h2d", "d2h"):
            return pace_of_copies(
                team,
                start,
                takes_part=takes_part,
                to_device=stage == "h2d",
                budget_s=order["budget"],
            )
        share = None
        if takes_part:
            share = (ranks.index(team.rank), len(ranks)) if order["shared"] else (0, 1)
        return pace_of_read(
            team,
            start,
            self.stock.checkpoint.files if self.stock.checkpoint else (),
            share=share,
            num_threads=order["threads"],
            budget_s=order["budget"],
            cold=self._settings.cold,
        )

    def _pace_together(self, order: Order, start: Start) -> Pace:
        offer, checkpoint = self.stock.offer, self.stock.checkpoint
        assert offer is not None, "the sender has offered"
        read_threads, write_threads = order["threads"]
        return pace_together(
            self.team,
            start,
            Together(
                sink=order["sink"],
                readers=tuple(order["readers"]),
                files=tuple((spec.name, spec.nbytes) for spec in offer.files),
                limit_nbytes=order["limit_nbytes"],
                buffer_size=order["buffer_size"],
                num_buffers=order["num_buffers"],
                read_threads=read_threads,
                write_threads=write_threads,
                staging_nbytes=self._settings.staging,
            ),
            {file.name: file.path for file in checkpoint.files} if checkpoint else {},
            self._write_root / "limit",
            cold=self._settings.cold,
        )

    # -- cases -----------------------------------------------------------------------------------

    def _prepare(self, order: Order) -> Answer:
        self.team.release_memory()
        job = Job(
            case=case_from_json(order["case"]),
            team=self.team,
            stock=self.stock,
            readers=tuple(order["readers"]),
            run_id=str(order["run_id"]),
            checked=self._settings.check,
        )
        self._source = job.case.source
        self._way = self._way_of(job)
        self._way.prepare()
        return {}

    def _connect(self, _: Order) -> Answer:
        self._made().connect()
        return {}

    def _run(self, _: Order) -> Answer:
        way = self._made()
        try:
            seconds = time_run(way, self.team)
            peak = self.team.peak_device_nbytes()
            totals = way.counters.totals()
            resident = self._source == "resident"
            wrong = way.check() if self._settings.check else 0
            return {
                "seconds": seconds,
                "wrong": wrong,
                "waiting": lanes_of(totals, seconds) if resident else waiting_of(totals),
                "busy": {} if resident else busy_of(totals),
                "loop_seconds": way.counters.loop_seconds,
                "peak_device_nbytes": peak,
                "peak_pinned_nbytes": way.pinned_nbytes,
            }
        finally:
            self._close({})

    def _close(self, _: Order) -> Answer:
        way, self._way = self._way, None
        if way is not None:
            way.close()
        return {}

    def _way_of(self, job: Job) -> Way:
        case, copy, cold = job.case, self._write_root / "copy", self._settings.cold
        if case.method == "packcast":
            if case.source == "resident":
                return ReplayCase(job)
            return FileCase(job, copy, cold=cold)
        if case.method in ("compat", "original"):
            return PackedCase(job, copy, cold=cold)
        if case.method == "per-tensor":
            return OneByOneCase(job)
        return LoadCase(job, self._open_group, cold=cold)

    # -- small things ----------------------------------------------------------------------------

    def _made(self) -> Way:
        assert self._way is not None, "prepare comes first"
        return self._way

    def _beat(self) -> None:
        now = time.perf_counter()
        self._pulse.add("read", 0, 1, now, now)

    def _folder(self) -> Path:
        return self._settings.directory / f"{self._name}-{self.stock.shape}"

    def _remove_copies(self) -> None:
        shutil.rmtree(self._write_root, ignore_errors=True)
        with suppress(OSError):
            self._write_root.parent.rmdir()  # the last rank of the host


def _kind(order: Order) -> ShapeKind:
    kind: ShapeKind = order["shape"]
    return kind


def _first_line(error: BaseException) -> str:
    text = error.message if isinstance(error, PackcastError) else str(error) or repr(error)
    return text.splitlines()[0] if text else type(error).__name__
