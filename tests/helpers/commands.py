"""Real packcast processes: a clean environment, output in files, bounded in time, none left over.

A rank that hangs fails its test with what it has said so far.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from packcast.units import MIB
from tests.helpers.forge import RANKS, REPOSITORY, Forked, fork
from tests.helpers.native import HELD_READS, built

HELD_DISK = Path(__file__).parent / "held_disk"
PACKCAST = (sys.executable, "-m", "packcast")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

# On a busy machine of two cores: four imports of torch, and a transfer of nothing.
TIMEOUT_S = 60.0

# What must not be in the environment, or a test would depend on who runs it.
_LEFTOVERS = re.compile(
    r"(PACKCAST|SLURM|TORCH|TORCHELASTIC|GLOO|NCCL|HELD|OMP|OMPI|PMI|PMIX|MPI)_.*"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|PYTHON.*|COLUMNS|CUDA_.*"
)
_MARK = "TEST_COMMANDS"
_NOISE = re.compile(
    r"Traceback \(most recent|^\[(rank|W|E|I|C)\d|terminate called|Exception raised from|frame #"
    r"|Warning:|Exception ignored|C\+\+ CapturedTraceback",
    re.MULTILINE,
)


def clean_environment() -> dict[str, str]:
    """Whoever's runs the tests, without what would change them."""
    kept = {name: value for name, value in os.environ.items() if not _LEFTOVERS.fullmatch(name)}
    return kept | {"OMP_NUM_THREADS": "1"}


# Of the process that is forked; not of a test, or each would have such a process of its own. The
# level of torch's log is what packcast sets, which has to be before torch is imported.
_BASE = clean_environment() | {"TORCH_CPP_LOG_LEVEL": "ERROR"}


_FIRST_PORT = 10_000
_MAX_CLAIMS = 64
_DICE = random.SystemRandom()  # a seed of hypothesis would give the same ports to all
_claims: list[socket.socket] = []


@dataclass(frozen=True, slots=True)
class HeldDisk:
    """A process's disk that stops until `release`: once `after` bytes were read from it, or with
    None where a directory is to be renamed, which is how a copy is published.
    """

    gate: Path
    after: int | None
    is_native: bool = True

    def release(self) -> None:
        """Let everything go on."""
        (self.gate / "open").touch()

    def environment(self) -> dict[str, str]:
        found = {"PYTHONPATH": str(HELD_DISK), "HELD_DISK": str(self.gate)}
        if self.after is not None:
            found["HELD_AFTER"] = str(self.after)
            pool = built("-include", str(HELD_READS)) if self.is_native else None
            # Without a compiler there is no native pool whose reads could be held.
            found |= {"PACKCAST_POOL": "python"} if pool is None else {"HELD_POOL": str(pool)}
        return found


@dataclass(frozen=True, slots=True)
class Ended:
    """What a process left behind."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one sentence of packcast's error, hint and all; asserts that it is said properly:
        once, on one or two lines, the last of all, without anybody's traceback.
        """
        assert self.returncode > 0, (self.returncode, self.stderr)
        assert not _NOISE.search(self.stderr), self.stderr
        _, opening, said = self.stderr.partition("packcast: error: ")
        assert opening, self.stderr
        first, *more = said.splitlines()
        assert not more or (len(more) == 1 and more[0].startswith("  ")), self.stderr
        return "\n".join([first, *more])

    @property
    def sentence(self) -> str:
        """The error without its hint."""
        return self.error.splitlines()[0]


