"""Processes without the seconds that imports take: one imports torch and packcast, all fork it.

Both ends: `fork` asks from a test, `python -m tests.helpers.forge` answers. A fork is a process as
any other: a session, an environment and an exit of its own. The ranks that `--nproc` or torchrun
starts in a fork are forks of that.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).parents[2]
# A folder where each rank that a fork has started leaves a file: its pid, and in it its rank.
RANKS = "TEST_RANKS"

# Each imports much of what is below it; what they read of the environment, they read when called.
_IMPORTED = (
    "torch.distributed.run",
    "packcast.bench.measure",
    "packcast.cli.app",
    "packcast.cli.benchview",
    "packcast.cli.richview",
    "packcast.packed.compat",
    "packcast.transfer.api",
)
_real: list[tuple[object, str, object]] = []  # what a disk of the tests puts something else for


class Forked:
    """A fork, with the part of Popen's interface that tests need."""

    def __init__(self, forge: Forge, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._forge = forge

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forge.ask({"wait": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Forge:
    """The process that has imported torch."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forge"],
            cwd=REPOSITORY,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def ask(self, question: object) -> int | None:
        """One line there, one line back."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            stdin.write(json.dumps(question).encode() + b"\n")
            stdin.flush()
            answer: int | None = json.loads(stdout.readline())
            return answer

    def close(self) -> None:
        self._process.communicate()


@functools.cache
def _forge(environment: frozenset[tuple[str, str]]) -> Forge:
    forge = Forge(dict(environment))
    atexit.register(forge.close)
    return forge


def fork(
    argv: Sequence[str],
    environment: Mapping[str, str],
    base: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    host: int | None = None,
    before: str = "",
) -> Forked:
    """Start `python -m MODULE ...`, `python -c PROGRAM ...` or `python FILE ...`, as `argv` says.

    `base` is the environment that torch was imported in: what it read then cannot be changed.
    `host` is a process whose network, names and mounts the fork is to have. `before` is Python for
    what a shell would set first: limits, the umask, the control group.
    """
    assert argv[0] == sys.executable
    forge = _forge(frozenset(base.items()))
    files = [os.devnull, str(stdout), str(stderr)]
    options = {"host": host, "before": before}
    pid = forge.ask({"argv": argv[1:], "environment": dict(environment), "files": files, **options})
    assert pid is not None
    return Forked(forge, pid)


def _serve() -> dict[str, object] | None:
    """Answer until there are no more questions; in a fork, what it shall be."""
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            pid, status = os.waitpid(question["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return dict(question)
        print(json.dumps(answer), flush=True)
    return None


def _become(
    argv: Sequence[str],
    environment: Mapping[str, str],
    files: Sequence[str],
    host: int | None,
    before: str,
) -> None:
    """What the interpreter does between its start and the program."""
    os.setsid()
    for number, (path, flags) in enumerate(
        zip(files, [os.O_RDONLY, os.O_WRONLY, os.O_WRONLY], strict=True)
    ):
        descriptor = os.open(path, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if host is not None:
        _move_to(host)
    exec(before, {})
    _run(argv, environment)


def _move_to(host: int) -> None:
    """As `nsenter` does, and Python itself only from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    opened = [os.open(f"/proc/{host}/ns/{name}", os.O_RDONLY) for name in ("net", "uts", "mnt")]
    for descriptor in opened:
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)
    os.chdir(REPOSITORY)


def _run(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if "HELD_DISK" in os.environ:
        importlib.import_module("tests.helpers.held_disk.sitecustomize")
    if "SLOW_DISK" in os.environ:
        importlib.import_module("tests.helpers.slow_disk")
    if argv[0] == "-m":
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], {"__name__": "__main__"})
    else:
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")


class _Popen(subprocess.Popen[Any]):
    """What a fork starts processes with; a rank of `--nproc` or torchrun is a fork of it.

    `--nproc` has no thread then. torchrun's agent has, but none that knows more of a rank than its
    pid, and a rank never comes to the end of the agent's own objects.
    """

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        self._command, self._options = args, options
        super().__init__(args, *more, **options)

    def _execute_child(self, *args: Any, **options: Any) -> None:
        program = self._program_of_rank()
        if program is None:
            super()._execute_child(*args, **options)  # type: ignore[misc]
            return
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            if "-u" in self._command[1:2]:
                sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
            _leave_as(program, self._options["env"], self._options.get("pass_fds", ()))

    def _program_of_rank(self) -> list[str] | None:
        """What follows `python -P` or `python -u`, if that is to be a rank."""
        given = {name for name, value in self._options.items() if value is not None}
        if (
            given - {"pass_fds"} != {"env", "start_new_session"}
            or "RANK" not in self._options["env"]
        ):
            return None
        python, option, *program = self._command
        is_alone = len(os.listdir("/proc/self/task")) == 1
        is_rank = option == "-u" or (option == "-P" and is_alone)
        return program if is_rank and python == sys.executable else None


def _leave_as(argv: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]) -> NoReturn:
    """Be a rank to its end, and never come back into the launcher's own frames."""
    code = 1
    try:
        _become_rank(argv, environment, fds)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _become_rank(
    argv: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]
) -> None:
    """As if the launcher's program had not been there."""
    os.setsid()
    Path(environment[RANKS], str(os.getpid())).write_text(environment["RANK"])
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            is_sigint = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_sigint else signal.SIG_DFL)
    kept = {0, 1, 2, *descriptors}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    for module, name, value in _real:
        setattr(module, name, value)
    sys.modules["packcast.launch.handover"].__dict__["_received"].clear()
    for name in list(sys.modules):
        if name == "packcast.__main__" or name.startswith("tests.helpers."):
            del sys.modules[name]
    _run(argv, environment)


def _import_all() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    native = sys.modules["packcast.io.native"]
    for module, names in ((os, ("preadv", "pwrite", "rename")), (native, ("installed",))):
        _real.extend((module, name, getattr(module, name)) for name in names)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the pages of all that it looks at


if __name__ == "__main__":
    # Before torchrun's modules take the real one.
    vars(subprocess)["Popen"] = _Popen
    _import_all()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would have only one of these threads"
    wanted = _serve()
    if wanted is not None:
        _become(**wanted)
