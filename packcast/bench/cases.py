"""Which rows a sweep has: the product of what was asked for, as far as it goes together.

Pure functions; knows no ranks but their number, and measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from packcast.bench.model import BenchSettings, BenchSink, Case, Method, SourceKind
from packcast.packed.plan import align_up
from packcast.units import GIB, MIB

ORIGINAL_BUFFER_SIZE = GIB
ORIGINAL_NUM_BUFFERS = 2
# Loaders of others: each rank fills its own GPU from files, so there is no buffer to choose.
FOREIGN_METHODS: tuple[Method, ...] = ("instanttensor", "fastsafetensors")
_LOADERS: tuple[Method, ...] = ("load_file", *FOREIGN_METHODS)


@dataclass(frozen=True, slots=True)
class Series:
    """Cases with one shape, source and sink, measured turn about."""

    source: SourceKind
    sink: BenchSink
    cases: tuple[Case, ...]


def plan_series(
    settings: BenchSettings,
    shape: str,
    *,
    nbytes: int,
    world_size: int,
    on_gpu: bool,
    installed: Collection[str],
) -> tuple[Series, ...]:
    """All rows of one shape of `nbytes`; `installed` names the foreign loaders that are there."""
    planned = []
    for source in settings.sources:
        for sink in settings.sinks:
            cases = [
                *_ours(settings, shape, source, sink, world_size),
                *_baselines(settings, shape, source, sink, nbytes, on_gpu, installed),
            ]
            if cases:
                planned.append(Series(source, sink, tuple(cases)))
    return tuple(planned)


def goes_together(source: SourceKind, sink: BenchSink) -> bool:
    """Weights on a device have no files to write or to compare with."""
    return source == "file" or sink in ("discard", "land")


def reads_everywhere(case: Case) -> bool:
    """Whether ranks beside the sender need the files."""
    if case.source == "resident":
        return False
    return case.sink == "verify" or case.readers > 1 or case.method in _LOADERS


def case_to_json(case: Case) -> str:
    """The case as one line, for an order to the ranks."""
    return json.dumps(asdict(case))


def case_from_json(text: str) -> Case:
    """The inverse; the fields are those of this very program on another rank."""
    fields: dict[str, Any] = json.loads(text)
    return Case(**fields)


def _ours(
    settings: BenchSettings, shape: str, source: SourceKind, sink: BenchSink, world_size: int
) -> list[Case]:
    if not goes_together(source, sink):
        return []
    method: Method = "compat" if (source, sink) == ("resident", "discard") else "packcast"
    wanted = settings.readers if source == "file" else (1,)
    # `all` may be a number that was named too.
    readers = dict.fromkeys(world_size if count is None else count for count in wanted)
    return [
        Case(
            method=method,
            shape=shape,
            source=source,
            sink=sink,
            readers=count,
            buffer_size=buffer_size,
            num_buffers=num_buffers,
        )
        for count in readers
        for buffer_size in settings.buffer_sizes
        for num_buffers in settings.num_buffers
    ]


def _baselines(
    settings: BenchSettings,
    shape: str,
    source: SourceKind,
    sink: BenchSink,
    nbytes: int,
    on_gpu: bool,
    installed: Collection[str],
) -> list[Case]:
    if not settings.baselines or not goes_together(source, sink) or sink == "verify":
        return []
    methods: list[Method] = ["original"]
    if (source, sink) == ("resident", "land"):
        methods.append("per-tensor")
    if (source, sink) == ("file", "land"):
        methods.append("load_file")
        methods += [name for name in FOREIGN_METHODS if name in installed and on_gpu]
    # Its users' buffers; on a CPU no more of them than the weights would fill.
    most = ORIGINAL_BUFFER_SIZE if on_gpu else min(ORIGINAL_BUFFER_SIZE, align_up(nbytes, MIB))
    return [
        Case(
            method=name,
            shape=shape,
            source=source,
            sink=sink,
            readers=1,
            buffer_size=most if name == "original" else 0,
            num_buffers=ORIGINAL_NUM_BUFFERS if name == "original" else 0,
        )
        for name in methods
    ]
