"""Sizes, durations and rates: what is written can be read, what is no size is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from packcast.errors import UsageError
from packcast.units import (
    GIB,
    KIB,
    MIB,
    format_duration,
    format_exact_size,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)

TIB = 1 << 40
DIGITS = "9" * 400  # more than a float holds


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1KiB", KIB),
        ("64MiB", 64 * MIB),
        ("64mib", 64 * MIB),
        ("64MIB", 64 * MIB),
        (" 64 MiB ", 64 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("0.5KiB", 512),
        ("2TiB", 2 * TIB),
        ("007MiB", 7 * MIB),
    ],
)
def test_a_size_is_a_number_with_a_binary_unit(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "MiB", "-1", "+1", "1e3", ".5MiB", "1.MiB", "1,5MiB", "64MB", "64M", "64 Mi B"),
        *("64MiBs", "1 2", "0x10", "inf", "nan", "1_000", "64\nMiB\n!", DIGITS, DIGITS + "GiB"),
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert "64MiB" in str(caught.value.hint)


@given(st.integers(0, 1 << 64) | st.integers(0, 1 << 24).map(lambda n: n * MIB))
@example((1 << 53) + 1)
@example(TIB)
def test_an_exact_size_is_read_as_it_was_written(nbytes: int) -> None:
    text = format_exact_size(nbytes)
    assert parse_size(text) == nbytes
    assert re.fullmatch(r"\d+([KMG]iB)?", text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (KIB, "1KiB"),
        (1025, "1025"),
        (64 * MIB, "64MiB"),
        (1536 * MIB, "1536MiB"),
        (GIB, "1GiB"),
        (TIB, "1024GiB"),
    ],
)
def test_an_exact_size_has_the_largest_unit_that_leaves_nothing_over(
    nbytes: int, text: str
) -> None:
    assert format_exact_size(nbytes) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (100 * KIB, "100 KiB"),
        (1023 * KIB, "1023 KiB"),
        (MIB, "1.0 MiB"),
        (4_900_000_000, "4.6 GiB"),
        (TIB, "1.0 TiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_a_size_for_people_has_the_largest_unit_that_fits(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(0, 1 << 50))
@example(MIB - 1)
@example(GIB - 1)
@example(102349)
def test_a_size_for_people_is_short_close_and_never_1024_of_a_unit(nbytes: int) -> None:
    number, unit = format_size(nbytes).split()
    factor = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}[unit]
    assert abs(float(number) * factor - nbytes) <= 0.051 * nbytes
    assert float(number) < 1024 or unit == "TiB"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5min", 300.0), ("3s", 3.0), ("500ms", 0.5), ("1.5h", 5400.0), ("7", 7.0), (" 2 s ", 2.0)],
)
def test_a_duration_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "5m", "3S", "3 sec", "1:30", "1e3", "inf", "nan", DIGITS, DIGITS + "h"]
)
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration") as caught:
        parse_duration(text)
    assert "5min" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (0.421, "0.42 s"),
        (9.99, "9.99 s"),
        (12.34, "12.3 s"),
        (60.0, "1 min 00 s"),
        (185.4, "3 min 05 s"),
        (119.6, "2 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7384.0, "2 h 03 min"),
    ],
)
def test_a_duration_for_people_has_two_units_at_most(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(0, 1e6))
@example(59.96)
@example(3599.7)
@example(0.6)  # which is 0.60 s
def test_a_duration_never_says_60_of_a_unit(seconds: float) -> None:
    assert not re.search(r"(?<![\d.])60(\.0+)? (s|min)", format_duration(seconds))


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.0, "0.00 GB/s"),
        (5e6, "0.01 GB/s"),
        (4.26e9, "4.26 GB/s"),
        (43.64e9, "43.6 GB/s"),
        (365e9, "365.0 GB/s"),
    ],
)
def test_a_rate_is_decimal(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10GB/s", 10e9), ("1.5 GB/s", 1.5e9), ("500MB/s", 5e8), ("3 gb/s", 3e9), ("2TB/s", 2e12)],
)
def test_rates_are_read(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "10", "10GB", "10GiB/s", "-1GB/s", "GB/s", "10 G/s"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a rate"):
        parse_rate(text)
    with pytest.raises(UsageError):
        parse_size("10GB/s")
