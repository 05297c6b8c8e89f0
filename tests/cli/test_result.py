"""Claims about the result, for machines and for people."""

from __future__ import annotations

import json

import packcast
from packcast.cli.result import report_document, to_json
from packcast.report import RankReport, Report, StageReport

FULL = Report(
    command="send",
    rank=0,
    is_sender=True,
    num_files=2,
    num_tensors=7,
    nbytes=2_000_000_000,
    backend="gloo",
    reason="no GPU",
    world_size=2,
    ranks=(
        RankReport(rank=0, role="sender", host="a", device="cpu", ok=True),
        RankReport(rank=1, role="worker", host="b", device="cpu", ok=False, error="gone"),
    ),
    buffer_size=1 << 20,
    num_buffers=4,
    staging=1 << 21,
    pool="native",
    seconds=4.0,
    total_seconds=6.0,
    stages={"read": StageReport(2_000_000_000, 2.0, 0.5)},
    peak_device_nbytes=5,
    peak_pinned_nbytes=6,
    digests={"m.safetensors": "ab"},
    workers={1: {"path": "/d"}},
    warnings=("w",),
)


def test_the_json_result_is_schema_one() -> None:
    assert json.loads(to_json(report_document(FULL))) == {
        "schema": 1,
        "version": packcast.__version__,
        "command": "send",
        "started": None,
        "ok": True,
        "exit_code": 0,
        "error": None,
        "hint": None,
        "rank": 0,
        "checkpoint": {"path": None, "files": 2, "tensors": 7, "bytes": 2_000_000_000},
        "group": {
            "backend": "gloo",
            "reason": "no GPU",
            "world_size": 2,
            "ranks": [
                {
                    "rank": 0,
                    "role": "sender",
                    "host": "a",
                    "device": "cpu",
                    "ok": True,
                    "error": None,
                },
                {
                    "rank": 1,
                    "role": "worker",
                    "host": "b",
                    "device": "cpu",
                    "ok": False,
                    "error": "gone",
                },
            ],
        },
        "buffers": {"size": 1 << 20, "count": 4, "staging": 1 << 21},
        "pool": "native",
        "digest": FULL.digest,
        "seconds": 4.0,
        "total_seconds": 6.0,
        "bytes_per_second": 5e8,
        "stages": {
            "read": {
                "nbytes": 2_000_000_000,
                "seconds": 2.0,
                "bytes_per_second": 1e9,
                "waiting_seconds": 0.5,
            }
        },
        "peak_device_bytes": 5,
        "peak_pinned_bytes": 6,
        "digests": {"m.safetensors": "ab"},
        "comparison": None,
        "workers": {"1": {"path": "/d"}},
        "warnings": ["w"],
    }


def test_a_result_without_time_has_no_rate() -> None:
    assert Report(command="recv", nbytes=5).bytes_per_second == 0
    assert StageReport(5, 0.0, 0.0).bytes_per_second == 0
