"""`--nproc`: all ranks on this machine, started and watched by torch's elastic launcher.

Runs in a process of its own that takes no part in the transfer. What the launcher does not do is
done here: the root cause's exit code, no noise, no rank left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packcast.errors import RendezvousError, TransferError
from packcast.group.leave import CLEAN_UP_LIMIT_S, ignored_signals

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Where a rank finds the process that started it, to die with it even if that is gone already.
LAUNCHER_PID_VARIABLE = "PACKCAST_LAUNCHER_PID"
# And a file in which the ranks note what they have said, so that one of them says it for all.
SAID_VARIABLE = "PACKCAST_SAID_FILE"
# And the numbers of the signals that this process was started with ignored, as by nohup.
IGNORED_VARIABLE = "PACKCAST_IGNORED_SIGNALS"

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_NOISY_LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher")
# A rank has cleaned up by then, or is stuck; the launcher itself would wait for thirty seconds.
_STOP_LIMIT_S = CLEAN_UP_LIMIT_S + 5.0
_KILL_LIMIT_S = 2.0  # for the kernel to end them; one that waits for a dead disk stays
_LOOK_S = 0.02
_PROC = Path("/proc")
_LOOPBACK = "127.0.0.1"
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
    verbose: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    look_after: Callable[[bool], None] = lambda _patient: None,
) -> int:
    """Run `command + argv` as `nproc` ranks and return the exit code of the whole.

    Main thread only, signals not blocked (the ranks would inherit that). Output passes through.
    0 if all succeeded; the root cause's own code where ranks failed; 5 where a signal killed it;
    128 plus the number of a signal that ended this process. No rank outlives the call, nor this
    process if the ranks call `die_with_parent`. `say` gets the one sentence that no rank can say:
    that it was killed. `verbose` lets the launcher's own log through. Once no rank is left of a run
    that failed, `look_after` is called: False if nobody wants to wait for it.
    """
    _check_loopback()
    code, is_hurried = _launch(argv, nproc, command, say, verbose=verbose)
    if code != 0:
        look_after(not is_hurried)
    return code


def _launch(
    argv: Sequence[str],
    nproc: int,
    command: Sequence[str],
    say: Callable[[str], None],
    *,
    verbose: bool,
) -> tuple[int, bool]:
    import torch.distributed.launcher.api as launcher
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with (
        tempfile.TemporaryDirectory(prefix="packcast-nproc-") as log_dir,
        _no_child_left(say) as ending,
        _environment(LAUNCHER_PID_VARIABLE, str(os.getpid())),
        _environment(SAID_VARIABLE, os.path.join(log_dir, "said")),
        # As torchrun does: or each rank's torch has threads for all cores, which get in the way.
        _environment("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1")),
        contextlib.nullcontext() if verbose else _silence(_NOISY_LOGGERS),
    ):
        config = launcher.LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            # As torchrun --standalone, but on loopback whatever the host's name resolves to.
            rdzv_backend="c10d",
            rdzv_endpoint=f"{_LOOPBACK}:0",
            local_addr=_LOOPBACK,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
        )
        entrypoint, *arguments = [*command, *argv]
        # The launcher fills in $local_rank and halves every $$; no shell and no path means that.
        escaped = [argument.replace("$", "$$") for argument in arguments]
        code = 0
        try:
            launcher.elastic_launch(config, entrypoint)(*escaped)
        except ChildFailedError as failed:
            code = _exit_code(failed.failures, say)
        except SignalException as stopped:
            code = 128 + (ending.first_signal or stopped.sigval)
        except KeyboardInterrupt:  # before the launcher had its handlers
            code = 128 + signal.SIGINT
    return code, ending.is_hurried


def _check_loopback() -> None:
    """Ranks meet there; torch would tell of its absence in sixty lines of C++."""
    try:
        with socket.create_server((_LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_LIMIT_S).close()
    except OSError as error:
        raise RendezvousError(
            f"--nproc needs the loopback interface: {_LOOPBACK}: {error.strerror or error}",
            hint="bring it up, as with `ip link set lo up`",
        ) from None


def _exit_code(failures: Mapping[int, ProcessFailure], say: Callable[[str], None]) -> int:
    rank, root = min(failures.items(), key=lambda item: _suspicion(item[1]))
    if root.exitcode >= 0:
        return root.exitcode
    if root.exitcode == -signal.SIGTERM:
        return 128 + signal.SIGTERM
    # What the surviving ranks would say of it; perhaps none of them had met it yet.
    say(f"rank {rank} (pid {root.pid}) was killed by {signal.Signals(-root.exitcode).name}")
    return TransferError.exit_code


def _suspicion(failure: ProcessFailure) -> tuple[int, float]:
    """Sorts the root cause first. The launcher ends all others with SIGTERM, later SIGKILL.

    A code without a record is a rank that failed before it took part, on its own. Records are
    ordered by our own time in them: torch's is in whole seconds, and files' times in few
    milliseconds.
    """
    if failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return 3, failure.timestamp
    if failure.exitcode < 0:
        return 2, failure.timestamp
    if not os.path.exists(failure.error_file):
        return 0, failure.timestamp
    with contextlib.suppress(KeyError, TypeError):  # another program's record
        return 1, float(failure.error_file_data["message"]["extraInfo"]["time"])
    return 1, failure.timestamp


class _Ending:
    """How long the ranks may take to end, once something has asked them to.

    A signal to this process is counted behind the launcher's back, through the descriptor to which
    Python writes signals' numbers: the launcher answers each by waiting half a minute anew. After
    the first one the ranks have `_STOP_LIMIT_S` to clean up; the second one is told so; the third
    one kills them.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.first_signal: int | None = None
        self.is_hurried = False
        self._say = say
        self._before = _children()
        self._deadline: float | None = None
        self._over = threading.Event()

    def ranks(self) -> set[int]:
        """Those that have not ended."""
        return {pid for pid in _children() - self._before if not _has_ended(pid)}

    def watch(self, signals: int) -> None:
        """For a thread: `signals` is where their numbers are read."""
        count = 0
        while True:
            left_s = None if self._deadline is None else self._deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                break
            if not select.select([signals], [], [], left_s)[0]:
                break
            numbers = os.read(signals, 1)
            if not numbers:
                return
            count += 1
            if count == 1:
                self.first_signal = numbers[0]
                self.ask()
            elif count == 2:
                limit = f"at most {_STOP_LIMIT_S:g} s"
                self._say(f"still cleaning up, {limit}; one more signal kills the ranks")
            else:
                self.is_hurried = True
                break
        _kill(_children() - self._before)
        self._over.set()

    def ask(self) -> None:
        """From now on the ranks' time counts."""
        if self._deadline is None:
            self._deadline = time.monotonic() + _STOP_LIMIT_S

    def stop_ranks(self) -> None:
        """Have all ranks end that are still there, and wait for them to clean up.

        The launcher loses those that it is starting when a signal comes, and leaves all as they are
        when a second one does.
        """
        remaining = self.ranks()
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.ask()
        assert self._deadline is not None
        while self.ranks() and time.monotonic() < self._deadline and not self._over.is_set():
            time.sleep(_LOOK_S)
        # Each rank leads a session of its own, so its process group goes with it.
        _kill(_children() - self._before)
        killed_at = time.monotonic()
        while self.ranks() and time.monotonic() < killed_at + _KILL_LIMIT_S:
            time.sleep(_LOOK_S)


