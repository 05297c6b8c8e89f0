"""Which ranks are expected, which have joined, and which rank each worker gets. Knows no sockets.

`expected` is a number of workers (no launcher: ranks are assigned once all have joined) or the
ranks that a launcher has started.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from packcast.control.rank_info import RankInfo
from packcast.errors import RendezvousError
from packcast.units import format_duration

Expected = int | frozenset[int]

_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a worker may not join; `fatal` if the whole group is wrong."""

    error: RendezvousError
    fatal: bool = False


class Membership:
    """The workers that have joined so far, by a key of the caller's, in order of arrival."""

    def __init__(self, expected: Expected, me: RankInfo) -> None:
        self.expected = expected
        self.me = replace(me, rank=0) if isinstance(expected, int) else me
        self.wanted = expected if isinstance(expected, int) else len(expected - {me.rank})
        self._there: dict[Hashable, RankInfo] = {}
        self._by_rank: dict[int, Hashable] = {}

    def __len__(self) -> int:
        return len(self._there)

    @property
    def is_launched(self) -> bool:
        """Whether a launcher has started the ranks: a lost one does not come again."""
        return not isinstance(self.expected, int)

    @property
    def is_complete(self) -> bool:
        return len(self._there) >= self.wanted

    def holder_of(self, rank: int | None) -> Hashable | None:
        """The key of the worker that has this rank."""
        return None if rank is None else self._by_rank.get(rank)

    def add(self, key: Hashable, worker: RankInfo) -> None:
        """A worker without a `refusal` has joined."""
        self._there[key] = worker
        if worker.rank is not None:
            self._by_rank[worker.rank] = key

    def remove(self, key: Hashable) -> None:
        """It has left before all had joined."""
        worker = self._there.pop(key, None)
        if worker is not None and worker.rank is not None:
            self._by_rank.pop(worker.rank, None)

    def refusal(self, new: RankInfo) -> Refusal | None:
        """Why `new` may not join; None if it may."""
        if isinstance(self.expected, int):
            return self._refusal_without_launcher(new, self.expected)
        twin = self._twin_of(new)
        if twin is not None:
            error = RendezvousError(
                f"rank {new.rank} is there twice: {_where(twin)} and {_where(new)}",
                hint="two launches share one rendezvous address or one node rank",
            )
            return Refusal(error, fatal=True)
        if new.rank not in self.expected:
            return _refuse(f"{new.label} does not belong to this launch")
        return None

    def ranked(self) -> dict[Hashable, RankInfo]:
        """Every worker with its rank, by key, once all have joined.

        Without a launcher workers that asked for a rank get it, the others follow by host name,
        then arrival.
        """
        free = (rank for rank in range(1, self.wanted + 1) if rank not in self._by_rank)
        unranked = [key for key, worker in self._there.items() if worker.rank is None]
        by_host = sorted(unranked, key=lambda key: self._there[key].host)  # stable
        assigned = dict(zip(by_host, free, strict=False))
        return {
            key: replace(worker, rank=assigned[key]) if key in assigned else worker
            for key, worker in self._there.items()
        }

    def missing(self, limit_s: float) -> RendezvousError:
        """The error that names the missing ranks, and those that have joined."""
        here = listed([info.label for info in (self.me, *self._there.values())])
        if isinstance(self.expected, int):
            count = self.wanted - len(self._there)
            absent = f"{count} of {_count(self.expected, 'worker')}"
        else:
            ranks = self.missing_ranks()
            count = len(ranks)
            absent = listed([f"rank {rank}" for rank in ranks])
        return RendezvousError(
            f"{absent} {_have(count)} not joined within {format_duration(limit_s)}; here: {here}",
            hint="start the missing ones sooner, or give a longer --join-timeout",
        )

    def missing_ranks(self) -> tuple[int, ...]:
        """The ranks that have not joined, where a launcher has given them out."""
        if isinstance(self.expected, int):
            return ()
        return tuple(sorted(self.expected - {self.me.rank} - self._by_rank.keys()))

    def _refusal_without_launcher(self, new: RankInfo, expected: int) -> Refusal | None:
        if self.is_complete:
            return _refuse(
                f"{new.label} is one too many: "
                f"{_count(expected, 'worker')} {_have(expected)} joined already",
                hint="start the sender with more --workers",
            )
        if new.rank is None:
            return None
        if not 1 <= new.rank <= expected:
            return _refuse(
                f"{new.label} asked for a rank that is not among 1 to {expected}",
                hint="give --rank a number from 1 to the sender's --workers, or leave it out",
            )
        twin = self._twin_of(new)
        if twin is not None:
            return _refuse(
                f"{new.label} asked for a rank that {twin.label} has", hint="give another --rank"
            )
        return None

    def _twin_of(self, new: RankInfo) -> RankInfo | None:
        if new.rank is not None and new.rank == self.me.rank:
            return self.me
        holder = self.holder_of(new.rank)
        return None if holder is None else self._there[holder]


def _refuse(message: str, *, hint: str | None = None) -> Refusal:
    return Refusal(RendezvousError(message, hint=hint))


def _where(info: RankInfo) -> str:
    return f"{info.host}, pid {info.pid}"


def listed(names: Sequence[str]) -> str:
    """The names with commas; of many only the first ones and a count."""
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _have(number: int) -> str:
    return "has" if number == 1 else "have"
