"""How a command's process ends after another rank's failure, a signal or an error, on any thread.

Collectives, destroy and abort can hang for ever, so the main thread is not waited for: clean-ups
are registered here, and the process ends by `os._exit`. Imports no torch, not even late: another
thread may hold the import lock for the seconds that torch takes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Protocol

from packcast.errors import Interrupted, PackcastError
from packcast.launch.handover import received
from packcast.launch.launchers import detect_launch, launch_name
from packcast.launch.secret import local_folder

# Removing a checkpoint's files may take seconds; torchrun, Slurm and Kubernetes kill a process
# thirty seconds after their signal.
CLEAN_UP_LIMIT_S = 15.0
_PRINT_LIMIT_S = 1.0
_LOOK_LIMIT_S = 0.5
# The sender notifies the others before it exits, and waits up to 0.7 s for acknowledgement.
_VERDICT_WAIT_S = 1.2
_SAID_LASTS_S = 30.0
_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_PR_SET_PDEATHSIG = 1


class ExitHandler(Protocol):
    """Ends a transfer for a reason that its own thread may not notice.

    `error` is set by `leave`. `survives`: the process goes on after that.
    """

    error: PackcastError | None
    survives: bool

    def on_leave(
        self, clean_up: Callable[[], object], left: Callable[[], str | None] | None = None
    ) -> None:
        """Register a clean-up for `leave`; called at once if that was called already.

        `left` returns the path of what is not removed yet.
        """

    def on_abandon(self, free: Callable[[], object]) -> None:
        """Register what frees a failed or hanging transfer, if the process goes on without it."""

    def leave(self, error: PackcastError) -> None:
        """End the transfer; the first call decides. May not return."""

    def shield(self) -> None:
        """From now on an interrupt waits for the end, which is near."""


class ProcessExit:
    """The process's exit. The first call of `leave` decides; no call returns.

    `error` is its argument, for clean-ups that pass it on.
    """

    survives = False

    def __init__(
        self,
        printer: Callable[[PackcastError], None],
        *,
        say: Callable[[str], None] = lambda _text: None,
        limit_s: float = CLEAN_UP_LIMIT_S,
    ) -> None:
        self.error: PackcastError | None = None
        self._printer = printer
        self._say = say
        self._limit_s = limit_s
        self._first = threading.Lock()
        self._printing = threading.Lock()
        self._leaving = threading.Event()
        self._shielded = threading.Event()
        self._clean_ups: list[Callable[[], object]] = []
        self._lefts: list[Callable[[], str | None]] = []

    def on_leave(
        self, clean_up: Callable[[], object], left: Callable[[], str | None] | None = None
    ) -> None:
        """Register a clean-up; they run in this order, may raise, and should be quick.

        Called at once if this process is exiting already. `left` returns the path of what is not
        removed yet, which is printed if the clean-up does not finish.
        """
        if left is not None:
            self._lefts.append(left)
        self._clean_ups.append(clean_up)
        if self._leaving.is_set():
            clean_up()

    def on_abandon(self, free: Callable[[], object]) -> None:
        """Nothing: the process ends, and with it all memory."""

    def leave(self, error: PackcastError | None) -> NoReturn:
        """Record the error, clean up, print it and end the process with its exit code.

        Any thread. Without an error the exit code is 0. Clean-ups that take longer than the limit
        are left behind.
        """
        if not self._first.acquire(blocking=False):
            while True:
                time.sleep(3600)
        self.error = error
        self._leaving.set()
        if error is not None:
            record_failure(error)
        # Without a thread for the limit the clean-ups must end by themselves.
        with suppress(RuntimeError):
            threading.Thread(target=self._overrun, args=(error,), daemon=True).start()
        for clean_up in list(self._clean_ups):
            with suppress(BaseException):
                clean_up()
        self._print_and_exit(error)

    def shield(self) -> None:
        """After the point of no return: signals no longer end the process, except a third one."""
        self._shielded.set()

    @property
    def is_shielded(self) -> bool:
        """Whether a signal comes too late to stop anything."""
        return self._shielded.is_set()

    def ask_for_patience(self) -> None:
        """After a second signal: print what the process is doing, and how to end it at once."""
        doing = "publishing the copy" if self.is_shielded else "cleaning up"
        left = self._left()
        what = f", removing {', '.join(left)}" if left and not self.is_shielded else ""
        limit = "" if self.is_shielded else f", at most {self._limit_s:g} s"
        self._say(f"still {doing}{what}{limit}; one more signal ends this at once")

    def give_up(self, error: PackcastError) -> NoReturn:
        """End now; print what is left behind. The error of `leave` takes precedence."""
        self._leaving.set()
        self._exit_soon(self.error or error)

    def _left(self) -> list[str]:
        found: list[str] = []

        def look() -> None:
            for left in list(self._lefts):
                with suppress(Exception):
                    path = left()
                    if path is not None:
                        found.append(path)

        with suppress(RuntimeError):  # no thread can be started any more
            looking = threading.Thread(target=look, daemon=True)
            looking.start()
            looking.join(_LOOK_LIMIT_S)  # the disk may be what hangs
        return list(found)

    def wait_leaving(self, timeout_s: float) -> bool:
        """Whether `leave` has been called, after waiting up to `timeout_s`."""
        return self._leaving.wait(timeout_s)

    def _overrun(self, error: PackcastError | None) -> NoReturn:
        time.sleep(self._limit_s)
        self._exit_soon(error)

    def _exit_soon(self, error: PackcastError | None) -> NoReturn:
        # Standard error may be what hangs: a pipe that is full, its reader frozen.
        threading.Thread(target=self._print_and_exit, args=(error,), daemon=True).start()
        time.sleep(_PRINT_LIMIT_S)
        os._exit(_exit_code(error))

    def _print_and_exit(self, error: PackcastError | None) -> NoReturn:
        if self._printing.acquire(blocking=False):
            with suppress(BaseException):
                for path in self._left() if error is not None else ():
                    folder = os.path.dirname(path)
                    self._say(f"{path} is left behind: `packcast clean --yes {folder}` removes it")
                if error is not None:
                    self._printer(error)
            self.exit(_exit_code(error))
        time.sleep(_PRINT_LIMIT_S)
        os._exit(_exit_code(error))

    def exit(self, code: int) -> NoReturn:
        """End the process without the interpreter's teardown, which stuck threads could block."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(BaseException):
                stream.flush()
        os._exit(code)


def record_failure(error: PackcastError) -> None:
    """Record the error for the launcher, which looks for the root cause; nothing without one.

    For torchrun as torch's `ErrorHandler.record_exception` does (torch/distributed/elastic/
    multiprocessing/errors/error_handler.py), with the message as the "call stack", which torchrun
    prints, and with the exit code, which it flattens. A signal is not recorded: torchrun sends
    one to all other ranks. `--nproc` knows whom it signals, and gets every error.
    """
    handover = received()
    if handover is not None:
        handover.record_failure(error)
        return
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or isinstance(error, Interrupted):
        return
    sentence = f"{error.message} ({error.hint})" if error.hint else error.message
    record = {
        "message": {
            "message": f"{type(error).__name__}: {error.message}",
            "extraInfo": {
                "py_callstack": sentence,
                "timestamp": str(int(time.time())),
                "time": time.time(),  # ours: a victim's record is a millisecond later
                "exit_code": error.exit_code,
            },
        }
    }
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(record, file)


def said_here(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file in which this launch's ranks on this host note errors that one of them has printed.

    Beside the error files of torchrun, whose folders are `attempt_0/<local rank>`, and which
    removes them. Slurm and mpirun have no such folder: then it is in a folder of the user's for
    temporary files, and is valid for as long as ranks need to end one after the other.
    """
    handover = received()
    if handover is not None:
        return handover.said
    error_file = environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        return Path(error_file).parent.parent / "packcast-said"
    try:
        launch = detect_launch(environ)
        name = launch_name(launch, environ)
        return _fresh(local_folder(), f"said-{name}") if name else None
    except (OSError, PackcastError):
        return None  # the launcher's variables may be what is wrong


def _fresh(folder: Path, name: str) -> Path:
    """The file of that name in the folder, where what earlier ones have said is forgotten."""
    for old in folder.glob("said-*"):
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _SAID_LASTS_S:
                old.unlink()
    return folder / name


def ignored_signals(numbers: Iterable[signal.Signals]) -> set[signal.Signals]:
    """Those that are ignored, as after nohup."""
    return {number for number in numbers if signal.getsignal(number) is signal.SIG_IGN}


def watch_signals(exit_handler: ProcessExit, *, patient: bool = False) -> None:
    """Take SIGINT, SIGTERM and SIGHUP on a thread of its own, from now on.

    What was ignored when the process started stays so. The first signal ends the process by
    `leave`, the second one waits for that and says so, the third one ends it at once; but where
    `patient` all wait, as in ranks of `--nproc`, which counts the signals and sends on the first.

    Python's handlers run in the main thread only, which may be waiting inside a collective. Call
    this from the main thread before any other thread is started: threads inherit the mask, and
    one without it would be given the signal. So would a child process inherit it and ignore
    SIGTERM: one that is started later must unblock these signals itself.
    """
    assert threading.current_thread() is threading.main_thread()
    # A signal that is blocked is kept for sigwait although it is ignored.
    watched = _SIGNALS - ignored_signals(_SIGNALS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS - watched)
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    threading.Thread(
        target=_take_signals,
        args=(exit_handler, watched, patient),
        name="packcast-signals",
        daemon=True,
    ).start()


def die_with_parent(launcher_pid: int | None = None) -> None:
    """Have the kernel end this process, by SIGTERM, when the one that started it ends.

    For ranks of torchrun or --nproc, which leave their ranks behind when they are killed. Call it
    in the main thread, early. With `launcher_pid` a launcher that has already gone is noticed
    too. The kernel means the parent's *thread*: launchers start ranks from their main thread.
    """
    parent = launcher_pid or os.getppid()
    # An ignored SIGTERM would not end it; `packcast clean` removes what a killed rank leaves.
    number = signal.SIGKILL if ignored_signals({signal.SIGTERM}) else signal.SIGTERM
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _take_signals(exit_handler: ProcessExit, watched: set[signal.Signals], patient: bool) -> None:
    count = 0
    while watched:
        number = signal.sigwait(watched)
        count += 1
        # On a thread of its own: each of these may hang, as a terminal can.
        if patient or count == 1:
            # torchrun sends SIGTERM to all as soon as one rank has failed: wait for the cause,
            # which arrives over the control channel at the same time. --nproc has waited.
            wait_s = _VERDICT_WAIT_S if number == signal.SIGTERM and not patient else 0.0
            threading.Thread(
                target=_leave_on, args=(exit_handler, number, wait_s), daemon=True
            ).start()
        elif count == 2:
            threading.Thread(target=exit_handler.ask_for_patience, daemon=True).start()
        else:
            threading.Thread(target=exit_handler.give_up, args=(_interrupted(number),)).start()


def _interrupted(number: int) -> Interrupted:
    name = signal.Signals(number).name
    return Interrupted(f"interrupted by {name}", signal_number=number)


def _leave_on(exit_handler: ProcessExit, number: int, wait_s: float) -> None:
    if exit_handler.wait_leaving(wait_s) or exit_handler.is_shielded:
        return
    exit_handler.leave(_interrupted(number))


def _exit_code(error: PackcastError | None) -> int:
    return 0 if error is None else error.exit_code
