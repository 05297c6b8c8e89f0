"""Claims about the picture. What needs matplotlib is skipped where it is not installed."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from packcast.bench import plot
from packcast.bench.results import Results
from packcast.bench.rows import make_rows
from packcast.errors import DestinationError, UsageError

from .samples import ENVIRONMENT, a_bench, case, measured

RESULTS = Results(command_line="", environment=ENVIRONMENT, rows=make_rows(a_bench()))


def test_a_picture_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--plot: .*p\.jpg must end in \.png or \.svg"):
        plot.check_plot("--plot", str(tmp_path / "p.jpg"))


def test_without_matplotlib_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(UsageError, match="--plot needs matplotlib, which is not") as caught:
        plot.check_plot("--plot", str(tmp_path / "p.png"))
    assert caught.value.hint == "pip install 'packcast[plot]'"


def test_names_at_the_edge_never_touch_and_keep_their_order() -> None:
    placed = plot.spread_apart([0.5, 0.1, 0.11, 0.99, 1.0, 0.5], 0.05)
    order = sorted(placed)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(order))
    assert max(placed) <= 1.0
    assert placed[1] < placed[2] < placed[0] < placed[5] < placed[3] < placed[4]
    assert plot.spread_apart([0.2, 0.8], 0.05) == [0.2, 0.8]


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_a_picture_is_drawn(name: str, magic: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot.check_plot("--plot", str(tmp_path / name))
    plot.write_plot(path, RESULTS)
    assert path.read_bytes().startswith(magic)


def test_the_picture_names_its_lines_its_limit_and_its_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")  # text as text
    path = tmp_path / "p.svg"
    plot.write_plot(path, RESULTS)
    text = path.read_text()
    for words in (
        "dense (8.0 GiB), file to discard",
        "dense (8.0 GiB), file to write",
        "2 ranks on NVIDIA H100, nccl",
        "buffer size, MiB",
        "2 buffers",
        "4 buffers",
        "best: 43.6 GB/s",
        "limit: read 44.0",
        "limit: together 4.60",
        "original 4.20",
    ):
        assert words in text, words


def test_a_bench_in_which_nothing_ran_draws_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = make_rows([measured(case(), [], failure="no room")])
    plot.write_plot(tmp_path / "p.png", Results(command_line="", rows=rows))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_exit_7(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DestinationError, match="--plot"):
        plot.write_plot(tmp_path / "gone" / "p.png", RESULTS)
