"""Claims about what a person reads of a bench."""

from __future__ import annotations

import io
import re
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from packcast.bench.results import Results, case_label
from packcast.bench.rows import make_rows
from packcast.cli import benchview
from packcast.cli.benchtable import all_lines, heat_map, row_lines
from packcast.cli.benchview import RichBenchDisplay, styled
from packcast.units import MIB
from tests.bench.samples import ENVIRONMENT, LIMITS, a_bench, case, measured

RESULTS = Results(
    command_line="packcast bench",
    environment=ENVIRONMENT,
    num_cases=11,
    limits=LIMITS,
    rows=make_rows(a_bench()),
    exit_code=0,
)


def texts(width: int | None, results: Results = RESULTS) -> list[str]:
    return [line.text for line in all_lines(results, width)]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_line_of_the_tables_is_wider_than_the_terminal(width: int) -> None:
    for line in [*row_lines(RESULTS, width), *all_lines(RESULTS, width)[-6:]]:
        assert len(line.text) <= width, line.text


def test_a_narrow_terminal_has_fewer_columns_and_is_told_which() -> None:
    narrow, wide = "\n".join(texts(80)), "\n".join(texts(None))
    assert re.search(r"no room for pinned, device.*min - max", " ".join(narrow.split()))
    assert "pinned" in wide
    assert "no room for pinned" not in wide
    for title in ("method", "buffer", "count", "GB/s", "of limit", "wrong", "waiting on"):
        assert title in narrow


def test_even_a_tiny_terminal_keeps_what_was_asked_for() -> None:
    lines = [line.text for line in row_lines(RESULTS, 10)]
    assert any("16MiB" in line for line in lines)


def test_readers_are_a_column_only_where_they_differ_from_one() -> None:
    assert "readers" not in "\n".join(texts(None))
    rows = make_rows([measured(case(readers=4), [50.0])])
    assert "readers" in "\n".join(texts(None, replace(RESULTS, rows=rows)))


def test_what_has_no_buffers_has_dashes_for_them() -> None:
    without = case("load_file", sink="land", buffer_size=0, num_buffers=0)
    rows = make_rows([measured(case(sink="land"), [9.0]), measured(without, [4.0])])
    lines = [line.text.split() for line in row_lines(replace(RESULTS, rows=rows), None)]
    assert [cells[:4] for cells in lines[2:]] == [
        ["*", "packcast", "64MiB", "4"],
        ["load_file", "-", "-", "4.00"],
    ]
    assert case_label(without) == "load_file dense file->land"


def test_a_case_that_could_not_run_says_why_in_its_row() -> None:
    (line,) = [line for line in texts(None) if "16GiB" in line and line.startswith("  packcast")]
    assert line.endswith("- no room for 4 buffers of 16 GiB on rank 1")


def test_a_heat_map_is_readable_without_colour() -> None:
    rows = [row for row in RESULTS.rows if row.case.sink == "discard" and row.is_ours]
    lines = [line.text.split() for line in heat_map(rows)]
    assert lines[1] == ["buffer", "x", "2", "x", "4"]
    assert lines[2:] == [
        ["4MiB", "21.0", "24.5"],
        ["16MiB", "33.0", "43.6*"],
        ["64MiB", "35.5", "37.0"],
        ["16GiB", "-", "-"],
    ]


def test_the_brightest_block_is_the_fastest() -> None:
    rows = [row for row in RESULTS.rows if row.case.sink == "discard" and row.is_ours]
    styles = [style for line in heat_map(rows) for text, style in line.spans if "." in text]
    lightness = [sum(map(int, re.findall(r"\d+", style))) for style in styles]
    assert lightness.index(max(lightness)) == 3
    assert lightness.index(min(lightness)) == 0
    assert styles[3].startswith("black on")
    assert styles[0].startswith("white on")


def test_a_line_or_a_column_of_points_is_no_map() -> None:
    column = [measured(case(buffer_size=size * MIB), [9.0]) for size in (4, 16, 64)]
    results = replace(RESULTS, rows=make_rows(column))
    assert "GB/s of packcast" not in "\n".join(texts(None, results))
    assert "GB/s of packcast" in "\n".join(texts(None))


def test_names_of_unknown_origin_move_no_cursor() -> None:
    rows = make_rows([measured(case(shape="a\x1b[2Jb\nc"), [9.0])])
    found = all_lines(replace(RESULTS, rows=rows), None)
    assert not any("\x1b" in line.text or "\n" in line.text for line in found)
    assert any("a\\x1b[2Jb\\nc" in str(styled(line)) for line in found)


def test_rows_that_are_missing_at_the_end_are_counted() -> None:
    assert "11 of 20 rows were measured" in texts(None, replace(RESULTS, num_cases=20))
    assert not any("rows were measured" in line for line in texts(None))


def test_the_live_table_grows_and_is_gone_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def console(*, stderr: bool) -> Console:
        return Console(file=screen, force_terminal=True, width=100, height=20, legacy_windows=False)

    monkeypatch.setattr(benchview, "_console", console)
    display = RichBenchDisplay("packcast bench")
    display.environment(ENVIRONMENT, 11)
    for one in a_bench()[:3]:
        display.begun(one.case, 3, 4)
        display.measured(one)
    display.begun(case(num_buffers=2), 1, 4)
    paper = io.StringIO()
    Console(file=paper, width=100, height=20).print(display._frame())
    drawn = paper.getvalue()
    assert "packcast dense file->discard 64MiB x 2, run 2 of 4" in drawn
    assert "13/44 runs" in drawn
    assert "24.5" in drawn
    display.close()
    display.close()
    # It wiped every line that it had drawn.
    assert screen.getvalue().endswith("\x1b[2K")


def test_a_warning_in_the_middle_of_drawing_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Display and rich have a lock each: taken in both orders they would wait for ever."""
    monkeypatch.setattr(
        benchview,
        "_console",
        lambda *, stderr: Console(file=io.StringIO(), force_terminal=True, width=80, height=20),
    )
    monkeypatch.setattr(benchview, "REFRESH_PER_SECOND", 1000)
    display = RichBenchDisplay("packcast bench")

    def talk() -> None:
        display.environment(ENVIRONMENT, 50)
        for number in range(50):
            with display._lock:
                display.warn(f"{number}")
                display.measured(measured(case(num_buffers=number + 1), [1.0]))
        display.end(None)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
