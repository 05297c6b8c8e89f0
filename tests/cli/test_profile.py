"""Claims about profiles: what a bench keeps, and what `send` makes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import packcast.bench
from packcast.bench.model import BenchSettings, BenchView
from packcast.bench.rows import make_rows
from packcast.cli import profile, start
from packcast.cli.app import run
from packcast.cli.profile import Profile, choose, load_profile, profile_path, save_profile
from packcast.errors import DestinationError
from packcast.units import GIB, MIB
from tests.bench.samples import case, measured, show

from .conftest import FakeLeaver, FakeTransfer

Capture = pytest.CaptureFixture[str]
SEND = ("send", "c", "--listen", "h:1", "--workers", "1", "--backend", "gloo")
(ROW,) = make_rows([measured(case(buffer_size=8 * MIB, num_buffers=3), [9.0])])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A profile for gloo in the usual place."""
    path = profile_path(None, os.environ)
    assert tmp_path in path.parents
    save_profile(path, "gloo", ROW)
    return path


def sent(transfer: FakeTransfer) -> tuple[int | None, int]:
    settings = transfer.settings[-1]
    return settings.buffer_size, settings.num_buffers


def test_the_usual_place_is_that_of_the_xdg_directories() -> None:
    assert profile_path(None, {"XDG_CONFIG_HOME": "/x"}) == Path("/x/packcast/profile.json")
    for environ in ({}, {"XDG_CONFIG_HOME": "relative"}):
        assert profile_path(None, environ) == Path.home() / ".config/packcast/profile.json"
    assert profile_path("p", {"XDG_CONFIG_HOME": "/x"}) == Path("p")


def test_an_entry_is_kept_per_backend(saved: Path) -> None:
    (other,) = make_rows([measured(case(buffer_size=64 * MIB, num_buffers=4), [40.0])])
    save_profile(saved, "nccl", other)
    assert load_profile(saved, "gloo") == Profile(8 * MIB, 3, 1)
    assert load_profile(saved, "nccl") == Profile(64 * MIB, 4, 1)
    assert load_profile(saved, "mpi") is None


def test_a_damaged_profile_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("{")
    save_profile(path, "gloo", ROW)
    assert load_profile(path, "gloo") == Profile(8 * MIB, 3, 1)


def test_a_profile_that_cannot_be_written_is_exit_7(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError, match="--save-profile"):
        save_profile(tmp_path / "file" / "p.json", "gloo", ROW)


def test_the_row_that_is_kept_is_of_what_send_is_mostly_used_for() -> None:
    discard = measured(case(buffer_size=64 * MIB), [40.0])
    write = measured(case(sink="write", buffer_size=4 * MIB), [4.0])
    resident = measured(case("compat", source="resident", sink="land"), [300.0])
    row = choose(make_rows([discard, write, resident]))
    assert row is not None
    assert row.case.sink == "write"
    row = choose(make_rows([resident, discard]))
    assert row is not None
    assert row.case.buffer_size == 64 * MIB
    assert choose(make_rows([resident])) is None


def test_send_takes_its_defaults_from_the_profile_and_says_so(
    saved: Path, transfer: FakeTransfer, capsys: Capture
) -> None:
    token = saved.with_name("token")
    token.write_text("a long secret")
    assert run([*SEND]) == 0
    assert sent(transfer) == (8 * MIB, 3)
    said = f"using --buffer-size 8MiB --num-buffers 3 from profile {saved}\n"
    assert capsys.readouterr().err == said
    run([*SEND, "-q", "--token-file", str(token)])
    assert sent(transfer) == (8 * MIB, 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("more", "buffers"),
    [
        (["--buffer-size", "2MiB"], (2 * MIB, 4)),
        # A default that was typed was asked for.
        (["--num-buffers", "4"], (None, 4)),
        (["--no-profile"], (None, 4)),
        (["--backend", "nccl"], (None, 4)),
    ],
)
def test_what_was_typed_counts_and_then_the_profile_is_silent(
    more: list[str],
    buffers: tuple[int | None, int],
    saved: Path,
    transfer: FakeTransfer,
    capsys: Capture,
) -> None:
    assert run([*SEND, *more]) == 0
    assert sent(transfer) == buffers
    assert capsys.readouterr().err == ""


