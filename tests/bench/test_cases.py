"""Which rows a sweep has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packcast.bench.cases import case_from_json, case_to_json, plan_series, reads_everywhere
from packcast.bench.model import BenchSettings, BenchSink, Case, SourceKind
from packcast.units import GIB, MIB

SINKS: tuple[BenchSink, ...] = ("discard", "land", "write", "verify")
SOURCES: tuple[SourceKind, ...] = ("file", "resident")


def settings(**changes: object) -> BenchSettings:
    given: dict[str, object] = {
        "checkpoint": None,
        "shapes": ("dense",),
        "size": 100 * MIB,
        "sources": SOURCES,
        "sinks": SINKS,
        "readers": (1, None),
        "buffer_sizes": (4 * MIB, 16 * MIB),
        "num_buffers": (2, 4),
        "runs": 1,
        "warmup": 0,
        "directory": Path("/nowhere"),
        "write_directory": Path("/nowhere"),
    }
    fields: Any = given | changes
    return BenchSettings(**fields)


def cases_of(
    asked: BenchSettings, *, world_size: int = 4, on_gpu: bool = False, installed: str = ""
) -> list[Case]:
    series = plan_series(
        asked,
        "dense",
        nbytes=100 * MIB + 1,
        world_size=world_size,
        on_gpu=on_gpu,
        installed=installed.split(),
    )
    return [case for each in series for case in each.cases]


def test_ours_is_the_product_of_readers_sizes_and_counts() -> None:
    asked = settings(sources=("file",), sinks=("write",), baselines=False)
    cases = cases_of(asked)
    assert len(cases) == len(set(cases)) == 2 * 2 * 2
    assert {case.readers for case in cases} == {1, 4}
    assert {case.method for case in cases} == {"packcast"}


def test_all_readers_and_as_many_by_number_are_one_case() -> None:
    asked = settings(sources=("file",), sinks=("write",), readers=(None, 4), baselines=False)
    assert len(cases_of(asked)) == 4


def test_resident_weights_are_dropped_or_land_and_have_one_reader() -> None:
    cases = cases_of(settings(sources=("resident",)))
    assert {case.sink for case in cases} == {"discard", "land"}
    assert {case.readers for case in cases} == {1}
    ours = {(case.method, case.sink) for case in cases if case.method in ("packcast", "compat")}
    assert ours == {("packcast", "land"), ("compat", "discard")}


@pytest.mark.parametrize(("on_gpu", "size"), [(True, GIB), (False, 101 * MIB)])
def test_the_original_is_measured_once_with_its_users_buffers(on_gpu: bool, size: int) -> None:
    cases = cases_of(settings(), on_gpu=on_gpu)
    original = [case for case in cases if case.method == "original"]
    assert len({(case.source, case.sink) for case in original}) == len(original) == 5
    assert {(case.buffer_size, case.num_buffers) for case in original} == {(size, 2)}


def test_foreign_loaders_are_measured_where_they_are_installed_beside_gpus() -> None:
    def loaders(**where: Any) -> set[str]:
        asked = settings(sources=("file",), sinks=("land",))
        cases = cases_of(asked, **where)
        return {case.method for case in cases} - {"packcast", "original"}

    both = "instanttensor fastsafetensors"
    assert loaders(on_gpu=True, installed=both) == {"load_file", *both.split()}
    assert loaders(on_gpu=False, installed=both) == {"load_file"}
    assert loaders(on_gpu=True) == {"load_file"}


def test_files_are_needed_everywhere_for_readers_comparisons_and_loaders() -> None:
    everywhere = {
        (case.method, case.sink) for case in cases_of(settings()) if reads_everywhere(case)
    }
    assert ("load_file", "land") in everywhere
    assert ("packcast", "verify") in everywhere
    assert ("packcast", "discard") in everywhere  # with all readers
    one = cases_of(settings(readers=(1,), sinks=("discard", "write")))
    assert not any(map(reads_everywhere, one))


def test_a_case_travels_as_json() -> None:
    for case in cases_of(settings()):
        assert case_from_json(case_to_json(case)) == case