class Command:
    """A process that was started; everything it says goes to files, so it never waits for us.

    With `base`, the environment of a process that has imported torch already, it is a fork of that.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        base: Mapping[str, str] | None,
        host: int | None = None,
        before: str = "",
    ) -> None:
        self.argv = list(argv)
        self.process: subprocess.Popen[bytes] | Forked
        self._stdout, self._stderr = Path(f"{output}.stdout"), Path(f"{output}.stderr")
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            if base is not None:
                files = self._stdout, self._stderr
                self.process = fork(self.argv, environment, base, *files, host, before)
                return
            self.process = subprocess.Popen(
                self.argv,
                cwd=REPOSITORY,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._stderr.read_text()

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        self.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def read_until(
        self, pattern: str | re.Pattern[str], timeout_s: float = TIMEOUT_S
    ) -> re.Match[str]:
        """The first match of `pattern` in its standard error, waited for."""
        deadline = time.monotonic() + timeout_s
        while True:
            has_ended = self.process.poll() is not None
            match = re.search(pattern, self.stderr)
            if match:
                return match
            if has_ended or time.monotonic() > deadline:
                pytest.fail(f"{self.argv} has not said {pattern}, but: {self.stderr}")
            time.sleep(0.01)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Its end, which has to come in time."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"{self.argv} has not ended in {timeout_s:g} s; it said: {self.stderr}")
        return Ended(code, self._stdout.read_text(), self.stderr)


class Commands:
    """The processes of one test; leaving the `with` ends them all, and whatever they started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = uuid.uuid4().hex
        self._commands: list[Command] = []
        self._ranks = folder / f"ranks-{self._mark}"
        self._ranks.mkdir()
        self._environment = clean_environment() | {_MARK: self._mark, RANKS: str(self._ranks)}

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        while alive := self.alive():
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for command in self._commands:
                command.process.poll()
        for command in self._commands:
            command.process.wait()

    def start(
        self,
        argv: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        disk: HeldDisk | None = None,
    ) -> Command:
        """Start a program; on `disk`, if given."""
        return self._start(argv, environment, disk, None)

    def start_warm(
        self,
        argv: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        disk: HeldDisk | None = None,
        host: int | None = None,
        before: str = "",
    ) -> Command:
        """The same for Python, where it saves seconds: torch is imported already. On `host`, a
        process of hosts.py, if given, and after the Python `before`, which sets limits.
        """
        return self._start(argv, environment, disk, _BASE, host, before)

    def run(
        self,
        argv: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Ended:
        """The same, and its end."""
        return self.start(argv, environment).wait(timeout_s)

    def packcast(
        self,
        *argv: str | Path,
        environment: Mapping[str, str] | None = None,
        disk: HeldDisk | None = None,
        before: str = "",
    ) -> Command:
        """Start `packcast ARGV`, warm."""
        return self.start_warm([*PACKCAST, *argv], environment, disk=disk, before=before)

    def start_ranks(
        self,
        *argvs: Sequence[str | Path],
        world_size: int | None = None,
        disks: Mapping[int, HeldDisk] | None = None,
    ) -> list[Command]:
        """Ranks 0, 1, ... of one launch as separate processes; rank 0 hosts the store.

        With a larger `world_size` the last ones are missing.
        """
        port = free_port()
        return [
            self.packcast(
                *argv,
                environment=rank_environment(rank, world_size or len(argvs), port),
                disk=(disks or {}).get(rank),
            )
            for rank, argv in enumerate(argvs)
        ]

    def start_program(
        self, world_size: int, *argv: str | Path, environment: Mapping[str, str] | None = None
    ) -> list[Command]:
        """Every rank of a Python program, `-m MODULE` or a file, and its arguments; warm."""
        port = free_port()
        return [
            self.start_warm(
                [sys.executable, *argv],
                rank_environment(rank, world_size, port) | dict(environment or {}),
            )
            for rank in range(world_size)
        ]

    def run_ranks(
        self,
        *argvs: Sequence[str | Path],
        world_size: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> list[Ended]:
        """The same, and their ends."""
        return wait_all(self.start_ranks(*argvs, world_size=world_size), timeout_s)

    def held_disk(self, after: int | None = 8 * MIB, *, is_native: bool = True) -> HeldDisk:
        """A disk for one process of this test, whose I/O threads are native where they can be."""
        gate = self._folder / f"gate-{after}"
        gate.mkdir()
        return HeldDisk(gate, after, is_native)

    def await_reached(self, disk: HeldDisk) -> None:
        """Until a process waits for its disk."""
        with suppress(AssertionError):
            eventually(
                lambda: (disk.gate / "reached").exists() or not self.alive(), "the held disk"
            )
        if not (disk.gate / "reached").exists():
            said = [(c.process.poll(), c.argv, c.stderr) for c in self._commands]
            pytest.fail(f"the disk was not reached; the processes: {said}")

    def alive(self) -> list[int]:
        """The processes of this test that have not ended, grandchildren too."""
        # The kernel shows of a fork's environment only what it was before.
        forks = {c.pid for c in self._commands if c.process.poll() is None}
        forks |= {pid for pid in self._forked_ranks() if _is_running(pid)}
        return sorted(forks | {pid for pid, _ in _environments(self._mark)})

    def pids(self) -> set[int]:
        """The same, and some that have ended; for any thread, since nobody is waited for."""
        forks = {*(command.pid for command in self._commands), *self._forked_ranks()}
        return forks | {pid for pid, _ in _environments(self._mark)}

    def _start(
        self,
        argv: Sequence[str | Path],
        environment: Mapping[str, str] | None,
        disk: HeldDisk | None,
        base: Mapping[str, str] | None,
        host: int | None = None,
        before: str = "",
    ) -> Command:
        output = self._folder / f"process-{len(self._commands)}"
        extra = (disk.environment() if disk else {}) | dict(environment or {})
        whole = self._environment | extra
        started = Command(list(map(str, argv)), whole, output, base, host, before)
        self._commands.append(started)
        return started

    def pid_of_rank(self, rank: int) -> int:
        """A rank that a launcher has started."""
        ranks = {environment.get("RANK"): pid for pid, environment in _environments(self._mark)}
        ranks |= {said: pid for pid, said in self._forked_ranks().items()}
        return ranks[str(rank)]

    def _forked_ranks(self) -> dict[int, str]:
        """Those that a fork's `--nproc` has started, by pid; see forge.py."""
        return {int(path.name): path.read_text() for path in self._ranks.iterdir()}


def run_warm(program: str, *argv: str | Path) -> Ended:
    """A program in a process of its own that has imported torch already, and its end."""
    with tempfile.TemporaryDirectory() as folder, Commands(Path(folder)) as commands:
        return commands.start_warm([sys.executable, "-c", program, *argv]).wait()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells its ranks, without an agent's store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def slurm_task(job: str, rank: int, world_size: int) -> dict[str, str]:
    """What Slurm sets for a task of a step on this host alone, of what packcast reads."""
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(world_size),
        "SLURM_NTASKS": str(world_size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def open_mpi_rank(launch: str, rank: int, world_size: int) -> dict[str, str]:
    """What Open MPI's mpirun sets for a rank on this host alone, of what packcast reads."""
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(world_size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(world_size),
        "PMIX_NAMESPACE": f"prterun-here-{launch}@1",
    }


def hydra_rank(rank: int, world_size: int) -> dict[str, str]:
    """What MPICH's and Intel MPI's mpiexec sets for a rank on this host alone."""
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": str(world_size),
        "MPI_LOCALRANKID": str(rank),
        "MPI_LOCALNRANKS": str(world_size),
    }


def free_port() -> int:
    """A port of loopback that is nobody's, nor becomes somebody's until a process listens there.

    It is none of those that the kernel gives to whoever asks for any, and other tests, also of
    other runs on this machine, see the claim.
    """
    while True:
        port = _DICE.randrange(_FIRST_PORT, _first_ephemeral_port())
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0packcast-test-port-{port}")
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        if len(_claims) > _MAX_CLAIMS:
            _claims.pop(0).close()
        return port


def _first_ephemeral_port() -> int:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return first if first >= 2 * _FIRST_PORT else 1 << 16


def wait_all(commands: Sequence[Command], timeout_s: float = TIMEOUT_S) -> list[Ended]:
    """The ends of all, within one time limit."""
    deadline = time.monotonic() + timeout_s
    return [command.wait(max(0.1, deadline - time.monotonic())) for command in commands]


def eventually(is_so: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait for something that has to happen."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited for {what} for {timeout_s:g} s"
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _environments(mark: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Living processes that carry the mark, and their environments; zombies have none."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError, UnicodeDecodeError):
            pairs = (pair.partition("=") for pair in path.read_text().split("\0"))
            environment = {name: value for name, _, value in pairs}
            if environment.get(_MARK) == mark:
                yield int(path.parent.name), environment
