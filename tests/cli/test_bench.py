"""Claims about `packcast bench`: what the ranks are asked, what a person sees, how it ends."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import packcast.bench
from packcast.bench.model import BenchSettings, BenchView, Results
from packcast.cli import benchsettings, start
from packcast.cli.app import run
from packcast.cli.bench import verdict
from packcast.cli.benchview import BenchDisplay
from packcast.errors import TransferError, UsageError
from packcast.settings import Settings
from packcast.units import GIB, MIB, format_exact_size
from tests.bench.samples import a_bench, case, row
from tests.helpers.handovers import hand_over

from .conftest import FakeLeaver

Capture = pytest.CaptureFixture[str]
GOOD = a_bench()


def show(view: BenchView, results: Results) -> None:
    """Tell a view all of it, row by row, as a bench would."""
    view.found(replace(results, rows=()))
    for done in range(len(results.rows)):
        one = results.rows[done]
        view.doing(str(one.case), done / len(results.rows))
        view.found(replace(results, rows=results.rows[: done + 1]), one)


class FakeBench:
    """Stands in for the ranks' side: on rank 0 it shows `GOOD`, or does what it is told."""

    def __init__(self) -> None:
        self.settings: list[BenchSettings] = []
        self.does: Callable[[BenchView], int] | None = None

    def run(self, settings: BenchSettings, view: BenchView, exit_handler: object) -> int:
        self.settings.append(settings)
        if self.does:
            return self.does(view)
        if os.environ["RANK"] == "0":
            show(view, GOOD)
        return 0


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, torchrun: Callable[[int], None]) -> FakeBench:
    """This process as rank 0 of four."""
    fake = FakeBench()
    monkeypatch.setattr(packcast.bench, "run", fake.run, raising=False)
    monkeypatch.setattr(start, "ProcessExit", FakeLeaver)
    monkeypatch.setattr(start, "watch_signals", lambda exit_handler, **_: None)
    monkeypatch.setattr(start, "die_with_parent", lambda pid: None)
    torchrun(0)
    return fake


