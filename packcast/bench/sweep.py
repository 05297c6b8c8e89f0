"""Which rows a bench has: the product of what was asked for, as far as it goes together. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from packcast.bench.model import BenchSettings, BenchSink, Case, LimitStage, Method, SourceKind
from packcast.packed.plan import align_up
from packcast.settings import DEFAULT_NUM_BUFFERS, fitting_buffer_size
from packcast.units import GIB, MIB

ORIGINAL_BUFFER_SIZE, ORIGINAL_NUM_BUFFERS = GIB, 2  # its users' buffers


def plan_cases(
    settings: BenchSettings, sizes: Mapping[str, int], *, world_size: int, on_gpu: bool
) -> dict[str, tuple[Case, ...]]:
    """All cases by shape, of which `sizes` has the bytes; those of one table follow each other."""
    plan: dict[str, tuple[Case, ...]] = {}
    known: set[tuple[object, ...]] = set()  # limits of single stages are measured once
    for shape, nbytes in sizes.items():
        cases: list[Case] = []
        for source in settings.sources:
            for sink in settings.sinks:
                if not goes_together(source, sink):
                    continue
                ours = list(_ours(settings, shape, source, sink, nbytes, world_size))
                cases += ours
                if settings.baselines and sink != "verify":
                    cases += _baselines(shape, source, sink, nbytes, on_gpu)
                if settings.baselines and not on_gpu and (source, sink) == ("resident", "land"):
                    cases += _over_gloo(ours)
                if settings.limits:
                    cases += _limits(ours, on_gpu, known)
        plan[shape] = tuple(dict.fromkeys(cases))
    return plan


def goes_together(source: SourceKind, sink: BenchSink) -> bool:
    """Weights on a device have no files to write or to compare with."""
    return source == "file" or sink in ("discard", "land")


def reads_everywhere(case: Case) -> bool:
    """Whether ranks beside the sender need the files."""
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
    # `all` may be a number that was named too.
    readers = dict.fromkeys(count or world_size for count in wanted)
    points = [
        (count, buffer_size, num_buffers)
        for count in readers
        for buffer_size in settings.buffer_sizes
        for num_buffers in settings.num_buffers
    ]
    default = (1, fitting_buffer_size(nbytes), DEFAULT_NUM_BUFFERS)
    if source == "file" and len(points) > 1 and default not in points:
        points.append(default)  # a sweep shows what it would bring to set something at all
    for count, buffer_size, num_buffers in points:
        yield Case(
            method=method,
            shape=shape,
            source=source,
            sink=sink,
            readers=count,
            buffer_size=buffer_size,
            num_buffers=num_buffers,
            is_default=source == "file" and (count, buffer_size, num_buffers) == default,
        )


def _baselines(
    shape: str, source: SourceKind, sink: BenchSink, nbytes: int, on_gpu: bool
) -> Iterator[Case]:
    make = partial(Case, shape=shape, source=source, sink=sink)
    # On a CPU no more of them than the weights would fill.
    most = ORIGINAL_BUFFER_SIZE if on_gpu else min(ORIGINAL_BUFFER_SIZE, align_up(nbytes, MIB))
    yield make(method="original", buffer_size=most, num_buffers=ORIGINAL_NUM_BUFFERS)
    if (source, sink) == ("resident", "land"):
        yield make(method="per-tensor")
    if (source, sink) == ("file", "land"):
        yield make(method="load_file")


def _over_gloo(ours: list[Case]) -> Iterator[Case]:
    """Each size of buffer along a chain of ranks, and by gloo's own broadcast."""
    methods: tuple[Method, ...] = ("chain", "gloo broadcast")
    for case in ours:
        for method in methods:
            yield Case(
                method=method,
                shape=case.shape,
                source=case.source,
                sink=case.sink,
                buffer_size=case.buffer_size,
                num_buffers=case.num_buffers,
            )


def _limits(ours: list[Case], on_gpu: bool, known: set[tuple[object, ...]]) -> Iterator[Case]:
    """What the rows of a table are measured against; the stages at once with each size of buffer.

    With the most buffers: a row is to be compared with what the hardware does, not with what it
    does with few of them.
    """
    first, most = ours[0], max(case.num_buffers for case in ours)
    make = partial(
        Case,
        method="limit",
        shape=first.shape,
        source=first.source,
        sink=first.sink,
        num_buffers=most,
    )
    large = GIB if on_gpu else 64 * MIB
    sizes = dict.fromkeys([*(case.buffer_size for case in ours), large])
    largest = max(case.buffer_size for case in ours)
    found = [
        # Of large ones on a GPU one will do: they follow each other anyway.
        make(
            limit="broadcast", buffer_size=size, num_buffers=1 if on_gpu and size == large else most
        )
        for size in sizes
    ]
    if first.source == "file":
        for readers in dict.fromkeys(case.readers for case in ours):
            stages: list[LimitStage] = ["read", "h2d"] if on_gpu else ["read"]
            found += [make(limit=one, readers=readers, buffer_size=largest) for one in stages]
        if on_gpu and first.sink in ("write", "verify"):
            found.append(make(limit="d2h", buffer_size=largest))
        if first.sink == "write":
            found.append(make(limit="write", buffer_size=largest))
    for case in found:
        size = case.buffer_size if case.limit == "broadcast" else None
        key = (case.limit, case.readers, size)
        if key not in known:
            known.add(key)
            yield case
    if first.source == "file":
        for case in ours:
            yield make(limit="together", readers=case.readers, buffer_size=case.buffer_size)
