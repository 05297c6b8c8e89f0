"""Which rows a sweep has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packcast.bench.model import BenchSettings, Case
from packcast.bench.sweep import plan_cases, reads_everywhere
from packcast.settings import Settings
from packcast.units import GIB, MIB

SETTINGS = BenchSettings(
    transfer=Settings(command="send"),
    shapes=("dense",),
    size=GIB,
    sources=("file",),
    sinks=("discard",),
    readers=(1,),
    buffer_sizes=(16 * MIB, 64 * MIB),
    num_buffers=(2, 4),
    runs=1,
    warmup=0,
    directory=Path("/tmp"),
    write_directory=Path("/tmp"),
    baselines=False,
    limits=False,
)


def cases(on_gpu: bool = False, **changes: Any) -> tuple[Case, ...]:
    settings = replace(SETTINGS, **changes)
    return plan_cases(settings, {"dense": GIB}, world_size=4, on_gpu=on_gpu)["dense"]


def test_a_sweep_is_the_product_of_what_goes_together() -> None:
    found = cases(sources=("file", "resident"), sinks=("discard", "land", "write", "verify"))
    kinds = {(case.method, case.source, case.sink) for case in found}
    assert kinds == {
        *(("packcast", "file", sink) for sink in ("discard", "land", "write", "verify")),
        ("compat", "resident", "discard"),
        ("packcast", "resident", "land"),
    }
    assert len(found) == 6 * 4
    assert len({(case.buffer_size, case.num_buffers) for case in found}) == 4


def test_readers_count_each_number_once_and_only_from_files() -> None:
    found = cases(sources=("file", "resident"), readers=(1, 4, None))
    assert {case.readers for case in found if case.source == "file"} == {1, 4}
    assert {case.readers for case in found if case.source == "resident"} == {1}


def test_a_sweep_has_the_point_that_is_taken_without_options() -> None:
    assert [case.is_default for case in cases()] == [False, False, False, True]
    added = cases(buffer_sizes=(4 * MIB,))
    assert [case.buffers for case in added] == ["4MiB x 2", "4MiB x 4", "64MiB x 4"]
    assert added[-1].is_default
    assert len(cases(buffer_sizes=(4 * MIB,), num_buffers=(2,))) == 1  # no sweep at all


@pytest.mark.parametrize(("on_gpu", "more"), [(True, set()), (False, {"chain", "gloo broadcast"})])
def test_each_table_has_its_baselines(on_gpu: bool, more: set[str]) -> None:
    everything: Any = {"sources": ("file", "resident"), "sinks": ("discard", "land", "verify")}
    found = cases(on_gpu, baselines=True, **everything)
    by_table: dict[tuple[str, str], set[str]] = {}
    for case in found:
        by_table.setdefault((case.source, case.sink), set()).add(case.method)
    assert by_table == {
        ("file", "discard"): {"packcast", "original"},
        ("file", "land"): {"packcast", "original", "load_file"},
        ("file", "verify"): {"packcast"},
        ("resident", "discard"): {"compat", "original"},
        ("resident", "land"): {"packcast", "original", "per-tensor"} | more,
    }
    assert len(set(found)) == len(found)


def limits(on_gpu: bool, **changes: Any) -> list[tuple[object, ...]]:
    found = cases(on_gpu, limits=True, num_buffers=(4,), **changes)
    return [(c.limit, c.sink, c.readers, c.buffer_size // MIB) for c in found if c.limit]


def test_limits_are_of_each_stage_once_and_of_all_at_once_for_each_row() -> None:
    found = limits(True, sinks=("discard", "write"), readers=(1, 4), buffer_sizes=(16 * MIB,))
    assert sorted(found, key=str) == sorted(
        [
            ("broadcast", "discard", 1, 16),
            ("broadcast", "discard", 1, 64),
            ("broadcast", "discard", 1, 1024),
            ("read", "discard", 1, 64),
            ("read", "discard", 4, 64),
            ("h2d", "discard", 1, 64),
            ("h2d", "discard", 4, 64),
            ("d2h", "write", 1, 64),
            ("write", "write", 1, 64),
            *(
                ("together", sink, readers, size)
                for sink in ("discard", "write")
                for readers, size in ((1, 16), (4, 16), (1, 64))
            ),
        ],
        key=str,
    )


def test_resident_weights_have_only_the_broadcast_as_a_limit() -> None:
    assert {one for one, *_ in limits(False, sources=("resident",))} == {"broadcast"}
    stages = {one for one, *_ in limits(False, sinks=("write",))}
    assert stages == {"broadcast", "read", "write", "together"}


def test_files_are_needed_everywhere_where_all_ranks_read() -> None:
    base = cases()[0]
    assert not reads_everywhere(base)
    for changes in ({"sink": "verify"}, {"readers": 2}, {"method": "load_file"}):
        assert reads_everywhere(replace(base, **changes))  # type: ignore[arg-type]
        assert not reads_everywhere(replace(base, source="resident", **changes))  # type: ignore[arg-type]
