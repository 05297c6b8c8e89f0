"""The way out: from any thread, within a bound, whatever hangs. Each case is a small process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

PRELUDE = """
import ctypes, os, signal, sys, threading, time
from packcast.errors import *
from packcast.launch.exit import *
forever = ctypes.CDLL(None).pause  # in C, without the GIL: what a collective looks like
show = lambda error: print(error.message, file=sys.stderr)
"""


def start(script: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def signalled(script: str, *numbers: signal.Signals) -> tuple[int, str, str]:
    """How the script ends: it gets the first signal once it is ready, others once it cleans up."""
    process = start(script)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for i, number in enumerate(numbers):
        process.send_signal(number)
        if i == 0 and len(numbers) > 1:
            assert process.stdout.readline() == "cleaning\n"
        time.sleep(0.1)  # or two equal signals are one
    return ended(process)


def test_leaving_from_a_thread_ends_a_process_whose_main_thread_is_stuck() -> None:
    code, _, err = ended(
        start("""
        error = TransferError("lost rank 3")
        threading.Timer(0.1, ProcessExit(show).leave, [error]).start()
        forever()
        """)
    )
    assert (code, err) == (5, "lost rank 3\n")


def test_clean_ups_run_in_order_and_one_that_fails_stops_no_other() -> None:
    code, out, err = ended(
        start("""
        exit_handler = ProcessExit(show)
        exit_handler.on_leave(lambda: print("first", exit_handler.error.exit_code))
        exit_handler.on_leave(lambda: 1 / 0)
        exit_handler.on_leave(lambda: sys.exit(9))
        exit_handler.on_leave(lambda: print("last"))
        exit_handler.leave(DestinationError("no space"))
        """)
    )
    assert (code, out, err) == (7, "first 7\nlast\n", "no space\n")


def test_the_first_to_leave_decides_and_the_others_wait() -> None:
    code, out, err = ended(
        start("""
        exit_handler = ProcessExit(show)
        exit_handler.on_leave(lambda: time.sleep(0.3))
        late = lambda: (exit_handler.leave(UsageError("late")), print("back"))
        threading.Timer(0.1, late).start()
        exit_handler.leave(CheckpointError("first"))
        """)
    )
    assert (code, out, err) == (3, "", "first\n")


def test_a_clean_up_that_hangs_is_left_behind_and_the_error_still_said() -> None:
    started = time.monotonic()
    code, _, err = ended(
        start("""
        exit_handler = ProcessExit(show, limit_s=0.3)
        exit_handler.on_leave(forever)
        exit_handler.leave(TransferError("lost rank 1"))
        """)
    )
    assert (code, err) == (5, "lost rank 1\n")
    assert time.monotonic() - started < 5


def test_a_terminal_that_hangs_does_not_keep_the_process() -> None:
    code, _, _ = ended(
        start("""
        ProcessExit(lambda error: forever(), limit_s=0.1).leave(TransferError("unheard"))
        """)
    )
    assert code == 5


def test_leaving_without_an_error_is_success() -> None:
    code, out, err = ended(
        start("""
        exit_handler = ProcessExit(show)
        exit_handler.on_leave(lambda: print("cleaned", end=""))
        exit_handler.leave(None)
        """)
    )
    assert (code, out, err) == (0, "cleaned", "")


def test_the_way_out_never_imports_torch(tmp_path: Path) -> None:
    _, out, _ = ended(
        start(
            """
            exit_handler = ProcessExit(show)
            exit_handler.on_leave(lambda: print("torch" in sys.modules))
            exit_handler.leave(TransferError("x"))
            """,
            TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"),
        )
    )
    assert out == "False\n"


def test_the_error_is_put_on_record_for_torchrun(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    error = 'TransferError("lost rank 3", hint="look at host-b")'
    ended(start(f"ProcessExit(show).leave({error})", TORCHELASTIC_ERROR_FILE=str(path)))
    message = json.loads(path.read_text())["message"]
    assert message["message"] == "TransferError: lost rank 3"
    assert message["extraInfo"]["py_callstack"] == "lost rank 3 (look at host-b)"
    assert message["extraInfo"]["exit_code"] == 5
    assert abs(int(message["extraInfo"]["timestamp"]) - time.time()) < 30


def test_a_victim_of_a_signal_is_not_put_on_record(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    error = 'Interrupted("interrupted by SIGTERM", signal_number=15)'
    code, _, _ = ended(
        start(f"ProcessExit(show).leave({error})", TORCHELASTIC_ERROR_FILE=str(path))
    )
    assert code == 143
    assert not path.exists()


STUCK = """
exit_handler = ProcessExit(show)
watch_signals(exit_handler)
threading.Thread(target=forever, daemon=True).start()
print("ready")
forever()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_stuck_process_with_its_own_code(number: signal.Signals) -> None:
    code, _, err = signalled(STUCK, number)
    assert (code, err) == (128 + number, f"interrupted by {number.name}\n")


