"""The bench over NCCL: every way runs there too, is checked, and meets its limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packcast.units import GIB, MIB
from tests.bench.launch import EVERY_WAY, label, rank_runs, rows_of
from tests.gpu.conftest import Gpus

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture
def made(memory: Path) -> Iterator[Path]:
    """Where the bench makes its files; it has to leave none."""
    folder = memory / "bench"
    folder.mkdir()
    yield folder
    left = list(folder.iterdir())
    for path in left:
        path.unlink()
    folder.rmdir()
    assert not left


def bench_on(gpus: Gpus, made: Path, found: Path, code: int = 0, **changes: Any) -> dict[str, Any]:
    settings = {
        "checkpoint": None,
        "shapes": ["dense"],
        "size": 256 * MIB,
        "sources": ["file", "resident"],
        "sinks": ["discard", "land", "write", "verify"],
        "readers": [1, None],
        "buffer_sizes": [16 * MIB, 64 * MIB],
        "num_buffers": [2],
        "runs": 2,
        "warmup": 1,
        "directory": str(made),
        "write_directory": str(made),
        "backend": "nccl",
        "stall_timeout_s": 60,
    } | changes
    options = ["--standalone", "--nproc-per-node", str(gpus.num_ranks)]
    ended = gpus.torchrun(options, "tests.bench.entry", json.dumps(settings), found).wait(500)
    assert (ended.returncode == 0) == (code == 0), ended.stderr
    result: dict[str, Any] = json.loads(found.read_text())
    return result


@pytest.mark.parametrize("shape", ["dense", "moe", "tiny"])
def test_every_way_is_right_over_nccl(
    gpus: Gpus, made: Path, tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench_on(gpus, made, tmp_path / "found.json", shapes=[shape])
    assert {label(row) for row in rows_of(found)} == EVERY_WAY
    for row in found["rows"]:
        assert row["failure"] is None
        assert [part["wrong"] for part in rank_runs(row)] == [0] * (3 * gpus.num_ranks)
        if label(row)[0] in ("packcast", "compat") and label(row)[1] == "resident":
            assert all(max(part["waiting"].values(), default=0) > 0 for part in rank_runs(row)), row
    stages = {limit["stage"] for limit in found["limits"]}
    assert stages == {"read", "h2d", "broadcast", "d2h", "write", "together"}
    together = [limit for limit in found["limits"] if limit["stage"] == "together"]
    asked = {(limit["sink"], limit["readers"]) for limit in together}
    sinks = ("discard", "land", "write", "verify")
    assert asked == {(sink, readers) for sink in sinks for readers in (1, gpus.num_ranks)}
    with capsys.disabled():
        print("\n" + "\n".join(table(found)))


def test_damage_is_reported_as_wrong_on_the_device_too(
    gpus: Gpus, made: Path, tmp_path: Path
) -> None:
    damage = {"kind": "damage", "with": {"rank": 1}}
    found = bench_on(gpus, made, tmp_path / "found.json", code=6, fault=damage, limits=False)
    for row in rows_of(found):
        if row["method"] == "load_file":
            continue
        assert row["failure"] is None
        wrong = {part["rank"]: part["wrong"] for part in rank_runs(row)}
        assert wrong[0] == 0
        assert wrong[1] > 0, label(row)


def test_a_ring_larger_than_the_gpu_is_a_marked_row(gpus: Gpus, made: Path, tmp_path: Path) -> None:
    found = bench_on(
        gpus,
        made,
        tmp_path / "found.json",
        sources=["file"],
        sinks=["discard"],
        buffer_sizes=[16 * GIB, 16 * MIB],
        num_buffers=[64],
        limits=False,
        baselines=False,
    )
    failures = [row["failure"] for row in found["rows"]]
    assert sum(failure is None for failure in failures) == 3  # one is without options
    assert sum("no memory for 64 buffers of 16GiB" in (failure or "") for failure in failures) == 2


def table(found: dict[str, Any]) -> Iterator[str]:
    """For whoever runs this: GB/s of the last runs, and the limits."""
    for limit in found["limits"]:
        rate = limit["bytes_per_second"] / 1e9
        yield f"limit {limit['stage']:10s} {rate:8.1f} GB/s  {limit['detail']}"
    for row in rows_of(found):
        rate = (row["bytes_per_second"] or 0.0) / 1e9
        yield (
            f"{row['method']:16s} {row['source']:9s} {row['sink']:8s} {row['readers']} reader"
            f" {row['buffer_size'] >> 20:5d} MiB x {row['num_buffers']}"
            f" {rate:8.2f} GB/s  {row['failure'] or row['waiting_on']}"
        )
