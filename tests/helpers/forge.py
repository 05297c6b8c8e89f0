"""Processes without the seconds that torch takes to be imported: one imports it, all are its forks.

Both ends: `fork` asks from a test, `python -m tests.helpers.forge` answers. A fork is a process as
any other: a session, an environment and an exit of its own; packcast itself is imported there.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


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
) -> Forked:
    """Start `python -m MODULE ...` or `python FILE ...`, as `argv` says.

    `base` is the environment that torch was imported in: what it read then cannot be changed.
    """
    assert argv[0] == sys.executable
    forge = _forge(frozenset(base.items()))
    files = [os.devnull, str(stdout), str(stderr)]
    pid = forge.ask({"argv": argv[1:], "environment": dict(environment), "files": files})
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


def _become(argv: Sequence[str], environment: Mapping[str, str], files: Sequence[str]) -> None:
    """What the interpreter does between its start and the program."""
    os.setsid()
    for number, (path, flags) in enumerate(
        zip(files, [os.O_RDONLY, os.O_WRONLY, os.O_WRONLY], strict=True)
    ):
        descriptor = os.open(path, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if "HELD_DISK" in os.environ:
        importlib.import_module("tests.helpers.held_disk.sitecustomize")
    if "SLOW_DISK" in os.environ:
        importlib.import_module("tests.helpers.slow_disk")
    if argv[0] == "-m":
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    import torch.distributed

    assert torch.distributed.is_available()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would have only one of these threads"
    wanted = _serve()
    if wanted is not None:
        _become(**wanted)