@contextlib.contextmanager
def _no_child_left(say: Callable[[str], None]) -> Iterator[_Ending]:
    """On the way out end the ranks that are still there, and give the signals back.

    Signals that were ignored stay so, also for the ranks, whatever the launcher installs: they are
    blocked meanwhile, and the ranks, which inherit that, ignore them by `IGNORED_VARIABLE`.
    """
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    ignored = ignored_signals(_SIGNALS)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
    ending = _Ending(say)
    if not _PROC.joinpath("self").exists():
        say(f"packcast: warning: {_PROC} is not mounted here, so a stuck rank may be left behind")
    try:
        with (
            _environment(IGNORED_VARIABLE, " ".join(str(int(number)) for number in ignored)),
            _signals_watched(ending),
        ):
            try:
                yield ending
            finally:
                for number in _SIGNALS:  # counted, and nothing else
                    signal.signal(number, lambda _number, _frame: None)
                ending.stop_ranks()
    finally:
        for number, handler in handlers.items():
            # None: a handler that is not Python's own, which cannot be given back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _signals_watched(ending: _Ending) -> Iterator[None]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(
        target=ending.watch, args=(reader,), name="packcast-nproc", daemon=True
    )
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(writer)  # which the watcher sees as an end of file
        watcher.join()
        os.close(reader)


def _has_ended(pid: int) -> bool:
    """Whether a child has, without taking its exit status from the launcher."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _kill(pids: set[int]) -> None:
    for pid in pids:
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)


def _children() -> set[int]:
    """This process's children, from /proc; zombies too, whom nothing hurts."""
    children = set()
    for stat in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name, which may hold anything) state ppid ...
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                children.add(int(stat.parent.name))
    return children


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _silence(names: Sequence[str]) -> Iterator[None]:
    """Keep loggers and those below them from reaching any handler."""
    loggers = [logging.getLogger(name) for name in names]
    nowhere = logging.NullHandler()
    for logger in loggers:
        logger.addHandler(nowhere)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(nowhere)
            logger.propagate = True
