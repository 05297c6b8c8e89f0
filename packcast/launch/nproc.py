"""`--nproc`: starts all ranks on this machine, and watches them.

The ranks are plain processes. This launcher handles signals, ends the other ranks if one has
failed, and returns the exit code of the root cause. It imports no torch.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from packcast.errors import RendezvousError, TransferError
from packcast.launch.exit import CLEAN_UP_LIMIT_S, ignored_signals
from packcast.launch.handover import HANDOVER_VARIABLE, LOOPBACK, Handover

_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_ERROR = "packcast: error: "
# By then ranks that lose another one have received its reason over the control channel.
_VERDICT_LIMIT_S = 1.5
# A rank takes a signal at once, unless it is frozen or its disk is dead.
_REACT_LIMIT_S = 3.0
# By then one that took it has cleaned up, or is stuck.
_STOP_LIMIT_S = CLEAN_UP_LIMIT_S + 5.0
_KILL_LIMIT_S = 2.0  # for the kernel to end them; one that waits for a dead disk remains
_LOOK_S = 0.05
_LOOPBACK_LIMIT_S = 5.0
# Without the current directory on the path (-P), which may be a checkpoint from anywhere. Where
# packcast itself was only found by way of that directory, its own is the last to be searched.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); from packcast.__main__ import main; main()"
)
COMMAND = (sys.executable, "-P", "-c", _PROGRAM, str(Path(__file__).parents[2]))


def run_nproc(
    argv: Sequence[str],
    nproc: int,
    *,
    command: Sequence[str] = COMMAND,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    look_after: Callable[[bool], None] = lambda _patient: None,
) -> int:
    """Run `command + argv` as `nproc` ranks and return the exit code of the whole.

    Main thread only. Output passes through; ignored signals stay ignored, also in the ranks. 0 if
    all succeeded; the root cause's exit code if ranks failed; 5 if a signal killed it; 128 plus
    the number of a signal that ended this process. No rank outlives the call, nor this process if
    the ranks call `die_with_parent`. `say` prints what no rank can: that one was killed, or this
    process interrupted. `look_after` is called after a failed run, when no rank is left; with
    False if the user does not want to wait for it.
    """
    _check_loopback()
    with _signal_numbers() as signals:
        ranks = _Ranks([*command, *argv], nproc)
        try:
            ranks.watch(signals, say)
        finally:
            ranks.kill()
    code = ranks.exit_code(say)
    if code != 0:
        look_after(not ranks.is_hurried)
    return code


class _Ranks:
    """The processes, from their start to the end of the last one."""

    def __init__(self, command: Sequence[str], nproc: int) -> None:
        self.is_hurried = False
        self._interrupted: int | None = None
        self._failed_at: float | None = None
        self._asked: tuple[int, float] | None = None  # to end: by which signal, and when
        # Both until they were asked to end: (rank, exit code) of failures, in order of report.
        self._failures_reported: list[tuple[int, int]] = []
        self._ended: dict[int, int] = {}  # exit codes by rank
        self._processes: list[subprocess.Popen[bytes]] = []
        ports, (self._failures, failures) = os.pipe(), os.pipe()
        os.set_blocking(self._failures, False)
        said = os.memfd_create("packcast-said")
        token, pid = secrets.token_urlsafe(32), os.getpid()
        try:
            for rank in range(nproc):
                handover = Handover(
                    rank=rank,
                    launcher_pid=pid,
                    token=token,
                    port_fd=ports[rank == 0],
                    failures_fd=failures,
                    said_fd=said,
                )
                self._processes.append(_start(command, handover, nproc))
        except OSError as error:
            self.kill()
            raise RendezvousError(f"rank {rank} cannot be started: {error.strerror}") from error
        finally:
            for fd in (*ports, failures, said):
                os.close(fd)

    def watch(self, signals: int, say: Callable[[str], None]) -> None:
        """Wait until all have ended, or time is up; `signals`: a pipe of signals' numbers."""
        num_signals = 0
        while self._tend():
            is_calm = self._failed_at is None and self._asked is None
            if not select.select([signals], [], [], None if is_calm else _LOOK_S)[0]:
                continue
            for number in os.read(signals, 256):
                if number == signal.SIGCHLD:
                    continue
                num_signals += 1
                if num_signals == 1:
                    self._interrupted = number
                    self._ask(number)
                elif num_signals == 2:
                    limit = f"at most {_STOP_LIMIT_S:g} s"
                    say(f"still cleaning up, {limit}; one more signal kills the ranks")
                else:
                    self.is_hurried = True
                    return

    def kill(self) -> None:
        """Kill the remaining ranks with their children: each rank leads a session."""
        running = [process for process in self._processes if process.poll() is None]
        for process in running:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_LIMIT_S)

    def exit_code(self, say: Callable[[str], None]) -> int:
        """The root cause's, after `watch` and `kill`."""
        if self._asked is None:
            self._listen()
        codes = dict(enumerate(process.returncode for process in self._processes))
        if not any(codes.values()):
            return 0
        if self._interrupted is not None:
            say(f"{_ERROR}interrupted by {signal.Signals(self._interrupted).name}")
            return 128 + self._interrupted
        reported = {rank for rank, _ in self._failures_reported}
        for rank, code in self._ended.items():  # it failed before it could report
            if code > 0 and rank not in reported:
                return code
        if self._failures_reported:
            return self._failures_reported[0][1]
        killed = {rank: code for rank, code in self._ended.items() if code < 0}
        if -signal.SIGTERM in killed.values():
            return 128 + signal.SIGTERM
        if killed:  # perhaps no other rank has noticed and printed it
            rank, code = next(iter(killed.items()))
            what = f"was killed by {signal.Signals(-code).name}"
        else:  # it had to be ended, and all others were done
            rank, what = next(rank for rank, code in codes.items() if code != 0), "did not end"
        say(f"{_ERROR}rank {rank} (pid {self._processes[rank].pid}) {what}")
        return TransferError.exit_code

    def _tend(self) -> bool:
        """Do what is due; whether to go on waiting."""
        running = [process for process in self._processes if process.poll() is None]
        now = time.monotonic()
        if self._asked is None:
            self._listen()
            are_stuck = self._ended and all(_is_stopped(process.pid) for process in running)
            if self._failed_at is None and (any(self._ended.values()) or are_stuck):
                self._failed_at = now
            if self._failed_at is not None and now >= self._failed_at + _VERDICT_LIMIT_S:
                self._ask(signal.SIGTERM)
            return bool(running)
        number, asked_at = self._asked
        if now >= asked_at + _REACT_LIMIT_S:
            for process in running:
                if _is_pending(process.pid, number):
                    process.kill()
        return bool(running) and now < asked_at + _STOP_LIMIT_S

    def _listen(self) -> None:
        """Update which ranks have failed or ended."""
        with suppress(BlockingIOError):
            lines = os.read(self._failures, 1 << 16).decode().splitlines()
            self._failures_reported += [
                (int(rank), int(code)) for rank, code in map(str.split, lines)
            ]
        for rank, process in enumerate(self._processes):
            if process.returncode is not None:
                self._ended.setdefault(rank, process.returncode)

    def _ask(self, number: int) -> None:
        """Signal the remaining ranks to end; stopped ones are continued, to clean up."""
        self._asked = (number, time.monotonic())
        for process in self._processes:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)


