"""Limits as the sender asks for them: each measured once, and which of them bear on a case.

Gives orders through a function that reaches all ranks; measures nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packcast.bench.messages import Answer
from packcast.bench.model import BenchSettings, BenchSink, Case, Limit, LimitStage
from packcast.errors import PackcastError
from packcast.units import GIB, MIB, format_exact_size

_READ_THREADS = (1, 2, 4, 8, 16, 24)
_BUDGET_S = {"cpu": 0.2, "cuda": 0.7}
_BROADCAST_NBYTES = {"cpu": 64 * MIB, "cuda": GIB}
# What is written, or goes through all stages: as much as a row moves, up to this. Less would be a
# file system's mood: what fits its caches and a disk's is faster, or waits for them at the end.
_MOST_NBYTES = {"cpu": 2 * GIB, "cuda": 16 * GIB}
_TOGETHER_SIZES = {"cpu": (4 * MIB, 16 * MIB), "cuda": (16 * MIB, 64 * MIB)}
_TOGETHER_BUFFERS = 4
_TOGETHER_TRIES, _TOGETHER_BUDGET_S = 5, 1.5  # for each size, but at least once
_MIN_BROADCASTS, _MAX_BROADCASTS = 3, 200
_BROADCAST_TRIES = 3
# Faster than any of this is a mistake of ours, not a machine.
_ABSURD = 1e14

Ask = Callable[..., dict[int, Answer]]


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the sender knows of the ranks that matters for limits."""

    sender: int
    world_size: int
    device_type: str
    read_threads: int  # as many as packcast would use, at most
    write_threads: int
    free_nbytes: int  # on the device with the least


