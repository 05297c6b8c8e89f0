"""What is typed to say a sweep: lists, and ranges with a factor or a step. Pure.

Knows the values' meaning only as far as a ring could be built of them; no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from packcast.errors import UsageError
from packcast.packed.plan import BLOCK, MAX_BUFFER_SIZE, check_buffers
from packcast.units import format_exact_size, parse_size

T = TypeVar("T")

MAX_POINTS = 256  # in one list; who wants more has mistyped a step
_RANGE = re.compile(r"(.*?)\.\.([^:]*)(?::(.*))?", re.DOTALL)


def buffer_sizes(option: str, text: str) -> tuple[int, ...]:
    """`16MiB,64MiB`, `16MiB..1GiB:x4`, `16MiB..64MiB:+16MiB`, or a mix; in bytes.

    A range holds its first value and whatever the step reaches up to its last, included. Doubles
    are dropped, the order is kept. Raises UsageError.
    """

    def checked(part: str, nbytes: int) -> int:
        if nbytes % BLOCK or not BLOCK <= nbytes <= MAX_BUFFER_SIZE:
            size = format_exact_size(nbytes)
            where = "" if part in (size, str(nbytes)) else f" in {part!r}"
            raise UsageError(
                f"{option}: {size}{where} is not a multiple of 1MiB up to 16GiB",
                hint=f"as in {option} 16MiB,64MiB or {option} 16MiB..1GiB:x4",
            )
        return nbytes

    return _points(option, text, parse_size, checked, example="16MiB..1GiB:x4")


def buffer_counts(option: str, text: str) -> tuple[int, ...]:
    """`1,2,4`, `1..8:x2`, `2..8:+2`, or a mix. Raises UsageError."""

    def checked(part: str, count: int) -> int:
        try:
            check_buffers(BLOCK, count)
        except UsageError as error:
            raise UsageError(f"{option}: {error.message}") from None
        return count

    return _points(option, text, _count, checked, example="1..8:x2")


def readers(option: str, text: str) -> tuple[int | None, ...]:
    """`1,2,all`; `all` is None. Raises UsageError."""

    def one(part: str) -> int | None:
        if part == "all":
            return None
        if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) < 1:
            raise UsageError(f"{option}: {part!r} is neither a count nor `all`")
        return int(part)

    return _distinct(one(part) for part in _parts(option, text))


def choices(option: str, text: str, allowed: Sequence[T]) -> tuple[T, ...]:
    """Some of a few words, as in `file,resident`. Raises UsageError."""
    known = {str(word): word for word in allowed}
    chosen = []
    for part in _parts(option, text):
        if part not in known:
            raise UsageError(f"{option}: {part!r} is none of {', '.join(known)}")
        chosen.append(known[part])
    return _distinct(chosen)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise UsageError(f"{text!r} is not a count")
    return int(text)


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        what = "nothing is given" if not any(parts) else f"{text!r} has an empty part"
        raise UsageError(f"{option}: {what}", hint="write lists as a,b,c")
    return parts


def _points(
    option: str,
    text: str,
    read: Callable[[str], int],
    checked: Callable[[str, int], int],
    *,
    example: str,
) -> tuple[int, ...]:
    def number(word: str) -> int:
        try:
            return read(word.strip())
        except UsageError as error:
            raise UsageError(f"{option}: {error.message}", hint=error.hint) from None

    points: list[int] = []
    for part in _parts(option, text):
        match = _RANGE.fullmatch(part)
        found = _range(option, part, match, number, example) if match else [number(part)]
        points.extend(checked(part, value) for value in found)
    distinct = _distinct(points)
    if len(distinct) > MAX_POINTS:
        raise UsageError(f"{option}: {text!r} makes {len(distinct)} values; most are {MAX_POINTS}")
    return distinct


def _range(
    option: str, part: str, match: re.Match[str], number: Callable[[str], int], example: str
) -> list[int]:
    first, last, step = number(match[1]), number(match[2]), (match[3] or "").strip()
    how = f"as in {option} {example}"
    if step[:1] not in ("x", "+") or not step[1:]:
        wrong = f"the step {step!r} of {part!r}" if step else f"{part!r} without a step"
        raise UsageError(f"{option}: {wrong} is neither a factor (:x2) nor an addend", hint=how)
    if first < 1 or last < first:
        raise UsageError(f"{option}: {part!r} does not lead upwards", hint=how)
    if step[0] == "x":
        factor = _count(step[1:]) if re.fullmatch(r"[0-9]{1,6}", step[1:]) else 0
        if factor < 2:
            raise UsageError(f"{option}: the factor of {part!r} is not 2 or more", hint=how)
        values, value = [], first
        while value <= last:
            values.append(value)
            value *= factor
        return values
    addend = number(step[1:])
    if addend < 1:
        raise UsageError(f"{option}: the step of {part!r} leads nowhere", hint=how)
    return list(range(first, last + 1, addend)[: MAX_POINTS + 1])


def _distinct(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))
