"""Who is expected, who may come in, which rank each gets, and who is missing. Pure functions.

`expected` is a number of workers (no launcher: ranks are given out once all are there) or the
ranks that a launcher has started. Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from packcast.errors import RendezvousError
from packcast.group.member import Member
from packcast.units import format_duration

Expected = int | frozenset[int]

MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a member may not come in; `fatal` if the whole group cannot be what was meant."""

    error: RendezvousError
    fatal: bool = False


def wanted(expected: Expected, me: Member) -> int:
    """How many workers must come."""
    return expected if isinstance(expected, int) else len(expected - {me.rank})


def refusal(expected: Expected, me: Member, there: Sequence[Member], new: Member) -> Refusal | None:
    """Why `new` may not join those who are there; None if it may."""
    taken = {member.rank: member for member in (me, *there) if member.rank is not None}
    twin = None if new.rank is None else taken.get(new.rank)
    if isinstance(expected, int):
        if len(there) >= expected:
            return _refuse(
                f"{new.label} is one too many: "
                f"{_count(expected, 'worker')} {_have(expected)} joined already",
                hint="start the sender with more --workers",
            )
        if new.rank is not None and not 1 <= new.rank <= expected:
            return _refuse(
                f"{new.label} asked for a rank that is not among 1 to {expected}",
                hint="give --rank a number from 1 to the sender's --workers, or leave it out",
            )
        if twin is not None:
            return _refuse(
                f"{new.label} asked for a rank that {twin.label} has", hint="give another --rank"
            )
        return None
    if twin is not None:
        error = RendezvousError(
            f"rank {new.rank} is there twice: {_where(twin)} and {_where(new)}",
            hint="two launches share one rendezvous address or one node rank",
        )
        return Refusal(error, fatal=True)
    if new.rank not in expected:
        return _refuse(f"{new.label} does not belong to this launch")
    return None


def assign_ranks(expected: Expected, there: Sequence[Member]) -> list[Member]:
    """The members in the given order of arrival, each with its rank.

    Without a launcher those that asked for a rank keep it, the others follow by host name, then
    arrival.
    """
    if not isinstance(expected, int):
        return list(there)
    taken = {member.rank for member in there}
    free = (rank for rank in range(1, expected + 1) if rank not in taken)
    unranked = [index for index, member in enumerate(there) if member.rank is None]
    by_host = sorted(unranked, key=lambda index: (there[index].host, index))
    given = dict(zip(by_host, free, strict=True))
    return [
        replace(member, rank=given.get(index, member.rank)) for index, member in enumerate(there)
    ]


def missing(
    expected: Expected, me: Member, there: Sequence[Member], deadline_s: float
) -> RendezvousError:
    """Who has not come within the deadline, and who has."""
    here = _listed([member.label for member in (me, *there)])
    if isinstance(expected, int):
        absent = f"{expected - len(there)} of {_count(expected, 'worker')}"
        verb = _have(expected - len(there))
    else:
        ranks = sorted(expected - {me.rank} - {member.rank for member in there})
        absent = _listed([f"rank {rank}" for rank in ranks])
        verb = _have(len(ranks))
    return RendezvousError(
        f"{absent} {verb} not joined within {format_duration(deadline_s)}; here: {here}",
        hint="start the missing ones sooner, or give a longer --join-timeout",
    )


def _refuse(message: str, *, hint: str | None = None) -> Refusal:
    return Refusal(RendezvousError(message, hint=hint))


def _where(member: Member) -> str:
    return f"{member.host}, pid {member.pid}"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _have(number: int) -> str:
    return "has" if number == 1 else "have"