def test_the_environment_counts_as_typed_too(
    saved: Path, transfer: FakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKCAST_NUM_BUFFERS", "2")
    assert run([*SEND]) == 0
    assert sent(transfer) == (None, 2)


def test_another_profile_can_be_named(
    saved: Path, transfer: FakeTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other,) = make_rows([measured(case(buffer_size=GIB, num_buffers=2), [9.0])])
    save_profile(tmp_path / "other.json", "gloo", other)
    monkeypatch.setenv("PACKCAST_PROFILE", str(tmp_path / "other.json"))
    assert run([*SEND]) == 0
    assert sent(transfer) == (GIB, 2)
    run([*SEND, "--profile", str(saved)])
    assert sent(transfer) == (8 * MIB, 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is no JSON"),
        (b"\xff\xfe", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[]", "it has no schema 1"),
        (b'{"schema": 2, "profiles": {}}', "it has no schema 1"),
        (b'{"schema": 1}', "it has no profiles"),
        (b'{"schema": 1, "profiles": {"gloo": 5}}', "gloo is no object"),
        (b'{"schema": 1, "profiles": {"gloo": {"buffer_size": true}}}', "buffer_size is True"),
        (
            b'{"schema": 1, "profiles": {"gloo": {"buffer_size": 5, "num_buffers": 1, '
            b'"readers": 1}}}',
            "not a multiple of 1MiB",
        ),
        (b" " * (1 << 20) + b"{}", "it is larger than 1 MiB"),
    ],
)
def test_a_damaged_profile_is_a_warning_not_a_failure(
    content: bytes, said: str, saved: Path, transfer: FakeTransfer, capsys: Capture
) -> None:
    saved.write_bytes(content)
    assert run([*SEND]) == 0
    assert sent(transfer) == (None, 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"packcast: warning: the profile {saved} is not used: ")
    assert said in line


def test_a_profile_that_does_not_fit_the_staging_is_left(
    saved: Path, transfer: FakeTransfer, capsys: Capture
) -> None:
    # Large buffers are staged with larger trailers, two units at least.
    (large,) = make_rows([measured(case(buffer_size=GIB), [9.0])])
    save_profile(saved, "gloo", large)
    assert run([*SEND, "--staging", "33580000"]) == 0
    assert sent(transfer) == (None, 4)
    assert "is not used: staging of 33580000 is less than" in capsys.readouterr().err


def test_a_named_profile_that_is_not_there_is_told(
    transfer: FakeTransfer, capsys: Capture, tmp_path: Path
) -> None:
    assert run([*SEND]) == 0
    assert capsys.readouterr().err == ""
    assert run([*SEND, "--profile", str(tmp_path / "none.json")]) == 0
    assert "none.json does not exist" in capsys.readouterr().err


def test_only_one_process_of_a_launch_tells_of_the_profile(
    saved: Path, transfer: FakeTransfer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "run_nproc", lambda *a, **k: 0)
    assert run(["send", "c", "--nproc", "2", "--backend", "gloo"]) == 0
    assert capsys.readouterr().err == ""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert run(["send", "c", "--backend", "gloo"]) == 0
    assert capsys.readouterr().err == ""


def test_a_dry_run_counts_with_the_profile_too(
    saved: Path, checkpoint: Path, capsys: Capture
) -> None:
    argv = ["send", str(checkpoint), "--dry-run", "--backend", "gloo", "--nproc", "2"]
    assert run([*argv, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["buffers"]["size"] == 8 * MIB
    assert "from profile" in captured.err


@pytest.mark.parametrize(
    ("backend", "device", "gpus", "expected"),
    [
        ("auto", "auto", True, "nccl"),
        ("auto", "cuda:1", True, "nccl"),
        ("auto", "cpu", True, "gloo"),
        ("auto", "auto", False, "gloo"),
        ("gloo", "auto", True, "gloo"),
        ("nccl", "auto", False, "nccl"),
    ],
)
def test_the_backend_is_guessed_without_torch(
    backend: str, device: str, gpus: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "has_gpu_driver", lambda: gpus)
    assert profile.backend_expected(backend, device) == expected


def test_what_bench_saves_send_uses(
    transfer: FakeTransfer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(settings: BenchSettings, view: BenchView, leaver: object) -> int:
        show(view, [measured(case(buffer_size=32 * MIB, num_buffers=5), [9.0])])
        return 0

    monkeypatch.setattr(packcast.bench, "run", bench, raising=False)
    monkeypatch.setattr(start, "Leaver", FakeLeaver)
    with monkeypatch.context() as launched:
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
            launched.setenv(name, str(value))
        launched.setenv("MASTER_ADDR", "127.0.0.1")
        assert run(["bench", "--save-profile"]) == 0
    assert "nccl: 32MiB x 5 saved as profile in" in capsys.readouterr().err
    assert run(["send", "c", "--listen", "h:1", "--workers", "1", "--backend", "nccl"]) == 0
    assert sent(transfer) == (32 * MIB, 5)