def test_options_reach_the_ranks(ranks: FakeBench, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    words = "--shape dense,tiny --size 1GiB --source file,resident --sink land,write --cold "
    words += "--buffer-size 1MiB..4MiB:x2 --num-buffers 1..4:x2 --readers 1,all --runs 5 "
    words += "--warmup 2 --no-check --no-baselines --no-limits --staging 64MiB --backend gloo "
    words += "--device cpu --join-timeout 1min --heartbeat-timeout 5s --stall-timeout 7s -q"
    argv = ["bench", *words.split(), "--dir", str(tmp_path), "--write-dir", str(tmp_path / "w")]
    assert run(argv) == 0
    assert ranks.settings == [
        BenchSettings(
            transfer=Settings(
                command="send",
                buffer_size=4 * MIB,
                staging=64 * MIB,
                backend="gloo",
                device="cpu",
                join_timeout_s=60.0,
                heartbeat_timeout_s=5.0,
                stall_timeout_s=7.0,
            ),
            shapes=("dense", "tiny"),
            size=GIB,
            sources=("file", "resident"),
            sinks=("land", "write"),
            readers=(1, None),
            buffer_sizes=(MIB, 2 * MIB, 4 * MIB),
            num_buffers=(1, 2, 4),
            runs=5,
            warmup=2,
            directory=tmp_path,
            write_directory=tmp_path / "w",
            cold=True,
            check=False,
            baselines=False,
            limits=False,
        )
    ]


def test_options_are_read_from_the_environment_too(
    ranks: FakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SHAPE": "moe", "BUFFER_SIZE": "8MiB", "NO_LIMITS": "1"}.items():
        monkeypatch.setenv(f"PACKCAST_{name}", value)
    assert run(["bench", "-q"]) == 0
    (settings,) = ranks.settings
    assert (settings.shapes, settings.buffer_sizes, settings.limits) == (
        ("moe",),
        (8 * MIB,),
        False,
    )


def test_the_defaults_are_a_small_sweep_of_dense_weights(
    ranks: FakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packcast.cli.benchsettings.has_gpu_driver", lambda: False)
    assert run(["bench", "-q"]) == 0
    (settings,) = ranks.settings
    assert (settings.shapes, settings.size) == (("dense",), 256 * MIB)
    assert (settings.sources, settings.sinks) == (("file",), ("discard", "write"))
    assert (settings.runs, settings.warmup, settings.readers) == (3, 1, (1,))
    monkeypatch.setattr("packcast.cli.benchsettings.has_gpu_driver", lambda: True)
    run(["bench", "-q"])
    run(["bench", "-q", "--device", "cpu"])
    run(["bench", "-q", "--source", "resident"])
    assert [one.size for one in ranks.settings[1:3]] == [8 * GIB, 256 * MIB]
    assert ranks.settings[3].sinks == ("discard", "land")


def test_a_checkpoint_takes_the_place_of_shapes(ranks: FakeBench) -> None:
    assert run(["bench", "ckpt", "-q"]) == 0
    (settings,) = ranks.settings
    assert (settings.checkpoint, settings.shapes) == (Path("ckpt"), ())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--buffer-size 16MiB..1GiB", "--buffer-size: '16MiB..1GiB' is not a range"),
        ("--num-buffers 0", "--num-buffers: 0 buffers"),
        ("--readers some", "--readers: must be a whole number"),
        ("--shape sparse", "--shape: 'sparse' is not one of dense, moe, tiny"),
        ("--source file,tape", "--source: 'tape'"),
        ("--sink null", "--sink: 'null'"),
        ("--source resident --sink write", "--sink write does not go with --source resident"),
        ("ckpt --shape dense", "--shape is for generated weights"),
        ("ckpt --size 1GiB", "--size is for generated weights"),
        ("--size lots", "--size: 'lots'"),
        ("--size 100000GiB", "--size: 100000GiB is more than 4096GiB"),
        ("--runs 0", "--runs"),
        ("--nproc 3", "--nproc is for use without a launcher"),
        ("--port 5", "--port is only for Slurm"),
        ("--dir /nowhere", "--dir: /nowhere is not a directory"),
        ("--min-bandwidth fast", "--min-bandwidth: 'fast' is not a rate"),
        ("--staging 1MiB", "staging of 1MiB is less than"),
        ("--export-json /nowhere/r.json", "--export-json: the directory /nowhere does not exist"),
        ("--export-json - --export-csv -", "--export-json and --export-csv would both write"),
        ("--export-csv /tmp", "--export-csv: /tmp is a directory"),
        ("--export-markdown=", "--export-markdown: the path is empty"),
        ("--plot p.jpg", "--plot: p.jpg must end in .png or .svg"),
    ],
)
def test_a_wrong_command_line_is_exit_2_before_anything_runs(
    words: str, said: str, ranks: FakeBench, capsys: Capture
) -> None:
    assert run(["bench", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("packcast: error: ")
    assert said in captured.err
    assert len(captured.err.splitlines()) <= 2
    assert captured.out == ""
    assert ranks.settings == []


def test_a_plot_without_matplotlib_is_exit_2_before_anything_runs(
    ranks: FakeBench, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert run(["bench", "--plot", str(tmp_path / "p.png")]) == 2
    assert "pip install 'packcast[plot]'" in capsys.readouterr().err
    assert ranks.settings == []


def test_the_table_is_standard_output_and_what_happens_meanwhile_is_not(
    ranks: FakeBench, capsys: Capture
) -> None:
    assert run(["bench"]) == 0
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert any(
        line.startswith("[4/14] packcast dense file->discard 16MiB x 4: 43.6") for line in said
    )
    assert any("limit of read" in line and "44.0 GB/s at best" in line for line in said)
    out = captured.out.splitlines()
    assert out[0] == "packcast bench"
    (best,) = [line for line in out if line.startswith("*   packcast") and "discard" in line]
    assert best.split()[4:9] == ["discard", "16MiB", "x", "4", "43.6"]
    assert best.rstrip().endswith("260 MiB   512 MiB")
    assert "without options dense, file to discard" in captured.out
    assert "times as fast as `original`" in captured.out
    assert "\x1b" not in captured.out + captured.err


def test_a_terminal_is_told_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    display = BenchDisplay("rich", "packcast bench", {})
    monkeypatch.setattr(display, "_began", time.monotonic() - 30)
    display.results = GOOD
    display.doing("a case", 0.5)
    console = Console(file=io.StringIO(), width=200)
    console.print(display.frame())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a case (50% of the runs, 30.0 s, about 30.0 s left)" in text
    assert "43.6" in text


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (30, "waiting on, from, to, wrong, method, of limit:"),
        (80, "no room for pinned, device, cv, x, waiting on:"),
        (120, "no room for pinned:"),
        (240, None),
    ],
)
def test_a_narrow_terminal_has_fewer_columns_and_is_told_which(
    width: int, left_out: str | None
) -> None:
    display = BenchDisplay("rich", "packcast bench", {})
    display.results = GOOD
    console = Console(file=io.StringIO(), width=width)
    console.print(display.frame())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert {"buffers", "GB/s"} <= set(text.splitlines()[0].split())
    assert any({"*", "16MiB", "43.6"} <= set(line.split()) for line in text.splitlines())
    assert "…" not in text.rpartition("\n\n")[0]  # the status line may be cut off
    if left_out is None:
        assert "no room" not in text.replace("no room for 4 buffers", "")
    else:
        assert left_out in " ".join(text.split())


def test_quiet_leaves_only_the_table(ranks: FakeBench, capsys: Capture) -> None:
    assert run(["bench", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "*   packcast" in captured.out


def test_an_export_to_standard_output_is_all_that_is_there(
    ranks: FakeBench, capsys: Capture
) -> None:
    assert run(["bench", "--export-json", "-"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["command_line"], found["exit_code"]) == ("packcast bench --export-json -", 0)
    assert len(found["rows"]) == len(GOOD.rows)
    assert "*   packcast" in captured.err


def test_exports_are_rewritten_after_every_case(ranks: FakeBench, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    counts: list[int] = []

    def step_by_step(view: BenchView) -> int:
        for done, one in enumerate(GOOD.rows):
            view.found(replace(GOOD, rows=GOOD.rows[: done + 1]), one)
            counts.append(len(json.loads(path.read_text())["rows"]))
        return 0

    ranks.does = step_by_step
    assert run(["bench", "-q", "--export-json", str(path)]) == 0
    assert counts == list(range(1, len(GOOD.rows) + 1))


def test_ctrl_c_leaves_the_rows_so_far(ranks: FakeBench, capsys: Capture, tmp_path: Path) -> None:
    def interrupted(view: BenchView) -> int:
        show(view, replace(GOOD, rows=GOOD.rows[:2]))
        raise KeyboardInterrupt

    ranks.does = interrupted
    path = tmp_path / "r.json"
    with pytest.raises(SystemExit) as left:
        run(["bench", "--export-json", str(path)])
    assert left.value.code == 130
    captured = capsys.readouterr()
    assert "4MiB x 4   24.5" in captured.out
    assert captured.err.splitlines()[-1] == "packcast: error: interrupted"
    found = json.loads(path.read_text())
    assert (len(found["rows"]), found["exit_code"], found["error"]) == (2, 130, "interrupted")


def test_a_rank_that_is_not_the_sender_says_nothing(
    ranks: FakeBench, torchrun: Callable[[int], None], capsys: Capture
) -> None:
    torchrun(1)
    # Its host need not have the directories of the sender's exports.
    argv = ["bench", "--export-json", "/nowhere/r.json", "--plot", "p.jpg", "--min-bandwidth"]
    assert run([*argv, "99GB/s"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(("least", "code"), [("4.4GB/s", 0), ("4400MB/s", 0), ("10 GB/s", 5)])
def test_the_gate_is_for_each_tables_best_row(
    least: str, code: int, ranks: FakeBench, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    assert run(["bench", "-q", "--min-bandwidth", least, "--export-json", str(path)]) == code
    assert json.loads(path.read_text())["exit_code"] == code
    said = capsys.readouterr().err
    missed = "dense, file to write reached 4.60 GB/s, less than --min-bandwidth 10.0 GB/s"
    assert said == (f"packcast: error: {missed}\n" if code else "")


def test_wrong_bytes_are_exit_6(ranks: FakeBench, capsys: Capture) -> None:
    def wrong(view: BenchView) -> int:
        show(view, a_bench(wrong=3))
        return 0

    ranks.does = wrong
    assert run(["bench", "-q"]) == 6
    captured = capsys.readouterr()
    assert "3 blocks or tensors in packcast dense file->write 64MiB x 4" in captured.err
    assert "3 blocks or tensors differ from the sender's" in captured.out


def test_a_fault_that_only_the_ranks_know_of_is_not_silent(
    ranks: FakeBench, capsys: Capture
) -> None:
    def wrong(view: BenchView) -> int:
        show(view, GOOD)
        return 6

    ranks.does = wrong
    assert run(["bench", "-q"]) == 6
    assert "a baseline failed its check" in capsys.readouterr().err


def test_a_baselines_faults_are_its_own() -> None:
    rows = [row(case(), [9.0]), row(case("original"), [4.0], wrong=7)]
    assert verdict(rows, None) is None
    rows = [row(case(), [9.0]), row(case("load_file"), [], failure="no")]
    assert verdict(rows, 9e9) is None


def test_a_combination_of_which_nothing_could_be_measured_is_a_failure() -> None:
    rows = [row(case(), [], failure="no room"), row(case("original"), [4.0])]
    error = verdict(rows, None)
    assert isinstance(error, TransferError)
    assert "no room" in error.message


def test_without_a_launcher_ranks_are_started_that_agree_on_what_was_not_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[list[str], int]] = []

    def run_nproc(argv: list[str], nproc: int, **more: object) -> int:
        pinned.append((os.environ["PACKCAST_DIR"], os.environ["PACKCAST_SIZE"]))
        calls.append((argv, nproc))
        return 5

    pinned: list[tuple[str, str]] = []
    # As monkeypatch knows of them, what the command sets goes away again.
    for name in ("PACKCAST_DIR", "PACKCAST_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(start, "run_nproc", run_nproc)
    monkeypatch.setattr(benchsettings, "default_directory", lambda *a, **k: Path("/somewhere"))
    assert run(["bench", "--backend", "gloo"]) == 5
    assert run(["bench", "--nproc", "3", "--size", "64MiB", "-q", "--dir", "/tmp"]) == 5
    assert calls == [
        (["bench", "--backend", "gloo"], 2),
        (["bench", "--size", "64MiB", "-q", "--dir", "/tmp"], 3),
    ]
    assert pinned == [("/somewhere", "256MiB"), ("/tmp", "64MiB")]


def test_the_command_is_told_as_it_was_typed(
    ranks: FakeBench, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    hand_over(monkeypatch)
    assert run(["bench", "a b", "-q"]) == 0
    assert capsys.readouterr().out.startswith("packcast bench 'a b' -q --nproc 4\n")


def test_memory_is_the_place_where_it_has_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchsettings.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(benchsettings, "_MEMORY", tmp_path / "memory")
    (tmp_path / "memory").mkdir()

    def place(nbytes: int, *, write_too: bool = False, cold: bool = False) -> str:
        found = benchsettings.default_directory(nbytes, write_too=write_too, num_ranks=4, cold=cold)
        return found.name

    monkeypatch.setattr(benchsettings, "_free_memory_for_files", lambda: 10 * GIB)
    assert place(4 * GIB) == "memory"
    assert place(9 * GIB) == tmp_path.name
    assert place(4 * GIB, write_too=True) == tmp_path.name
    assert place(GIB, write_too=True) == "memory"
    assert place(GIB, cold=True) == tmp_path.name


def test_an_export_that_fails_on_the_way_stops_no_run_but_is_the_end(
    ranks: FakeBench, capsys: Capture, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def remove(view: BenchView) -> int:
        folder.rmdir()
        show(view, GOOD)
        return 0

    ranks.does = remove
    other = tmp_path / "r.md"
    exports = ("--export-json", str(folder / "r.json"), "--export-markdown", str(other))
    assert run(["bench", *exports]) == 7
    assert other.exists()
    captured = capsys.readouterr()
    assert captured.err.count("packcast: warning: --export-json") == 1
    assert "*   packcast" in captured.out


def test_a_failed_export_does_not_hide_why_the_bench_ended(
    ranks: FakeBench, capsys: Capture, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def lose(view: BenchView) -> int:
        folder.rmdir()
        show(view, replace(GOOD, rows=GOOD.rows[:1]))
        raise TransferError("lost rank 3")

    ranks.does = lose
    with pytest.raises(SystemExit) as left:
        run(["bench", "-q", "--export-json", str(folder / "r.json")])
    assert left.value.code == 5
    assert [line.split(":")[2] for line in capsys.readouterr().err.splitlines()] == [
        " lost rank 3",
        " --export-json",
    ]


def test_a_late_row_changes_nothing_once_the_end_was_told(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "r.json"
    display = BenchDisplay(
        "plain", "packcast bench", benchsettings.exports({"--export-json": str(path)})
    )
    show(display, replace(GOOD, rows=GOOD.rows[:1]))
    display.end(TransferError("lost rank 3"))
    capsys.readouterr()
    display.found(GOOD, GOOD.rows[1])
    display.end(None)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert json.loads(path.read_text())["error"] == "lost rank 3"


def mib(*sizes: int) -> tuple[int, ...]:
    return tuple(size * MIB for size in sizes)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("16MiB", mib(16)),
        (" 16 MiB , 4MiB,16MiB ", mib(16, 4)),
        ("16MiB..1GiB:x4", mib(16, 64, 256, 1024)),
        ("16MiB..1000MiB:x4", mib(16, 64, 256)),
        ("64MiB,16MiB..64MiB:x2,1MiB", mib(64, 16, 32, 1)),
        ("16MiB..64MiB:+16MiB", mib(16, 32, 48, 64)),
        ("1MiB..8MiB:+3MiB", mib(1, 4, 7)),
    ],
)
def test_sizes_are_lists_ranges_and_mixes_without_doubles(
    text: str, sizes: tuple[int, ...]
) -> None:
    assert benchsettings.buffer_sizes("--buffer-size", text) == sizes
    assert benchsettings.buffer_counts("--num-buffers", "4,2..8:x2") == (4, 2, 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has an empty part"),
        ("16MiB,,64MiB", "has an empty part"),
        ("lots", "'lots' is not a size"),
        ("16MiB..64MiB", "is not a range"),
        ("16MiB..64MiB:+", "is not a range"),
        ("16MiB..64MiB:+lots", "'lots' is not a size"),
        ("16MiB..64MiB:+0", "must go from a smaller to a larger"),
        ("16MiB..64MiB:+100", "is not a multiple of 1MiB"),
        ("1MiB..16GiB:+1MiB", "makes too many values"),
        ("16MiB..64MiB:x1.5", "is not a range"),
        ("..16MiB:x2", "is not a range"),
        ("16MiB..64MiB:x1", "must go from a smaller to a larger"),
        ("64MiB..16MiB:x2", "must go from a smaller to a larger"),
        ("0..16MiB:x2", "buffer size 0 is not a multiple of 1MiB"),
        ("1.5MiB", "buffer size 1536KiB is not a multiple of 1MiB"),
        ("32GiB", "is not a multiple of 1MiB up to 16GiB"),
    ],
)
def test_an_invalid_sweep_of_sizes_is_reported_with_the_option(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        benchsettings.buffer_sizes("--buffer-size", text)
    assert caught.value.message.startswith("--buffer-size: ")
    assert said in caught.value.message


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(0, 4096), st.integers(2, 9))
def test_a_range_begins_with_its_first_value_and_never_passes_its_last(
    first: int, more: int, factor: int
) -> None:
    last = first + more
    found = benchsettings.buffer_sizes("--buffer-size", f"{first}MiB..{last}MiB:x{factor}")
    assert found[0] == first * MIB
    assert list(found[1:]) == [size * factor for size in found][:-1]
    assert found[-1] <= last * MIB < found[-1] * factor


@given(st.lists(st.integers(1, 16384), min_size=1, max_size=20))
def test_a_list_of_sizes_is_parsed_as_it_is_formatted(sizes: list[int]) -> None:
    text = ",".join(format_exact_size(size * MIB) for size in sizes)
    assert benchsettings.buffer_sizes("--buffer-size", text) == mib(*dict.fromkeys(sizes))


def test_ranges_go_by_factors_or_steps() -> None:
    assert benchsettings.buffer_counts("--num-buffers", "4,2..8:x2") == (4, 2, 8)
    assert benchsettings.buffer_counts("--num-buffers", "2..8:+2") == (2, 4, 6, 8)
