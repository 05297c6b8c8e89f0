"""`--nproc` with small scripts as ranks: exit codes, signals, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import packcast
from packcast.launch.nproc import COMMAND

REPOSITORY = Path(__file__).parents[2]

# Rank r does what its r-th argument says, and leaves its pid for the test to look after.
RANK = """
import os, signal, sys, time
from pathlib import Path
from packcast.errors import Interrupted, error_from_code
from packcast.launch.handover import received
from packcast.launch.exit import ProcessExit, die_with_parent, record_failure, watch_signals

handed = received()
die_with_parent(handed.launcher_pid)
here = Path(sys.argv[1])
actions = sys.argv[2:]
me = int(os.environ["RANK"])
assert me == handed.rank
(here / f"unfinished-{me}").write_text(str(os.getpid()))
(here / f"unfinished-{me}").rename(here / f"pid-{me}")
while len(list(here.glob("pid-*"))) < len(actions):
    time.sleep(0.01)
action, _, detail = actions[me].partition(":")
if action == "say":
    print(detail, flush=True)
elif action == "exit":  # without a record
    sys.exit(int(detail))
elif action == "record":
    record_failure(error_from_code(int(detail), f"said by rank {me}"))
    (here / "cause").touch()
    sys.exit(int(detail))
elif action == "relay":  # fails because another rank did, at the same moment
    while not (here / "cause").exists():
        time.sleep(0.001)
    record_failure(error_from_code(int(detail), "relayed"))
    sys.exit(int(detail))
elif action == "kill":
    os.kill(os.getpid(), getattr(signal, detail))
elif action == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (here / f"stubborn-{me}").touch()
elif action == "polite":  # as packcast's own ranks
    watch_signals(ProcessExit(lambda error: None), patient=True)
elif action == "stuck":  # takes no signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
elif action in ("cleaning", "frozen"):  # polite, with something to remove
    exit_handler = ProcessExit(lambda error: None)
    exit_handler.on_leave(lambda: (time.sleep(1), (here / f"cleaned-{me}").touch()))
    watch_signals(exit_handler, patient=True)
    (here / f"cleaning-{me}").touch()
    if action == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
elif action == "deaf":
    watch_signals(ProcessExit(lambda error: None))
    (here / f"deaf-{me}").touch()
    while not (here / "enough").exists():
        time.sleep(0.01)
elif action == "tell":
    if me == 0:
        handed.publish_port(4711, len(actions) - 1)
    else:
        (here / f"told-{me}").write_text(f"{handed.await_port(10)} {handed.token}")
elif action == "look":  # at what others could see of the secret
    seen = [Path(f"/proc/self/{name}").read_bytes() for name in ("cmdline", "environ")]
    assert not any(handed.token.encode() in each for each in seen)
if action in ("sleep", "stubborn", "polite", "cleaning", "kill", "stuck", "frozen"):
    time.sleep(60)
"""

LAUNCHER = """
import signal, sys
from packcast.launch.nproc import run_nproc
rank_script, ignored, tell, here, *actions = sys.argv[1:]
if int(ignored):
    signal.signal(int(ignored), signal.SIG_IGN)
