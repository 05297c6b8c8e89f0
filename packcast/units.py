"""Sizes (binary: MiB, GiB), rates (GB/s = 1e9 bytes per second) and durations, read and written."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from packcast.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SIZE_UNITS = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40}
_RATE_UNITS = {"B/S": 1.0, "KB/S": 1e3, "MB/S": 1e6, "GB/S": 1e9, "TB/S": 1e12}
_TIME_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*(?:/s)?)\s*")


def parse_size(text: str) -> int:
    """`64MiB`, `1.5GiB` or a plain number of bytes; raises UsageError."""
    match = _NUMBER_AND_UNIT.fullmatch(text)
    unit = match and _SIZE_UNITS.get(match[2].upper())
    if not match or not unit:
        raise UsageError(f"{text!r} is not a size", hint="sizes are binary: write 64MiB or 1GiB")
    return round(Fraction(match[1]) * unit)


def format_size(nbytes: int) -> str:
    """The size in the largest binary unit that fits, for people: `1.2 GiB`."""
    if nbytes < KIB:
        return f"{nbytes} B"
    value, units = nbytes / KIB, ["TiB", "GiB", "MiB", "KiB"]
    while round(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.{0 if value >= 100 else 1}f} {units[-1]}"


def format_exact_size(nbytes: int) -> str:
    """The size as it is written on the command line, without rounding: `64MiB`, `4096`."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if nbytes and nbytes % factor == 0:
            return f"{nbytes // factor}{unit}"
    return str(nbytes)


def format_buffers(count: int, nbytes: int) -> str:
    """`4 buffers of 64MiB`."""
    return f"{count} {'buffer' if count == 1 else 'buffers'} of {format_exact_size(nbytes)}"


def format_rate(bytes_per_second: float) -> str:
    """Decimal, as the field writes bandwidth: `43.6 GB/s`."""
    return f"{bytes_per_second / 1e9:.{1 if bytes_per_second >= 10e9 else 2}f} GB/s"


def format_speed(bytes_per_second: float) -> str:
    """As `format_rate`, but in MB/s where that says more: `8.5 MB/s`."""
    if bytes_per_second >= 0.1e9:
        return format_rate(bytes_per_second)
    return f"{bytes_per_second / 1e6:.{1 if bytes_per_second < 10e6 else 0}f} MB/s"


def format_countdown(seconds: float) -> str:
    """Minutes and seconds as a clock shows them: `4:50`, `1:02:03`."""
    minutes, rest = divmod(math.ceil(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def parse_rate(text: str) -> float:
    """`10GB/s` or `500 MB/s`, in bytes per second; raises UsageError."""
    match = _NUMBER_AND_UNIT.fullmatch(text)
    unit = match and _RATE_UNITS.get(match[2].upper())
    if not match or not unit:
        raise UsageError(f"{text!r} is not a rate", hint="write rates as 10GB/s or 500MB/s")
    return float(match[1]) * unit


def parse_duration(text: str) -> float:
    """`5min`, `3s`, `500ms` or a plain number of seconds; raises UsageError."""
    match = _NUMBER_AND_UNIT.fullmatch(text)
    unit = match and _TIME_UNITS.get(match[2])
    if not match or not unit:
        raise UsageError(f"{text!r} is not a duration", hint="write durations as 3s or 5min")
    return float(match[1]) * unit


def format_duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 05 s`."""
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