class Ceilings:
    """The limits known so far; each is measured when the first case needs it."""

    def __init__(self, settings: BenchSettings, cluster: Cluster, ask: Ask) -> None:
        self._settings = settings
        self._cluster = cluster
        self._ask = ask
        self._known: dict[tuple[object, ...], Limit | None] = {}
        self.warnings: list[str] = []

    def measure_for(self, case: Case, nbytes: int) -> Iterator[Limit]:
        """Measure what bears on the case and is not known yet; `nbytes` is the weights' size."""
        for key in self._keys(case):
            if key not in self._known:
                self._known[key] = limit = self._try(key, nbytes)
                if limit is not None:
                    yield limit

    def bearing_on(self, case: Case) -> tuple[Limit, ...]:
        """What is known of the stages that the case's bytes pass through."""
        found = (self._known.get(key) for key in self._keys(case))
        return tuple(limit for limit in found if limit is not None)

    def _keys(self, case: Case) -> list[tuple[object, ...]]:
        """What a case needs: read and copied in by its readers, broadcast, copied out, written."""
        broadcasts: list[tuple[object, ...]] = [("broadcast", None)]
        if case.buffer_size:
            broadcasts.append(("broadcast", case.buffer_size))
        if case.source == "resident":
            return broadcasts
        loads = case.method in ("load_file", "instanttensor", "fastsafetensors")
        everyone = self._cluster.world_size
        readers = everyone if loads else case.readers
        # instanttensor and fastsafetensors divide the reading among the ranks.
        keys: list[tuple[object, ...]] = [("read", readers, case.method != "load_file")]
        on_gpu = self._cluster.device_type == "cuda"
        if on_gpu:
            keys.append(("h2d", readers, case.method != "load_file"))
        if case.method != "load_file":
            keys += broadcasts
        if case.sink in ("write", "verify") and on_gpu:
            keys.append(("d2h",))
        if case.sink == "write":
            keys.append(("write",))
        if case.sink == "verify":
            keys.append(("read", everyone, False))
        if not loads:
            keys.append(("together", case.sink, case.readers))
        return keys

    def _try(self, key: tuple[object, ...], nbytes: int) -> Limit | None:
        """None, and a warning, where it could not be measured."""
        try:
            return self._measure(key, nbytes)
        except PackcastError as error:
            self.warnings.append(f"the limit of {key[0]} is not known: {error.message}")
            return None

    def _measure(self, key: tuple[object, ...], nbytes: int) -> Limit:
        match key:
            case ("broadcast", int() | None as buffer_size):
                return self._broadcast(buffer_size)
            case ("read", int(readers), bool(shared)):
                return self._read(readers, shared=shared)
            case ("h2d", int(readers), bool(shared)):
                return self._copies("h2d", self._first(readers), shared=shared)
            case ("d2h",):
                return self._copies("d2h", self._workers(), shared=False)
            case ("together", "discard" | "land" | "write" | "verify" as sink, int(readers)):
                return self._together(sink, readers)
            case _:
                return self._write(nbytes)

    def _broadcast(self, buffer_size: int | None) -> Limit:
        kind = self._cluster.device_type
        most = max(MIB, self._cluster.free_nbytes // 4 // MIB * MIB)
        nbytes = min(buffer_size or _BROADCAST_NBYTES[kind], most)
        everyone = range(self._cluster.world_size)

        def once(count: int) -> dict[int, Answer]:
            return self._limit("broadcast", list(everyone), nbytes=nbytes, count=count)

        trial_s = max(float(str(answer["seconds"])) for answer in once(1).values())
        wanted = int(_BUDGET_S[kind] / _BROADCAST_TRIES / max(trial_s, 1e-6))
        count = max(_MIN_BROADCASTS, min(_MAX_BROADCASTS, wanted))
        calls = f"{count} calls of {format_exact_size(nbytes)}, best of {_BROADCAST_TRIES}"
        return _best(
            self._limit_of("broadcast", once(count), calls, buffer_size=buffer_size)
            for _ in range(_BROADCAST_TRIES)
        )

    def _read(self, readers: int, *, shared: bool) -> Limit:
        ranks = self._first(readers)
        budget_s = _BUDGET_S[self._cluster.device_type]
        found: list[Limit] = []
        for threads in _counts(max(2, self._cluster.read_threads // readers)):
            answers = self._limit("read", ranks, threads=threads, budget=budget_s, shared=shared)
            detail = _so_many(threads, "thread")
            if readers > 1:
                detail += f" on each of {readers} ranks" + ("" if shared else ", all of it on each")
            found.append(self._limit_of("read", answers, detail, readers=readers, shared=shared))
        return _best(found)

    def _copies(self, stage: LimitStage, ranks: list[int], *, shared: bool) -> Limit:
        budget_s = _BUDGET_S[self._cluster.device_type]
        answers = self._limit(stage, ranks, budget=budget_s)
        detail = f"pinned, 16MiB at a time, {_so_many(len(ranks), 'rank')} at once"
        readers = len(ranks) if stage == "h2d" else None
        return self._limit_of(stage, answers, detail, readers=readers, shared=shared)

    def _write(self, nbytes: int) -> Limit:
        amount = max(8 * MIB, min(nbytes, _MOST_NBYTES[self._cluster.device_type]))
        found: list[Limit] = []
        for threads in _counts(self._cluster.write_threads)[-2:]:
            answers = self._limit("write", self._workers(), threads=threads, nbytes=amount)
            detail = f"{_so_many(threads, 'thread')}, 8 files, fsync included"
            detail += f", {_so_many(len(answers), 'rank')} at once"
            found.append(self._limit_of("write", answers, detail))
        return _best(found)

    def _together(self, sink: BenchSink, readers: int) -> Limit:
        """All stages of a row at once: the best of a few buffer sizes, not the row's own."""
        cluster, kind = self._cluster, self._cluster.device_type
        threads = max(2, cluster.read_threads // readers), cluster.write_threads
        stages = ["read", "broadcast", *({"land": ["copy"]}.get(sink, []))]
        if kind == "cuda":
            stages = ["read", "h2d", "broadcast"]
        if sink in ("write", "verify"):
            stages += ["d2h"] * (kind == "cuda") + [sink]
        found: list[Limit] = []
        for size in _TOGETHER_SIZES[kind]:
            detail = (
                f"{' + '.join(stages)} at once, {format_exact_size(size)} x {_TOGETHER_BUFFERS}"
            )
            order = {
                "sink": sink,
                "readers": self._first(readers),
                "limit_nbytes": _MOST_NBYTES[kind],
                "buffer_size": size,
                "num_buffers": _TOGETHER_BUFFERS,
                "threads": threads,
            }
            deadline = time.monotonic() + _TOGETHER_BUDGET_S
            for _ in range(_TOGETHER_TRIES):
                answers = self._limit("together", list(range(cluster.world_size)), **order)
                found.append(
                    self._limit_of("together", answers, detail, readers=readers, sink=sink)
                )
                if time.monotonic() > deadline:
                    break
        return _best(found)

    def _limit(self, stage: str, ranks: list[int], **fields: Any) -> dict[int, Answer]:
        """The answers of the ranks that took part; raises PackcastError with what went wrong."""
        answers = self._ask("limit", stage=stage, ranks=ranks, **fields)
        for rank, answer in answers.items():
            if answer["error"] is not None:
                raise PackcastError(f"rank {rank}: {answer['error']}")
        return {rank: answers[rank] for rank in ranks}

    def _limit_of(
        self,
        stage: LimitStage,
        answers: Mapping[int, Answer],
        detail: str,
        *,
        shared: bool = False,
        readers: int | None = None,
        buffer_size: int | None = None,
        sink: BenchSink | None = None,
    ) -> Limit:
        """Of the checkpoint's bytes: what ranks share adds up, else the slowest counts."""
        per_rank: dict[int, float] = {}
        for rank, answer in answers.items():
            nbytes, seconds = float(str(answer["nbytes"])), float(str(answer["seconds"]))
            if not nbytes > 0 or not seconds > 0 or nbytes / seconds > _ABSURD:
                raise PackcastError(f"rank {rank} says {nbytes:g} bytes in {seconds:g} s")
            per_rank[rank] = nbytes / seconds
        together = sum(per_rank.values()) if shared else min(per_rank.values())
        return Limit(
            stage=stage,
            bytes_per_second=together,
            detail=detail,
            buffer_size=buffer_size,
            readers=readers,
            sink=sink,
            per_rank=per_rank,
        )

    def _first(self, count: int) -> list[int]:
        """The sender and the ranks after it, as readers are chosen."""
        return [self._cluster.sender, *self._workers()][:count]

    def _workers(self) -> list[int]:
        return [rank for rank in range(self._cluster.world_size) if rank != self._cluster.sender]


def _best(found: Iterable[Limit]) -> Limit:
    return max(found, key=lambda limit: limit.bytes_per_second)


def _so_many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _counts(most: int) -> Sequence[int]:
    """Thread counts to try, `most` among them."""
    return [*(count for count in _READ_THREADS if count < most), most]