def _start(command: Sequence[str], handover: Handover, nproc: int) -> subprocess.Popen[bytes]:
    place = {"RANK": handover.rank, "LOCAL_RANK": handover.rank}
    place |= {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    fd = handover.write()
    # As torchrun does: otherwise each rank's torch has threads for all cores.
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    environment |= {name: str(value) for name, value in place.items()}
    try:
        return subprocess.Popen(
            command,
            env=environment | {HANDOVER_VARIABLE: str(fd)},
            pass_fds=(fd, *handover.descriptors),
            start_new_session=True,  # Ctrl-C is for the launcher, which passes it on
        )
    finally:
        os.close(fd)


def _check_loopback() -> None:
    """Ranks connect over loopback; without it torch would print sixty lines of C++."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_LIMIT_S).close()
    except OSError as error:
        raise RendezvousError(
            f"--nproc needs the loopback interface: {LOOPBACK}: {error.strerror or error}",
            hint="bring it up, as with `ip link set lo up`",
        ) from None


@contextmanager
def _signal_numbers() -> Iterator[int]:
    """A pipe with the numbers of signals to this process, SIGCHLD included.

    Ignored signals stay ignored; handlers are restored at the end.
    """
    watched = {*(_SIGNALS - ignored_signals(_SIGNALS)), signal.SIGCHLD}
    before = {number: signal.getsignal(number) for number in watched}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        for number in watched:
            signal.signal(number, lambda _number, _frame: None)
        yield reader
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            # None: a handler of C code, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(reader)
        os.close(writer)


def _is_stopped(pid: int) -> bool:
    return any(line.startswith(("State:\tT", "State:\tt")) for line in _status(pid))


def _is_pending(pid: int, number: int) -> bool:
    """Whether the signal is still pending."""
    masks = [line.split()[1] for line in _status(pid) if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def _status(pid: int) -> list[str]:
    """/proc/PID/status; empty without /proc, or if the process has gone."""
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []
