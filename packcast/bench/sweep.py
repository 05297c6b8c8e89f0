"""The rows of a bench: all combinations of the settings that make sense. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from packcast.bench.model import BenchSettings, BenchSink, Case, LimitStage, Method, SourceKind
from packcast.packed.plan import align_up
from packcast.settings import DEFAULT_NUM_BUFFERS, fitting_buffer_size
from packcast.units import GIB, MIB

ORIGINAL_BUFFER_SIZE, ORIGINAL_NUM_BUFFERS = GIB, 2  # its defaults


def plan_cases(
    settings: BenchSettings, sizes: Mapping[str, int], *, world_size: int, on_gpu: bool
) -> dict[str, tuple[Case, ...]]:
    """All cases by shape; those of one table follow each other. `sizes` are each shape's bytes."""
    plan: dict[str, tuple[Case, ...]] = {}
    known: set[tuple[object, ...]] = set()  # limits of single stages are measured once
    for shape, nbytes in sizes.items():
        cases: list[Case] = []
        for source in settings.sources:
            for sink in settings.sinks:
                if source == "resident" and sink not in ("discard", "land"):
                    continue  # resident weights have no files
                ours = list(_ours(settings, shape, source, sink, nbytes, world_size))
                cases += ours
                if settings.baselines:
                    cases += _baselines(ours, nbytes, on_gpu)
                if settings.limits:
                    cases += _limits(ours, on_gpu, known)
        plan[shape] = tuple(dict.fromkeys(cases))
    return plan


def reads_everywhere(case: Case) -> bool:
    """Whether other ranks than the sender need the files."""
    from_files = case.source == "file"
    return from_files and (case.sink == "verify" or case.readers > 1 or case.method == "load_file")


def _ours(
    settings: BenchSettings,
    shape: str,
    source: SourceKind,
    sink: BenchSink,
    nbytes: int,
    world_size: int,
) -> Iterator[Case]:
    method: Method = "compat" if (source, sink) == ("resident", "discard") else "packcast"
    wanted = settings.readers if source == "file" else (1,)
    points = [
        (readers, buffer_size, num_buffers)
        for readers in dict.fromkeys(count or world_size for count in wanted)
        for buffer_size in settings.buffer_sizes
        for num_buffers in settings.num_buffers
    ]
    default = (1, fitting_buffer_size(nbytes), DEFAULT_NUM_BUFFERS)
    if source == "file" and len(points) > 1 and default not in points:
        points.append(default)  # a sweep shows what its options gain over the defaults
    for point in points:
        readers, buffer_size, num_buffers = point
        yield Case(
            method=method,
            shape=shape,
            source=source,
            sink=sink,
            readers=readers,
            buffer_size=buffer_size,
            num_buffers=num_buffers,
            is_default=source == "file" and point == default,
        )


def _baselines(ours: list[Case], nbytes: int, on_gpu: bool) -> Iterator[Case]:
    plain = replace(ours[0], readers=1, buffer_size=0, num_buffers=0, is_default=False)
    if plain.sink == "verify":
        return
    # On a CPU no larger than the weights.
    most = ORIGINAL_BUFFER_SIZE if on_gpu else min(ORIGINAL_BUFFER_SIZE, align_up(nbytes, MIB))
    yield replace(plain, method="original", buffer_size=most, num_buffers=ORIGINAL_NUM_BUFFERS)
    if plain.sink == "land" and plain.source == "file":
        yield replace(plain, method="load_file")
    elif plain.sink == "land":
        yield replace(plain, method="per-tensor")
        for case in ours if not on_gpu else ():
            yield replace(case, method="chain")
            yield replace(case, method="gloo broadcast")


def _limits(ours: list[Case], on_gpu: bool, known: set[tuple[object, ...]]) -> Iterator[Case]:
    """The limits of single stages that are not yet `known`, and of all stages at once for each row.

    With the most buffers: rows with few of them are compared with what the hardware can do.
    """
    most = max(case.num_buffers for case in ours)
    largest = max(case.buffer_size for case in ours)
    first = replace(ours[0], method="limit", readers=1, num_buffers=most, is_default=False)
    large = GIB if on_gpu else 64 * MIB
    found = []
    for size in dict.fromkeys([*(case.buffer_size for case in ours), large]):
        # On a GPU one large buffer is enough: broadcasts follow each other anyway.
        count = 1 if on_gpu and size == large else most
        found.append(replace(first, limit="broadcast", buffer_size=size, num_buffers=count))
    if first.source == "file":
        stages: list[tuple[LimitStage, int]] = []
        for readers in dict.fromkeys(case.readers for case in ours):
            stages += [("read", readers), ("h2d", readers)] if on_gpu else [("read", readers)]
        if on_gpu and first.sink in ("write", "verify"):
            stages.append(("d2h", 1))
        if first.sink == "write":
            stages.append(("write", 1))
        found += [
            replace(first, limit=stage, readers=readers, buffer_size=largest)
            for stage, readers in stages
        ]
    for case in found:
        key = (case.limit, case.readers, case.limit == "broadcast" and case.buffer_size)
        if key not in known:
            known.add(key)
            yield case
    if first.source == "file":
        for case in ours:
            together = replace(first, limit="together", readers=case.readers)
            yield replace(together, buffer_size=case.buffer_size)
