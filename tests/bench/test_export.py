"""Claims about exported results: what they hold, and that they stay as they are."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from packcast.bench.export import to_csv, to_json, to_markdown
from packcast.bench.results import Results
from packcast.bench.rows import make_rows
from packcast.units import GIB, MIB

from .samples import ENVIRONMENT, LIMITS, a_bench, case, measured

GOLDEN = Path(__file__).parent / "golden"
RESULTS = Results(
    command_line="packcast bench --sink discard,write",
    environment=ENVIRONMENT,
    num_cases=11,
    limits=LIMITS,
    rows=make_rows(a_bench()),
    warnings=("the GPUs are shared",),
    exit_code=0,
)
FEW = replace(RESULTS, rows=(RESULTS.rows[3], RESULTS.rows[6], RESULTS.rows[7]))
EXPORTED = {
    "bench.json": to_json(FEW),
    "bench.csv": to_csv(RESULTS),
    "bench.md": to_markdown(RESULTS),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_as_it_was(name: str) -> None:
    """What others have written programs for. A change here is one of the schema: look twice."""
    assert EXPORTED[name] == (GOLDEN / name).read_text()


def test_json_has_every_field_that_the_schema_promises() -> None:
    document = json.loads(to_json(RESULTS))
    assert (document["schema"], document["command"], document["ok"]) == (1, "bench", True)
    assert document["environment"]["ranks"][1]["device"] == "cuda:1"
    assert [limit["stage"] for limit in document["limits"]].count("broadcast") == 2
    row = document["rows"][3]
    promised = """method shape source sink readers buffer_size num_buffers nbytes seconds
        bytes_per_second limit ratio_to_original wrong waiting_on peak_device_bytes
        peak_pinned_bytes runs"""
    assert set(promised.split()) <= set(row)
    assert set(row["seconds"]) == {"median", "min", "max", "p95", "cv"}
    assert set(row["limit"]) == {"stage", "bytes_per_second", "fraction"}
    assert row["buffer_size"] == 16 * MIB
    assert row["seconds"]["median"] == pytest.approx(8 * GIB / 43.6e9)
    assert row["waiting_on"] == "read, rank 1"
    assert [run["is_warmup"] for run in row["runs"]] == [True, False, False, False]
    assert [part["rank"] for part in row["runs"][0]["ranks"]] == [0, 1]
    failed = document["rows"][6]
    assert (failed["seconds"], failed["limit"], failed["runs"]) == (None, None, [])
    assert "no room" in failed["failure"]


def test_json_says_whether_the_bench_is_over_and_how_it_ended() -> None:
    running = json.loads(to_json(replace(RESULTS, exit_code=None)))
    assert (running["ok"], running["exit_code"]) == (None, None)
    ended = json.loads(to_json(replace(RESULTS, exit_code=130, error="interrupted")))
    assert (ended["ok"], ended["exit_code"], ended["error"]) == (False, 130, "interrupted")


def test_csv_is_a_line_per_row_with_the_same_names_and_numbers() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(RESULTS))))
    assert len(lines) == len(RESULTS.rows)
    best = [line for line in lines if line["best"] == "1"]
    assert [line["buffer_size"] for line in best] == [str(16 * MIB)] * 2
    assert float(best[0]["bytes_per_second"]) == pytest.approx(43.6e9)
    assert lines[6]["seconds_median"] == ""
    assert lines[6]["wrong"] == ""


def test_csv_without_rows_still_names_its_columns() -> None:
    assert to_csv(replace(RESULTS, rows=())).startswith("method,shape,source,sink,readers,")


def test_every_line_of_a_markdown_table_has_as_many_cells() -> None:
    nasty = case(shape="a|b\nc\x1b[31m")
    rows = make_rows([measured(nasty, [1.0]), measured(nasty, [], failure="x|y\nz")])
    text = to_markdown(replace(RESULTS, rows=rows))
    assert "\x1b" not in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "GB/s | min" not in line}
    assert cells == {4, 14}


def test_no_buffers_are_dashes_for_people_and_zeros_for_programs() -> None:
    without = case("per-tensor", source="resident", sink="land", buffer_size=0, num_buffers=0)
    results = replace(RESULTS, rows=make_rows([measured(without, [4.0])]))
    assert "| per-tensor | 1 | - | - | 4.00 |" in to_markdown(results)
    assert json.loads(to_json(results))["rows"][0]["num_buffers"] == 0
    (line,) = csv.DictReader(io.StringIO(to_csv(results)))
    assert (line["buffer_size"], line["num_buffers"]) == ("0", "0")


def test_markdown_says_where_it_is_not_complete() -> None:
    text = to_markdown(replace(RESULTS, exit_code=130, error="interrupted", num_cases=20))
    assert text.endswith("11 of 20 rows were measured.\n\nIt failed: interrupted\n")
    assert "rows were measured" not in to_markdown(RESULTS)
