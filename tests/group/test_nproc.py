"""`--nproc` with small scripts as ranks: exit codes, signals, and nobody left behind.

One process imports torch (seconds) and is forked for each launch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import packcast
from packcast.group.nproc import COMMAND

REPOSITORY = Path(__file__).parents[2]

# Rank r does what its r-th argument says, and leaves its pid for the test to look after.
RANK = """
import os, signal, sys, time
from pathlib import Path
from packcast.errors import Interrupted, error_from_code
from packcast.group.leave import Leaver, die_with_parent, record_failure, watch_signals

die_with_parent(int(os.environ["PACKCAST_LAUNCHER_PID"]))
here = Path(sys.argv[1])
actions = sys.argv[2:]
me = int(os.environ["RANK"])
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
    watch_signals(Leaver(lambda error: None))
elif action == "cleaning":  # the same, with something to remove
    leaver = Leaver(lambda error: None)
    leaver.on_leave(lambda: (time.sleep(1), (here / f"cleaned-{me}").touch()))
    watch_signals(leaver, patient=True)
    (here / f"cleaning-{me}").touch()
elif action == "deaf":
    ignored = map(int, os.environ["PACKCAST_IGNORED_SIGNALS"].split())
    watch_signals(Leaver(lambda error: None), ignored=ignored)
    (here / f"deaf-{me}").touch()
    while not (here / "enough").exists():
        time.sleep(0.01)
if action in ("sleep", "stubborn", "polite", "cleaning", "kill"):
    time.sleep(60)
"""

# Reads launches and waits as lines of JSON, and stays without threads so that it may fork.
FORGE = """
import json, os, signal, sys
from packcast.group.nproc import run_nproc
import torch.distributed.launcher.api
rank_script = sys.argv[1]
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        _, status = os.waitpid(request["wait"], 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if request["ignored"]:
            signal.signal(request["ignored"], signal.SIG_IGN)
        code = run_nproc(
            request["argv"],
            request["nproc"],
            command=(sys.executable, rank_script),
            look_after=lambda patient: (
                print("looked after, patient:", patient) if "tell" in request else None
            ),
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.setpgid(pid, pid) if os.getpgid(pid) != pid else None
    print(json.dumps(pid), flush=True)
"""


class Launch:
    """One `run_nproc` in a process of its own."""

    def __init__(
        self,
        ask: Callable[[dict[str, object]], Any],
        here: Path,
        *actions: str,
        ignored: int | None = None,
    ) -> None:
        self._ask = ask
        self.here = here
        self.nproc = len(actions)
        self.ended = False
        self.pid: int = ask(
            {
                "argv": [str(here), *actions],
                "nproc": self.nproc,
                "output": str(here / "output"),
                "ignored": ignored,
                **({"tell": True} if {"cleaning", "stubborn"} & {*actions} else {}),
            }
        )

    def wait_for_ranks(self, pattern: str = "pid-*") -> list[int]:
        wait_until(lambda: len(list(self.here.glob(pattern))) == self.nproc)
        return self.ranks()

    def ranks(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.here.glob("pid-*"))]

    def exit_code(self) -> int:
        code: int = self._ask({"wait": self.pid})
        self.ended = True
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


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, object]], Any]]:
    here = tmp_path_factory.mktemp("forge")
    (here / "rank.py").write_text(RANK)
    with subprocess.Popen(
        [sys.executable, "-c", FORGE, str(here / "rank.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(here)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def ask(request: dict[str, object]) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.fixture
def launch(
    forge: Callable[[dict[str, object]], Any], tmp_path: Path
) -> Iterator[Callable[..., Launch]]:
    runs: list[Launch] = []

    def start(*actions: str, ignored: int | None = None) -> Launch:
        runs.append(Launch(forge, tmp_path, *actions, ignored=ignored))
        return runs[-1]

    yield start
    for run in runs:
        if not run.ended:  # the test has failed: leave nothing behind
            os.kill(run.pid, signal.SIGKILL)
            run.exit_code()


def test_success_is_zero_and_output_passes_through_without_the_launchers_own(
    launch: Callable[..., Launch],
) -> None:
    run = launch("say:one $HOME $$ ${local_rank} {rank}", "exit:0")
    assert run.exit_code() == 0
    assert run.output() == "one $HOME $$ ${local_rank} {rank}\n"


def test_the_root_causes_code_is_returned_and_not_that_of_its_victims(
    launch: Callable[..., Launch],
) -> None:
    run = launch("sleep", "polite", "record:7")
    assert run.exit_code() == 7
    assert run.output() == ""


def test_the_first_of_several_records_counts_even_within_a_second(
    launch: Callable[..., Launch],
) -> None:
    assert launch("relay:5", "relay:5", "record:6").exit_code() == 6


def test_a_rank_that_failed_before_it_took_part_goes_before_those_who_lost_it(
    launch: Callable[..., Launch],
) -> None:
    assert launch("record:5", "exit:2").exit_code() == 2


def test_a_rank_killed_by_a_signal_is_a_lost_rank_and_is_named(
    launch: Callable[..., Launch],
) -> None:
    run = launch("sleep", "kill:SIGKILL")
    assert run.exit_code() == 5
    assert run.output() == f"rank 1 (pid {run.ranks()[1]}) was killed by SIGKILL\n"


def test_a_rank_that_somebody_terminates_gives_143(launch: Callable[..., Launch]) -> None:
    assert launch("polite", "kill:SIGTERM").exit_code() == 143


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_to_the_parent_alone_ends_all(
    launch: Callable[..., Launch], number: signal.Signals, code: int
) -> None:
    run = launch("sleep", "polite")
    run.wait_for_ranks()
    os.kill(run.pid, number)
    assert run.exit_code() == code


def test_ctrl_c_on_a_terminal_ends_all(launch: Callable[..., Launch]) -> None:
    run = launch("sleep", "polite")
    run.wait_for_ranks()
    os.killpg(run.pid, signal.SIGINT)
    assert run.exit_code() == 130


@pytest.mark.parametrize("numbers", [(2, 2), (15, 15), (1, 1), (2, 15), (1, 2)])
@pytest.mark.parametrize("gap_s", [0.02, 0.3])
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