def test_after_sigterm_the_cause_may_still_come_by_another_way() -> None:
    code, _, err = signalled(
        """
        exit_handler = ProcessExit(show)
        watch_signals(exit_handler)
        threading.Timer(0.3, exit_handler.leave, [TransferError("lost rank 2")]).start()
        print("ready")
        forever()
        """,
        signal.SIGTERM,
    )
    assert (code, err) == (5, "lost rank 2\n")


ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
CLEANING = """
printed = threading.Event()
say = lambda text: (print(text, file=sys.stderr), printed.set())
exit_handler = ProcessExit(show, say=say)
left = ["/local/.copy.packcast-1"]
clean_up = lambda: (print("cleaning"), {clean_up}, left.clear())
exit_handler.on_leave(clean_up, lambda: left[0] if left else None)
watch_signals(exit_handler)
print("ready")
forever()
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [*zip(ENDINGS, ENDINGS, strict=True), *itertools.pairwise(ENDINGS)],
)
def test_a_second_signal_waits_for_the_clean_up_and_says_so(
    first: signal.Signals, second: signal.Signals
) -> None:
    code, _, err = signalled(CLEANING.format(clean_up="printed.wait(20)"), first, second)
    assert (code, err) == (
        128 + first,
        "still cleaning up, removing /local/.copy.packcast-1, at most 15 s;"
        f" one more signal ends this at once\ninterrupted by {first.name}\n",
    )


def test_a_third_signal_names_what_is_left_and_waits_for_no_clean_up() -> None:
    started = time.monotonic()
    numbers = [signal.SIGINT, signal.SIGHUP, signal.SIGINT]
    code, _, err = signalled(CLEANING.format(clean_up="forever()"), *numbers)
    assert code == 130
    assert err.splitlines()[1:] == [
        "/local/.copy.packcast-1 is left behind: `packcast clean --yes /local` removes it",
        "interrupted by SIGINT",
    ]
    assert time.monotonic() - started < 6


def test_a_clean_up_that_is_cut_off_names_what_is_left() -> None:
    script = CLEANING.replace("ProcessExit(show,", "ProcessExit(show, limit_s=0.3,")
    code, _, err = signalled(script.format(clean_up="forever()"), signal.SIGINT)
    assert (code, err.splitlines()) == (
        130,
        [
            "/local/.copy.packcast-1 is left behind: `packcast clean --yes /local` removes it",
            "interrupted by SIGINT",
        ],
    )


@pytest.mark.parametrize("number", ENDINGS)
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(number: signal.Signals) -> None:
    script = """
    signal.signal(signal.{name}, signal.SIG_IGN)
    exit_handler = ProcessExit(show)
    watch_signals(exit_handler)
    print("ready")
    time.sleep(0.5)
    exit_handler.leave(TransferError("by itself"))
    """
    code, _, err = signalled(script.format(name=number.name), number)
    assert (code, err) == (5, "by itself\n")


def test_ranks_leave_it_to_their_launcher_when_to_wait_no_longer() -> None:
    script = CLEANING.replace(
        "watch_signals(exit_handler)", "watch_signals(exit_handler, patient=True)"
    )
    code, _, err = signalled(script.format(clean_up="time.sleep(0.7)"), *[signal.SIGINT] * 4)
    assert (code, err) == (130, "interrupted by SIGINT\n")


@pytest.mark.chaos
def test_a_rank_dies_with_its_launcher() -> None:
    launcher = start("""
    import subprocess
    rank = subprocess.Popen([sys.executable, "-c",
        "from packcast.launch.exit import *; die_with_parent(); print('ready'); time.sleep(60)"])
    print(rank.pid)
    forever()
    """)
    assert launcher.stdout is not None
    lines = {launcher.stdout.readline().strip() for _ in range(2)}
    launcher.kill()
    # The rank holds the other end of this pipe: it is closed when the rank is gone.
    assert launcher.stdout.read() == ""
    launcher.communicate()
    pid = int((lines - {"ready"}).pop())
    assert (
        not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def test_a_rank_that_ignores_sigterm_dies_with_its_launcher_too() -> None:
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    code, _, _ = ended(start(ignoring + "die_with_parent(launcher_pid=1 << 22); forever()"))
    assert code == -signal.SIGKILL


def test_a_rank_whose_launcher_is_already_gone_dies_at_once() -> None:
    code, _, _ = ended(start("die_with_parent(launcher_pid=1 << 22); forever()"))
    assert code == -signal.SIGTERM
