"""Which limits are asked for, of whom, and what is made of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packcast.bench.ceiling import Ceilings, Cluster
from packcast.bench.model import BenchSettings, BenchSink, Case, Limit, Method, SourceKind
from packcast.units import GIB, MIB

SETTINGS = BenchSettings(
    checkpoint=None,
    shapes=("dense",),
    size=GIB,
    sources=("file",),
    sinks=("discard",),
    readers=(1,),
    buffer_sizes=(16 * MIB,),
    num_buffers=(2,),
    runs=1,
    warmup=0,
    directory=Path("/nowhere"),
    write_directory=Path("/nowhere"),
)


class Ranks:
    """Four ranks that read faster with each thread up to eight, and are otherwise as told."""

    def __init__(self, device_type: str, **told: Any) -> None:
        self.orders: list[dict[str, Any]] = []
        self.told = told
        cluster = Cluster(
            sender=0,
            world_size=4,
            device_type=device_type,
            read_threads=24,
            write_threads=4,
            free_nbytes=64 * GIB,
        )
        self.ceilings = Ceilings(SETTINGS, cluster, self.ask)

    def ask(self, step: str, **order: Any) -> dict[int, dict[str, object]]:
        assert step == "limit"
        self.orders.append(order)
        threads = order.get("threads", 8)
        rate = 1e9 * min(8, threads if isinstance(threads, int) else 8)
        return {
            rank: {"error": None, "nbytes": int(rate * (1 + rank)), "seconds": 1.0} | self.told
            for rank in range(4)
        }

    def limits(
        self, source: SourceKind, sink: BenchSink, method: Method = "packcast", readers: int = 1
    ) -> list[Limit]:
        case = Case(
            method=method,
            shape="dense",
            source=source,
            sink=sink,
            readers=readers,
            buffer_size=0 if method == "load_file" else 16 * MIB,
            num_buffers=2,
        )
        told = list(self.ceilings.measure_for(case, GIB))
        assert {limit.stage for limit in told} <= {
            limit.stage for limit in self.ceilings.bearing_on(case)
        }
        return list(self.ceilings.bearing_on(case))


def stages(limits: list[Limit]) -> list[str]:
    return [limit.stage for limit in limits]


def test_beside_gpus_the_copies_to_and_from_them_bear_too() -> None:
    ranks = Ranks("cuda")
    passed = ["read", "h2d", "broadcast", "broadcast"]
    assert stages(ranks.limits("file", "discard")) == [*passed, "together"]
    assert stages(ranks.limits("file", "write")) == [*passed, "d2h", "write", "together"]
    assert stages(ranks.limits("file", "verify")) == [*passed, "d2h", "read", "together"]
    assert stages(ranks.limits("file", "land", "original")) == [*passed, "together"]
    assert stages(ranks.limits("file", "land", "load_file")) == ["read", "h2d"]
    assert stages(ranks.limits("resident", "land")) == ["broadcast", "broadcast"]


def test_a_limit_is_measured_once_whoever_needs_it() -> None:
    ranks = Ranks("cpu")
    ranks.limits("file", "discard")
    asked = len(ranks.orders)
    ranks.limits("file", "discard", "original")
    ranks.limits("resident", "land")
    assert len(ranks.orders) == asked


def test_a_broadcast_is_of_one_gib_and_of_the_buffers_size() -> None:
    limits = Ranks("cuda").limits("resident", "land")
    assert [limit.buffer_size for limit in limits] == [None, 16 * MIB]
    assert ["1GiB" in limits[0].detail, "16MiB" in limits[1].detail] == [True, True]


def test_the_best_number_of_threads_counts() -> None:
    ranks = Ranks("cuda")
    read = ranks.limits("file", "discard")[0]
    assert [order["threads"] for order in ranks.orders if order["stage"] == "read"] == [
        *(1, 2, 4, 8, 16, 24)
    ]
    assert read.bytes_per_second == 8e9
    assert read.detail == "8 threads"


def test_what_readers_share_adds_up_and_what_each_does_alone_counts_by_the_slowest() -> None:
    ranks = Ranks("cuda")
    shared, *_ = ranks.limits("file", "discard", readers=4)
    assert shared.bytes_per_second == pytest.approx(6e9 * (1 + 2 + 3 + 4))  # 24 // 4 threads each
    assert shared.readers == 4
    *_, write, _ = ranks.limits("file", "write")
    assert write.per_rank.keys() == {1, 2, 3}
    assert write.bytes_per_second == min(write.per_rank.values())


def test_what_all_stages_reach_is_measured_for_each_sink_and_number_of_readers() -> None:
    ranks = Ranks("cuda")
    ranks.limits("file", "write")
    found = ranks.limits("file", "write", readers=3)[-1]
    assert (found.stage, found.sink, found.readers) == ("together", "write", 3)
    assert found.detail == "read + h2d + broadcast + d2h + write at once, 16MiB x 4"
    assert found.per_rank.keys() == {0, 1, 2, 3}
    assert found.bytes_per_second == min(found.per_rank.values())
    asked = [order for order in ranks.orders if order["stage"] == "together"]
    assert {tuple(order["readers"]) for order in asked} == {(0,), (0, 1, 2)}
    assert {order["threads"] for order in asked} == {(24, 4), (8, 4)}
    assert {order["buffer_size"] for order in asked} == {16 * MIB, 64 * MIB}
    assert {order["sink"] for order in asked} == {"write"}


def test_as_many_bytes_are_written_as_a_row_writes() -> None:
    ranks = Ranks("cpu")
    ranks.limits("file", "write")
    assert {order["nbytes"] for order in ranks.orders if order["stage"] == "write"} == {GIB}


@pytest.mark.parametrize(
    "told", [{"error": "no room"}, {"seconds": 0.0}, {"nbytes": 0}, {"seconds": 1e-9}]
)
def test_a_limit_that_makes_no_sense_is_a_warning_and_no_limit(told: dict[str, Any]) -> None:
    ranks = Ranks("cpu", **told)
    assert ranks.limits("resident", "land") == []
    assert len(ranks.ceilings.warnings) == 2
    assert "the limit of broadcast is not known: rank 0" in ranks.ceilings.warnings[0]
