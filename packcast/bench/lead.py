"""The sender's side of a bench: the sweep in its order, turn about, and what comes of it.

Gives orders to all ranks, the sender's own part among them, and tells the view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from packcast.bench.bench_rank import BenchRank
from packcast.bench.bottleneck import settle_waiting
from packcast.bench.cases import (
    Series,
    case_to_json,
    plan_series,
    reads_everywhere,
)
from packcast.bench.ceiling import Ceilings, Cluster
from packcast.bench.facts import file_systems, versions
from packcast.bench.messages import Answer, Did, Do
from packcast.bench.model import (
    BenchSettings,
    BenchView,
    Case,
    Environment,
    Limit,
    Measured,
    RankRun,
    Run,
)
from packcast.bench.weights import make_layout
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.control.server import ControlServer
from packcast.group.rank_info import RankInfo
from packcast.settings import Settings
from packcast.transfer.agreement import make_offers, send_offers
from packcast.transfer.share import num_io_threads


@dataclass(slots=True)
class Row:
    """A case on its way: runs so far, or why there will be none."""

    case: Case
    runs: list[Run] = field(default_factory=list)
    failure: str | None = None
    is_told: bool = False


class Lead:
    """Drives one bench on the sender; `bench_rank` is the sender's own part."""

    def __init__(
        self,
        settings: BenchSettings,
        server: ControlServer,
        bench_rank: BenchRank,
        infos: Sequence[RankInfo],
        transfer: Settings,
        view: BenchView,
    ) -> None:
        self._settings = settings
        self._server = server
        self._bench_rank = bench_rank
        self._infos = infos
        self._transfer = transfer
        self._view = view
        self._rows: list[Row] = []
        self._nbytes: dict[tuple[str, str], int] = {}  # by shape and source
        self._able: list[int] = []
        self._ceilings: Ceilings | None = None
        self._num_runs = 0
        self.num_wrong = 0
        self.num_measured = 0

    def run(self) -> None:
        """Everything, from the facts to the last row."""
        facts = self._ask("facts")
        installed = set.intersection(
            *(set(map(str, _list(answer["installed"]))) for answer in facts.values())
        )
        plan = [(shape, self._series_of(shape, installed)) for shape in self._shapes()]
        self._begin(facts, sum(len(each.cases) for _, series in plan for each in series))
        for shape, series in plan:
            self._measure_shape(shape, series)

    def tell_partial(self) -> None:
        """An end before the end: rows that have some runs are told as they are; any thread."""
        for row in self._rows:
            if not row.is_told and any(not run.is_warmup for run in row.runs):
                self._tell(row)

    # -- orders ----------------------------------------------------------------------------------

    def _ask(self, step: str, **fields: Any) -> dict[int, Answer]:
        """Have all ranks do one thing; their answers by rank. The stall watch is its bound."""
        order = Do(step=step, fields=fields)
        self._server.broadcast(order)
        mine = self._bench_rank.do(order.as_order())
        said = self._server.gather(Did, None)
        answers: dict[int, Answer] = {rank: did.answer for rank, did in said.items()}
        answers[self._bench_rank.team.rank] = mine
        return dict(sorted(answers.items()))

    def _fault_of(self, answers: dict[int, Answer]) -> str | None:
        """What went wrong on some rank, once where it is the same on all of them."""
        faults = {rank: str(said["error"]) for rank, said in answers.items() if said["error"]}
        if not faults:
            return None
        # Who gave up because of another does not know why.
        reasons = {r: fault for r, fault in faults.items() if not answers[r].get("given_up")}
        reasons = reasons or faults
        if len(reasons) == len(answers) and len(set(reasons.values())) == 1:
            return next(iter(reasons.values()))
        rank, fault = next(iter(reasons.items()))
        return f"rank {rank}: {fault}"

    # -- the plan --------------------------------------------------------------------------------

    def _shapes(self) -> list[str]:
        checkpoint = self._settings.checkpoint
        return [checkpoint.name or str(checkpoint)] if checkpoint else list(self._settings.shapes)

    def _series_of(self, shape: str, installed: set[str]) -> tuple[Series, ...]:
        settings, team = self._settings, self._bench_rank.team
        if settings.checkpoint is not None:
            nbytes = open_checkpoint(settings.checkpoint).nbytes
        else:
            kind = next(kind for kind in settings.shapes if kind == shape)
            nbytes = sum(weight.nbytes for weight in make_layout(kind, settings.size))
        self._nbytes[shape, "resident"] = self._nbytes[shape, "file"] = nbytes
        return plan_series(
            settings,
            shape,
            nbytes=nbytes,
            world_size=team.world_size,
            on_gpu=team.device.type == "cuda",
            installed=installed,
        )

    def _begin(self, facts: dict[int, Answer], num_cases: int) -> None:
        settings, team = self._settings, self._bench_rank.team
        backend = "nccl" if team.device.type == "cuda" else "gloo"
        directories = [settings.checkpoint or settings.directory]
        if "write" in settings.sinks:
            directories.append(settings.write_directory)
        ranks = tuple(_object(answer["facts"]) for answer in facts.values())
        self._view.environment(
            Environment(
                versions=versions(backend),
                backend=backend,
                world_size=team.world_size,
                ranks=ranks,
                file_systems=file_systems(directories),
            ),
            num_cases,
        )
        if settings.limits:
            on_host = max(team.hosts.count(host) for host in team.hosts)
            cluster = Cluster(
                sender=team.sender,
                world_size=team.world_size,
                device_type=team.device.type,
                read_threads=num_io_threads(1),
                write_threads=num_io_threads(on_host),
                free_nbytes=min(int(str(answer["free"])) for answer in facts.values()),
            )
            self._ceilings = Ceilings(settings, cluster, self._ask)

    # -- one shape -------------------------------------------------------------------------------

    def _measure_shape(self, shape: str, series: Sequence[Series]) -> None:
        self._ask("shape", shape=shape)
        cases = [case for each in series for case in each.cases]
        from_files = [case for case in cases if case.source == "file"]
        fault = self._make_files(shape, from_files) if from_files else None
        for each in series:
            if each.source == "file":
                self._measure_series(each, fault)
        if len(from_files) < len(cases):
            fault = self._fault_of(self._ask("resident"))
            if fault is None and self._settings.check:
                self._tell_truth("resident", blocks=False)
            for each in series:
                if each.source == "resident":
                    self._measure_series(each, fault)
        self._ask("drop")

    def _make_files(self, shape: str, cases: Sequence[Case]) -> str | None:
        """Write and open the files where they are needed, and offer them; or why that failed."""
        team = self._bench_rank.team
        everywhere = any(map(reads_everywhere, cases))
        hosts = sorted(set(team.hosts)) if everywhere else [team.hosts[team.sender]]
        if self._settings.checkpoint is None:
            writers = [team.hosts.index(host) for host in hosts]
            fault = self._fault_of(self._ask("write", shape=shape, ranks=writers))
            if fault:
                return fault
        opened = self._ask("open", hosts=hosts)
        mine = opened[team.sender]
        if mine["error"]:
            return str(mine["error"])
        same = [
            rank for rank, said in opened.items() if said.get("fingerprint") == mine["fingerprint"]
        ]
        self._able = [team.sender, *(rank for rank in same if rank != team.sender)]
        self._offer(shape)
        if self._settings.check:
            if any(case.method == "packcast" for case in cases):
                self._tell_truth("file", blocks=True)
            loads = any(case.method != "packcast" or case.sink == "land" for case in cases)
            if loads and self._bench_rank.stock.specs_fault is None:
                self._tell_truth("file", blocks=False)
        return None

    def _offer(self, shape: str) -> None:
        """Every rank learns of the files as the ranks of a transfer do."""
        stock, team = self._bench_rank.stock, self._bench_rank.team
        checkpoint = stock.opened()
        # Who reads is a matter of the case; here all but the sender are plain receivers.
        infos = [
            replace(info, role="send" if rank == team.sender else "recv", fingerprint=None)
            for rank, info in enumerate(self._infos)
        ]
        files = outgoing_files(checkpoint)
        offers = make_offers(self._transfer, checkpoint, files, infos, infos[team.sender])
        self._nbytes[shape, "file"] = offers[team.sender].nbytes
        self._server.broadcast(Do(step="offer"))
        send_offers(self._server, offers, team.sender)
        self._bench_rank.take_offer(offers[team.sender])
        self._server.gather(Did, None)

    def _tell_truth(self, source: str, *, blocks: bool) -> None:
        self._ask("truth", **self._bench_rank.find_truth(source, blocks=blocks))

    # -- one series ------------------------------------------------------------------------------

    def _measure_series(self, series: Series, fault: str | None) -> None:
        """Warm-up and runs of all its cases, turn about, so that a change of the machine's mood
        meets all of them alike."""
        rows = [Row(case) for case in series.cases]
        self._rows += rows
        if fault is None:
            for row in rows:
                self._measure_limits(row.case)
        turns = self._settings.warmup + self._settings.runs
        for turn in range(turns):
            for row in rows:
                if row.is_told:
                    continue
                self._view.begun(row.case, turn, turns)
                row.failure = fault or self._take_turn(row, is_warmup=turn < self._settings.warmup)
                if row.failure or turn == turns - 1:
                    self._tell(row)

    def _measure_limits(self, case: Case) -> None:
        if self._ceilings is None:
            return
        for limit in self._ceilings.measure_for(case, self._nbytes[case.shape, case.source]):
            self._view.limit(limit)
        while self._ceilings.warnings:
            self._view.warn(self._ceilings.warnings.pop(0))

    def _take_turn(self, row: Row, *, is_warmup: bool) -> str | None:
        """One run on all ranks; why it could not be, if so."""
        case = row.case
        if case.source == "file" and case.readers > len(self._able):
            return f"only {len(self._able)} ranks can read {case.shape}"
        self._num_runs += 1
        run_id = f"{self._bench_rank.bench_id}-{self._num_runs}"
        readers = (
            self._able[: case.readers] if case.source == "file" else [self._bench_rank.team.sender]
        )
        order = {"case": case_to_json(case), "readers": readers, "run_id": run_id}
        fault = self._fault_of(self._ask("prepare", **order)) or self._fault_of(
            self._ask("connect")
        )
        if fault:
            self._ask("close")
            return fault
        answers = self._ask("run")
        fault = self._fault_of(answers)
        if fault is None:
            ranks = settle_waiting([_rank_run(rank, said) for rank, said in answers.items()])
            row.runs.append(Run(ranks, is_warmup=is_warmup))
            self.num_wrong += sum(part.wrong for part in ranks)
        return fault

    def _tell(self, row: Row) -> None:
        row.is_told = True
        limits: tuple[Limit, ...] = ()
        if self._ceilings is not None:
            limits = self._ceilings.bearing_on(row.case)
        self.num_measured += row.failure is None
        self._view.measured(
            Measured(
                case=row.case,
                nbytes=self._nbytes[row.case.shape, row.case.source],
                runs=tuple(row.runs),
                limits=limits,
                sender=self._bench_rank.team.sender,
                failure=row.failure,
            )
        )


def _rank_run(rank: int, said: Answer) -> RankRun:
    return RankRun(
        rank=rank,
        seconds=float(str(said["seconds"])),
        wrong=int(str(said["wrong"])),
        waiting={key: float(str(value)) for key, value in _object(said["waiting"]).items()},
        busy={key: float(str(value)) for key, value in _object(said["busy"]).items()},
        loop_seconds=float(str(said["loop_seconds"])),
        peak_device_nbytes=int(str(said["peak_device_nbytes"])),
        peak_pinned_nbytes=int(str(said["peak_pinned_nbytes"])),
    )


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
