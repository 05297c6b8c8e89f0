"""Claims about the commands: what they run, say, write and return."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import packcast
from packcast.cli.app import run
from packcast.errors import RendezvousError, TransferError
from packcast.report import Report
from packcast.settings import Settings
from packcast.view import View
from tests.helpers.handovers import hand_over

from .conftest import FakeTransfer, snapshot_of, start_of

SEND = ("send", "c", "--listen", "h:1")
Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("beside_checkpoints")


def test_send_hands_its_options_to_the_transfer(transfer: FakeTransfer, capsys: Capture) -> None:
    options = "--workers 3 --listen h:1 --buffer-size 2MiB --num-buffers 3"
    more = "--staging 8MiB --readers all --no-sidecars --all-files --include a* --include b*"
    last = "--exclude c --exclude-files x/* --backend gloo --device cpu --join-timeout 1min"
    limits = "--heartbeat-timeout 500ms --stall-timeout 9"
    argv = ["send", "ckpt", *f"{options} {more} {last} {limits}".split()]
    assert run(argv) == 0
    assert transfer.settings == [
        Settings(
            command="send",
            checkpoint=Path("ckpt"),
            sidecars=False,
            all_files=True,
            exclude_files=("x/*",),
            include=("a*", "b*"),
            exclude=("c",),
            readers=None,
            buffer_size=2 << 20,
            num_buffers=3,
            staging=8 << 20,
            backend="gloo",
            device="cpu",
            workers=3,
            address=("h", 1),
            join_timeout_s=60.0,
            heartbeat_timeout_s=0.5,
            stall_timeout_s=9.0,
        )
    ]
    assert capsys.readouterr().out == ""


def test_send_in_a_launch_hands_on_where_its_workers_write(
    transfer: FakeTransfer, torchrun: Callable[[int], None]
) -> None:
    torchrun(0)
    assert run(["send", "ckpt", "--out", "d-{rank}", "--force", "--in-place"]) == 0
    assert transfer.settings == [
        Settings(
            command="send",
            checkpoint=Path("ckpt"),
            sink="write",
            target="d-{rank}",
            force=True,
            in_place=True,
        )
    ]


def test_recv_hands_its_options_to_the_transfer(
    transfer: FakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKCAST_TOKEN", "a long secret")
    assert run(["recv", "[::1]:29400", "--verify", "c", "--rank", "2", "--device", "cuda:1"]) == 0
    assert transfer.settings == [
        Settings(
            command="recv",
            sink="verify",
            target="c",
            device="cuda:1",
            address=("::1", 29400),
            token=b"a long secret",
            rank=2,
        )
    ]


def test_a_file_too_many_is_no_bug(transfer: FakeTransfer, capsys: Capture) -> None:
    def run_out(_settings: Settings, _view: View) -> Report:
        raise OSError(errno.EMFILE, "Too many open files")

    transfer.does = run_out
    with pytest.raises(SystemExit, match="5"):
        run([*SEND, "--workers", "1"])
    assert "reached its limit of open files and sockets" in capsys.readouterr().err


def test_the_defaults_are_those_of_settings(transfer: FakeTransfer) -> None:
    assert run([*SEND, "--workers", "1"]) == 0
    expected = Settings(command="send", checkpoint=Path("c"), workers=1, address=("h", 1))
    assert transfer.settings == [expected]


def test_options_are_read_from_the_environment(
    transfer: FakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"WORKERS": "2", "FORCE": "1", "INCLUDE": "a* b*", "OUT": "d", "EXCLUDE_FILES": "x/* y"}
    for name, value in given.items():
        monkeypatch.setenv(f"PACKCAST_{name}", value)
    assert run([*SEND]) == 0
    (settings,) = transfer.settings
    assert (settings.workers, settings.force, settings.target) == (2, True, "d")
    assert settings.include == ("a*", "b*")
    assert settings.exclude_files == ("x/*", "y")


def test_an_error_is_its_sentence_its_hint_and_its_code(
    transfer: FakeTransfer, capsys: Capture, tmp_path: Path
) -> None:
    def fail(settings: Settings, view: View) -> Report:
        raise RendezvousError("nobody came\x1b[2J", hint="start them")

    transfer.does = fail
    file = tmp_path / "r.json"
    with pytest.raises(SystemExit) as left:
        run([*SEND, "--workers", "1", "--json", str(file)])
    assert left.value.code == 4
    expected = "packcast: error: nobody came\\x1b[2J\n  start them\n"
    assert capsys.readouterr().err == expected
    result = json.loads(file.read_text())
    assert (result["ok"], result["exit_code"]) == (False, 4)
    assert (result["error"], result["hint"]) == ("nobody came\x1b[2J", "start them")


def test_a_failure_in_the_middle_reports_what_was_known(
    transfer: FakeTransfer, capsys: Capture
) -> None:
    def fail(settings: Settings, view: View) -> Report:
        view.started(start_of(), lambda: snapshot_of(1))
        raise TransferError("lost rank 3")

    transfer.does = fail
    with pytest.raises(SystemExit):
        run([*SEND, "--workers", "3", "--json", "-"])
    result = json.loads(capsys.readouterr().out)
    counted = {"files": 2, "tensors": 7, "bytes": 1 << 30}
    assert result["checkpoint"] == {"path": str(Path("c").absolute()), **counted}
    assert result["group"]["world_size"] == 4


def test_a_bug_is_one_line_and_with_v_a_traceback(transfer: FakeTransfer, capsys: Capture) -> None:
    def fail(settings: Settings, view: View) -> Report:
        raise KeyError("nothing")

    transfer.does = fail
    for more in ([], ["-v"]):
        with pytest.raises(SystemExit) as left:
            run([*SEND, "--workers", "1", *more])
        assert left.value.code == 1
        err = capsys.readouterr().err
        assert "packcast: error: this is a bug: KeyError: 'nothing'" in err
        assert ("-v for the traceback" in err) == (not more)
        assert ("Traceback" in err) == bool(more)


def test_ctrl_c_is_130(transfer: FakeTransfer, capsys: Capture) -> None:
    def interrupt(settings: Settings, view: View) -> Report:
        raise KeyboardInterrupt

    transfer.does = interrupt
    with pytest.raises(SystemExit) as left:
        run([*SEND, "--workers", "1"])
    assert left.value.code == 130
    assert capsys.readouterr().err == "packcast: error: interrupted\n"


def test_a_failure_that_was_survived_is_told_in_full(
    transfer: FakeTransfer, capsys: Capture
) -> None:
    transfer.does = lambda settings, view: Report(
        command="send", rank=0, is_sender=True, ok=False, exit_code=6, error="w differs", nbytes=9
    )
    assert run([*SEND, "--workers", "1", "--json", "-"]) == 6
    captured = capsys.readouterr()
    assert captured.err == "packcast: error: w differs\n"
    result = json.loads(captured.out)
    assert (result["exit_code"], result["checkpoint"]["bytes"]) == (6, 9)


def test_a_quiet_sender_keeps_the_token_that_it_makes_in_a_file_of_the_users(
    transfer: FakeTransfer, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    made = []
    for _ in range(2):
        assert run([*SEND, "--workers", "3", "-q"]) == 0
        given = transfer.settings[-1]
        assert given.token_file == tmp_path / "packcast" / "token"
        assert given.token_file.stat().st_mode & 0o777 == 0o600
        assert given.token_file.read_bytes() == given.token
        made.append(given.token)
    assert made[0] == made[1]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PACKCAST_TOKEN", "a secret")
    assert run([*SEND, "--workers", "3", "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert run([*SEND, "--workers", "3"]) == 0
    assert "warning: PACKCAST_TOKEN: a token of fewer than 16 bytes" in capsys.readouterr().err


def test_a_good_end_is_a_summary_for_people_and_nothing_on_standard_output(
    transfer: FakeTransfer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def succeed(settings: Settings, view: View) -> Report:
        view.started(start_of(), lambda: snapshot_of(1))
        return Report(command="send", is_sender=True, world_size=4, num_files=2, seconds=1)

    transfer.does = succeed
    assert run([*SEND, "--workers", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\nsent 2 files" in captured.err
    monkeypatch.setenv("PACKCAST_TOKEN", "a long secret")
    assert run([*SEND, "--workers", "3", "-q"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", [0, 2])
def test_one_result_file_is_the_senders_and_with_rank_each_has_one(
    rank: int, transfer: FakeTransfer, torchrun: Callable[[int], None], tmp_path: Path
) -> None:
    torchrun(rank)
    transfer.does = lambda settings, view: Report(
        command="send", rank=rank, is_sender=rank == 0, world_size=4
    )
    run(["send", "c", "--json", str(tmp_path / "one.json")])
    run(["send", "c", "--json", str(tmp_path / "{rank}-{local_rank}.json")])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == (["0-0.json", "one.json"] if rank == 0 else ["2-2.json"])


def test_a_rank_dies_with_its_launcher(
    transfer: FakeTransfer, torchrun: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run([*SEND, "--workers", "1"])
    assert transfer.parents == []
    torchrun(1)
    run(["send", "c"])
    hand_over(monkeypatch, launcher_pid=4711)
    run(["send", "c"])
    assert transfer.parents == [None, 4711]


def test_a_failure_leaves_its_record_for_torchrun(
    transfer: FakeTransfer,
    torchrun: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    torchrun(1)
    record = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(record))
    assert run(["send", "c", "--nproc", "2"]) == 2
    assert "--nproc" in record.read_text()


def test_nproc_starts_the_same_command_once_per_rank(
    transfer: FakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], int]] = []

    def run_nproc(argv: list[str], nproc: int, **more: object) -> int:
        assert "PACKCAST_NPROC" not in os.environ
        calls.append((argv, nproc))
        return 5

    monkeypatch.setattr("packcast.cli.start.run_nproc", run_nproc)
    assert run(["send", "c", "--nproc", "3", "--out", "d-{rank}"]) == 5
    monkeypatch.setenv("PACKCAST_NPROC", "2")
    assert run(["send", "c"]) == 5
    assert calls == [(["send", "c", "--out", "d-{rank}"], 3), (["send", "c"], 2)]
    assert transfer.settings == []


def test_a_result_that_cannot_be_written_is_exit_7(
    transfer: FakeTransfer, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def succeed(settings: Settings, view: View) -> Report:
        folder.rmdir()
        folder.write_text("a file now")
        return Report(command="send", is_sender=True)

    transfer.does = succeed
    assert run([*SEND, "--workers", "1", "--json", str(folder / "r.json")]) == 7
    assert "--json" in capsys.readouterr().err


def test_the_process_ends_with_the_errors_code_through_the_real_leaver() -> None:
    program = """
        import sys, types
        from packcast.errors import DestinationError
        module = types.ModuleType("packcast.transfer")
        def run(settings, view, exit_handler):
            raise DestinationError("no space")
        module.run = run
        sys.modules["packcast.transfer"] = module
        from packcast.cli.app import run
        run(["recv", "h:1", "--discard", "--json", "-"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 7
    assert done.stderr == "packcast: error: no space\n"
    assert json.loads(done.stdout)["exit_code"] == 7


@pytest.mark.parametrize("pool", ["python", "auto"])
def test_the_version_names_the_io_threads_without_torch(pool: str) -> None:
    program = """if True:
        import sys
        from packcast.cli.app import run
        from packcast.io.pool import pool_kind
        print(pool_kind())
        run(["--version"])
        assert "torch" not in sys.modules
    """
    environment = os.environ | {"PACKCAST_POOL": pool}
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    kind, version = ran.stdout.splitlines()
    assert version.startswith(f"packcast {packcast.__version__} ({kind} I/O threads, torch 2.")
    assert kind == "python" if pool == "python" else kind in ("native", "python")


def test_a_choice_of_io_threads_that_does_not_exist_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("PACKCAST_POOL", "fast")
    assert run(["--version"]) == 2
    assert "PACKCAST_POOL is 'fast'" in capsys.readouterr().err


def test_a_verbose_run_says_which_io_threads_it_has(
    transfer: FakeTransfer, capsys: Capture
) -> None:
    transfer.does = started
    for flags, said in (((), False), (("-v",), True)):
        assert run([*SEND, "--workers", "3", *flags, "--progress", "plain"]) == 0
        assert ("native I/O threads" in capsys.readouterr().err) is said


def started(settings: Settings, view: View) -> Report:
    view.started(start_of(), lambda: snapshot_of(1))
    return Report(command="send", is_sender=True)