code = run_nproc(
    [here, *actions],
    len(actions),
    command=(sys.executable, rank_script),
    look_after=lambda patient: print("looked after, patient:", patient) if int(tell) else None,
)
assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
sys.stdout.flush()
sys.exit(code)
"""


class Launch:
    """One `run_nproc` in a process of its own."""

    def __init__(self, here: Path, *actions: str, ignored: int = 0) -> None:
        self.here = here
        self.nproc = len(actions)
        rank_script = here / "rank.py"
        rank_script.write_text(RANK)
        tell = bool({"cleaning", "stubborn"} & {*actions})
        with (here / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", LAUNCHER),
                    *(rank_script, str(int(ignored)), str(int(tell)), here, *actions),
                ],
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                process_group=0,
            )
        self.pid = self.process.pid

    def wait_for_ranks(self, pattern: str = "pid-*") -> list[int]:
        wait_until(lambda: len(list(self.here.glob(pattern))) == self.nproc)
        return self.ranks()

    def ranks(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.here.glob("pid-*"))]

    def exit_code(self) -> int:
        code = self.process.wait(60)
        assert_gone(self.ranks())
        return code

    def output(self) -> str:
        return (self.here / "output").read_text()


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(alive, pids)), limit_s=10.0)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    runs: list[Launch] = []

    def start(*actions: str, ignored: int = 0) -> Launch:
        runs.append(Launch(tmp_path, *actions, ignored=ignored))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:  # the test has failed: leave nothing behind
            run.process.kill()
            run.exit_code()


def test_success_is_zero_and_output_passes_through_without_the_launchers_own(
    launch: Callable[..., Launch],
) -> None:
    run = launch("say:one $HOME $$ ${local_rank} {rank}", "exit:0")
    assert run.exit_code() == 0
    assert run.output() == "one $HOME $$ ${local_rank} {rank}\n"


@pytest.mark.parametrize(
    ("actions", "code"),
    [
        (["sleep", "polite", "record:7"], 7),
        (["relay:5", "relay:5", "record:6"], 6),  # the first record counts, within a second too
        (["record:5", "exit:2"], 2),  # one that failed before it took part
        (["polite", "kill:SIGTERM"], 143),
        (["record:7", "stuck"], 7),  # one that takes no signal is killed
    ],
    ids=str,
)
def test_the_root_causes_code_is_returned_and_not_that_of_its_victims(
    launch: Callable[..., Launch], actions: list[str], code: int
) -> None:
    run = launch(*actions)
    assert run.exit_code() == code
    assert run.output() == ""


def test_a_rank_killed_by_a_signal_is_a_lost_rank_and_is_named(
    launch: Callable[..., Launch],
) -> None:
    run = launch("sleep", "kill:SIGKILL")
    assert run.exit_code() == 5
    killed = f"rank 1 (pid {run.ranks()[1]}) was killed by SIGKILL"
    assert run.output() == f"packcast: error: {killed}\n"


@pytest.mark.parametrize(
    ("kill", "number", "code"),
    [
        (os.kill, signal.SIGINT, 130),
        (os.kill, signal.SIGTERM, 143),
        (os.kill, signal.SIGHUP, 129),
        (os.killpg, signal.SIGINT, 130),  # Ctrl-C on a terminal
    ],
)
def test_a_signal_to_the_launcher_ends_all(
    launch: Callable[..., Launch],
    kill: Callable[[int, int], None],
    number: signal.Signals,
    code: int,
) -> None:
    run = launch("sleep", "polite")
    run.wait_for_ranks()
    kill(run.pid, number)
    assert run.exit_code() == code


@pytest.mark.parametrize("frozen", ["frozen", "polite"])
def test_a_frozen_rank_is_woken_to_clean_up_where_another_has_failed(
    launch: Callable[..., Launch], frozen: str
) -> None:
    run = launch("record:5", frozen, "relay:5")
    wait_until(lambda: len(run.ranks()) == 3)
    started = time.monotonic()
    assert run.exit_code() == 5
    assert time.monotonic() - started < 10
    assert (run.here / "cleaned-1").exists() == (frozen == "frozen")


def test_a_rank_that_is_frozen_when_all_others_have_succeeded_is_not_waited_for(
    launch: Callable[..., Launch],
) -> None:
    run = launch("exit:0", "frozen")
    assert run.exit_code() == 5
    assert run.output() == f"packcast: error: rank 1 (pid {run.ranks()[1]}) did not end\n"
    assert (run.here / "cleaned-1").exists()


def test_a_rank_that_is_terminated_ends_the_run_as_143_though_others_call_it_lost(
    launch: Callable[..., Launch],
) -> None:
    run = launch("cleaning", "cleaning")
    victim = run.wait_for_ranks("cleaning-*")[1]
    os.kill(victim, signal.SIGTERM)
    assert run.exit_code() == 143


def test_rank_0_tells_its_port_and_the_secret_is_not_visible(
    launch: Callable[..., Launch],
) -> None:
    run = launch("tell", "tell", "tell", "look")
    assert run.exit_code() == 0, run.output()
    (port, token), other = ((run.here / f"told-{rank}").read_text().split() for rank in (1, 2))
    assert port == "4711"
    assert len(token) >= 32
    assert other == [port, token]


def test_what_only_has_the_environment_of_a_rank_is_handed_nothing() -> None:
    program = "from packcast.launch.handover import received; print(received())"
    for number in ("3", "0", "none"):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PACKCAST_LAUNCH_FD": number},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert ran.stdout == "None\n", ran.stderr


@pytest.mark.parametrize(
    ("numbers", "gap_s"), [((2, 2), 0.02), ((2, 2), 0.3), ((15, 15), 0.02), ((1, 2), 0.3)]
)
def test_a_second_signal_waits_until_the_ranks_have_cleaned_up(
    launch: Callable[..., Launch], numbers: tuple[int, int], gap_s: float
) -> None:
    run = launch("cleaning", "cleaning")
    run.wait_for_ranks("cleaning-*")
    for number in numbers:
        os.kill(run.pid, number)
        time.sleep(gap_s)
    assert run.exit_code() == 128 + numbers[0]
    assert {path.name for path in run.here.glob("cleaned-*")} == {"cleaned-0", "cleaned-1"}
    assert "still cleaning up, at most 20 s; one more signal kills the ranks" in run.output()
    assert f"error: interrupted by {signal.Signals(numbers[0]).name}\n" in run.output()
    assert run.output().endswith("looked after, patient: True\n")


def test_a_third_signal_ends_ranks_that_do_not_clean_up(launch: Callable[..., Launch]) -> None:
    run = launch("stubborn", "stubborn")
    run.wait_for_ranks("stubborn-*")
    started = time.monotonic()
    for _ in range(3):
        os.kill(run.pid, signal.SIGINT)
        time.sleep(0.3)
    assert run.exit_code() == 130
    assert time.monotonic() - started < 5
    assert run.output().endswith("looked after, patient: False\n")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_from_the_start_ends_nothing(
    launch: Callable[..., Launch], number: signal.Signals
) -> None:
    run = launch("deaf", "deaf", ignored=number)
    ranks = run.wait_for_ranks("deaf-*")
    for pid in (run.pid, *ranks):
        os.kill(pid, number)
    time.sleep(0.5)
    assert all(map(alive, (run.pid, *ranks)))
    (run.here / "enough").touch()
    assert run.exit_code() == 0
    assert run.output() == ""


def test_a_signal_while_ranks_are_being_started_leaves_none(
    launch: Callable[..., Launch],
) -> None:
    run = launch(*["sleep"] * 12)
    wait_until(lambda: bool(list(run.here.glob("pid-*"))))
    os.kill(run.pid, signal.SIGTERM)
    assert run.exit_code() == 143


@pytest.mark.chaos
def test_killing_the_parent_leaves_no_orphan(launch: Callable[..., Launch]) -> None:
    run = launch("sleep", "polite")
    ranks = run.wait_for_ranks()
    assert all(map(alive, ranks))
    os.kill(run.pid, signal.SIGKILL)
    assert run.exit_code() == -signal.SIGKILL


def test_ranks_search_no_current_directory_and_find_packcast_where_it_is_not_installed(
    tmp_path: Path,
) -> None:
    (tmp_path / "resource.py").write_text("raise SystemExit('code beside the checkpoint runs')")
    # Site packages without their .pth files, so without an editable install's.
    environment = {"PYTHONPATH": sysconfig.get_path("purelib")}
    python, *options = COMMAND
    ran = subprocess.run(
        [python, "-S", *options, "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.stderr == ""
    assert ran.stdout.startswith(f"packcast {packcast.__version__} ")
