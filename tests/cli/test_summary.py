"""Claims about the summary: what went, how fast, by whom, and where it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packcast.cli.summary import end_lines, outcome_of
from packcast.report import RankReport, Report, StageReport, ranks_text


def facts(seconds: float, **more: object) -> dict[str, object]:
    stages = {
        "write": {"nbytes": 2_000_000_000, "seconds": seconds, "waiting_seconds": seconds / 2},
        "broadcast": {"nbytes": 2_000_000_000, "seconds": 1.0, "waiting_seconds": 0.1},
    }
    return {"seconds": seconds, "stages": stages, **more}


FULL = Report(
    command="send",
    rank=0,
    is_sender=True,
    num_files=2,
    num_tensors=7,
    nbytes=2_000_000_000,
    world_size=3,
    ranks=(
        RankReport(rank=0, role="sender", host="a", device="cpu", ok=True),
        RankReport(rank=1, role="worker", host="b", device="cpu", ok=True),
        RankReport(rank=2, role="worker", host="c", device="cpu", ok=True),
    ),
    seconds=4.0,
    total_seconds=9.5,
    stages={"read": StageReport(2_000_000_000, 2.0, 0.5), "h2d": StageReport(0, 0.0, 0.0)},
    digests={"m.safetensors": "ab"},
    workers={
        1: facts(2.0, sink="write", target="/d/1", wrote=True),
        2: facts(4.0, sink="write", target="/d/2", wrote=True),
    },
)


def test_the_summary_says_what_went_where_how_fast_and_who_was_slowest() -> None:
    assert end_lines(FULL) == [
        "sent 2 files, 1.9 GiB to 2 workers in 4.00 s at 0.50 GB/s",
        "  rank 1 (b): written to /d/1",
        "  rank 2 (c): written to /d/2",
        "  9.50 s with start-up and end",
        "  read 1.00 GB/s, broadcast 2.00 GB/s, write 0.50 GB/s",
        "  slowest rank 2 (c): 4.00 s, of which 2.00 s waiting on write",
        f"  digest of all files {FULL.digest[:16]}",  # type: ignore[index]
    ]


def test_a_worker_says_what_it_did_itself() -> None:
    mine = Report(
        command="recv",
        num_files=1,
        nbytes=1 << 20,
        seconds=1.0,
        workers={3: {"sink": "verify", "checkpoint": "/copy", "equal": True}},
    )
    assert end_lines(mine) == [
        "received 1 file, 1.0 MiB in 1.00 s at 1.0 MB/s",
        "  identical to /copy",
    ]


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        ({"sink": "discard"}, "checked and dropped; nothing written"),
        ({"sink": "verify", "checkpoint": "/c", "equal": True}, "identical to /c"),
        ({"sink": "verify", "checkpoint": "/c", "equal": False}, "differs from /c"),
        ({"sink": "write", "target": "/t", "wrote": True}, "written to /t"),
        ({"sink": "write", "target": "/t", "wrote": False}, "checked; another rank has written /t"),
        ({"sink": "tensors"}, "received as tensors"),
    ],
)
def test_every_sink_says_what_became_of_the_bytes(result: dict[str, object], outcome: str) -> None:
    assert outcome_of(result) == outcome


def test_workers_that_did_the_same_share_a_line() -> None:
    dropped: dict[int, dict[str, object]] = {rank: {"sink": "discard"} for rank in range(1, 600)}
    report = replace(FULL, workers=dropped, stages={})
    assert end_lines(report)[1] == "  ranks 1-599: checked and dropped; nothing written"


def test_of_many_workers_not_every_one_has_a_line() -> None:
    workers = {rank: {"sink": "write", "target": f"/d/{rank}"} for rank in range(1, 600)}
    lines = end_lines(replace(FULL, workers=workers))
    assert len(lines) <= 12
    assert "  and 592 more; --json has all" in lines


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([1, 2, 3], "ranks 1-3"),
        ([5, 1, 2], "ranks 1-2, 5"),
        ([1, 3], "ranks 1, 3"),
    ],
)
def test_ranks_are_written_as_runs(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text
