"""Claims about how a sweep is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packcast.bench import grammar
from packcast.errors import UsageError
from packcast.units import MIB, format_exact_size


def mib(*sizes: int) -> tuple[int, ...]:
    return tuple(size * MIB for size in sizes)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("16MiB", mib(16)),
        ("16MiB,64MiB,256MiB", mib(16, 64, 256)),
        (" 16 MiB , 4MiB ", mib(16, 4)),
        ("16MiB..1GiB:x4", mib(16, 64, 256, 1024)),
        ("16MiB..1000MiB:x4", mib(16, 64, 256)),
        ("16MiB..64MiB:+16MiB", mib(16, 32, 48, 64)),
        ("16MiB..16MiB:x2", mib(16)),
        ("64MiB,16MiB..64MiB:x2,1MiB", mib(64, 16, 32, 1)),
        ("16777216", mib(16)),
        ("16GiB", mib(16 << 10)),
    ],
)
def test_sizes_are_lists_ranges_and_mixes_without_doubles(
    text: str, sizes: tuple[int, ...]
) -> None:
    assert grammar.buffer_sizes("--buffer-size", text) == sizes


@pytest.mark.parametrize(
    ("text", "counts"),
    [("1,2,4", (1, 2, 4)), ("1..8:x2", (1, 2, 4, 8)), ("2..8:+3", (2, 5, 8)), ("4,2,4", (4, 2))],
)
def test_counts_are_written_alike(text: str, counts: tuple[int, ...]) -> None:
    assert grammar.buffer_counts("--num-buffers", text) == counts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing is given"),
        ("16MiB,,64MiB", "has an empty part"),
        ("16MiB,", "has an empty part"),
        ("lots", "'lots' is not a size"),
        ("16MiB..64MiB", "'16MiB..64MiB' without a step"),
        ("16MiB..64MiB:", "without a step"),
        ("16MiB..64MiB:4", "the step '4'"),
        ("16MiB..64MiB:x", "the step 'x'"),
        ("16MiB..64MiB:x1", "is not 2 or more"),
        ("16MiB..64MiB:x1.5", "is not 2 or more"),
        ("16MiB..64MiB:x-2", "is not 2 or more"),
        ("16MiB..64MiB:+0", "leads nowhere"),
        ("16MiB..64MiB:+x", "'x' is not a size"),
        ("64MiB..16MiB:x2", "does not lead upwards"),
        ("0..16MiB:x2", "does not lead upwards"),
        ("..16MiB:x2", "is not a size"),
        ("16MiB..:x2", "is not a size"),
        ("1.5MiB", "1536KiB in '1.5MiB' is not a multiple of 1MiB"),
        ("1MiB..4MiB:+1.5MiB", "2560KiB in '1MiB..4MiB:+1.5MiB' is not a multiple"),
        ("32GiB", "32GiB is not a multiple of 1MiB up to 16GiB"),
        ("0", "0 is not a multiple"),
        ("1MiB..16GiB:+1MiB", "makes"),
    ],
)
def test_what_is_no_sweep_of_sizes_is_said_with_option_and_part(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        grammar.buffer_sizes("--buffer-size", text)
    assert caught.value.message.startswith("--buffer-size: ")
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (grammar.buffer_counts, "0", "0 buffers"),
        (grammar.buffer_counts, "2000", "2000 buffers"),
        (grammar.buffer_counts, "two", "'two' is not a count"),
        (grammar.buffer_counts, "-1", "'-1' is not a count"),
        (grammar.buffer_counts, "1..8:+0", "leads nowhere"),
        (grammar.readers, "0", "'0' is neither a count nor `all`"),
        (grammar.readers, "1,some", "'some' is neither"),
        (grammar.readers, "²", "neither"),
    ],
)
def test_what_is_no_count_is_said_alike(
    read: Callable[[str, str], object], text: str, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read("--option", text)
    assert caught.value.message.startswith("--option: ")
    assert said in caught.value.message


def test_readers_are_counts_or_all() -> None:
    assert grammar.readers("--readers", "1,all,2,1") == (1, None, 2)


def test_choices_are_words_of_a_list() -> None:
    assert grammar.choices("--sink", "land, discard,land", ("discard", "land")) == (
        "land",
        "discard",
    )
    with pytest.raises(UsageError, match="--sink: 'lnad' is none of discard, land"):
        grammar.choices("--sink", "lnad", ("discard", "land"))


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(0, 4096), st.one_of(st.integers(2, 9), st.integers(-99, -1)))
def test_a_range_begins_with_its_first_value_and_never_passes_its_last(
    first: int, more: int, step: int
) -> None:
    last = first + (more if step > 1 else more % 200)
    how = f"x{step}" if step > 1 else f"+{-step}MiB"
    found = grammar.buffer_sizes("--buffer-size", f"{first}MiB..{last}MiB:{how}")
    assert found[0] == first * MIB
    nexts = [size * step if step > 1 else size - step * MIB for size in found]
    assert list(found[1:]) == nexts[:-1]
    assert found[-1] <= last * MIB < nexts[-1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 16384), min_size=1, max_size=20))
def test_what_is_written_is_read_back(sizes: list[int]) -> None:
    text = ",".join(format_exact_size(size * MIB) for size in sizes)
    assert grammar.buffer_sizes("--buffer-size", text) == mib(*dict.fromkeys(sizes))
