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
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packcast.errors import TransferError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Where a rank finds the process that started it, to die with it even if that is gone already.
LAUNCHER_PID_VARIABLE = "PACKCAST_LAUNCHER_PID"
# And a file in which the ranks note what they have said, so that one of them says it for all.
SAID_VARIABLE = "PACKCAST_SAID_FILE"

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_NOISY_LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher")
# A rank cleans up within six seconds (see leave.py), then it is stuck.
_STOP_LIMIT_S = 10.0
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
) -> int:
    """Run `command + argv` as `nproc` ranks and return the exit code of the whole.

    Main thread only, signals not blocked (the ranks would inherit that). Output passes through.
    0 if all succeeded; the root cause's own code where ranks failed; 5 where a signal killed it;
    128 plus the number of a signal that ended this process. No rank outlives the call, nor this
    process if the ranks call `die_with_parent`. `say` gets the one sentence that no rank can say:
    that it was killed. `verbose` lets the launcher's own log through.
    """
    import torch.distributed.launcher.api as launcher
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with (
        tempfile.TemporaryDirectory(prefix="packcast-nproc-") as log_dir,
        _no_child_left(),
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
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
        )
        entrypoint, *arguments = [*command, *argv]
        # The launcher fills in $local_rank and halves every $$; no shell and no path means that.
        escaped = [argument.replace("$", "$$") for argument in arguments]
        try:
            launcher.elastic_launch(config, entrypoint)(*escaped)
        except ChildFailedError as failed:
            return _exit_code(failed.failures, say)
        except SignalException as stopped:
            return 128 + stopped.sigval
        except KeyboardInterrupt:  # before the launcher had its handlers
            return 128 + signal.SIGINT
        return 0


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


@contextlib.contextmanager
def _no_child_left() -> Iterator[None]:
    """On the way out kill the ranks that are still there, and give the signals back.

    The launcher loses its ranks if a signal comes while it is starting them. Each rank leads a
    session of its own, so its process group goes with it.
    """
    before = _children()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        with _stubborn_children_killed(before):
            yield
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _kill(_children() - before)
        for number, handler in handlers.items():
            # None: a handler that is not Python's own, which cannot be given back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _stubborn_children_killed(before: set[int]) -> Iterator[None]:
    """A second signal kills the ranks at once, and so does a while after the first.

    The launcher answers every signal by waiting half a minute for its ranks, anew. So signals are
    counted behind its back, through the descriptor to which Python writes their numbers.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        if os.read(reader, 1):
            select.select([reader], [], [], _STOP_LIMIT_S)
            _kill(_children() - before)

    watcher = threading.Thread(target=watch, name="packcast-nproc", daemon=True)
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(writer)  # which the watcher sees as an end of file
        watcher.join()
        os.close(reader)


def _kill(pids: set[int]) -> None:
    for pid in pids:
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)


def _children() -> set[int]:
    """This process's children, from /proc; zombies too, whom nothing hurts."""
    children = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
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
