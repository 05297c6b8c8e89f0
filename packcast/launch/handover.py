"""What each rank inherits from `--nproc`: a secret and descriptors.

The environment has only the number of a pipe, from which the rank reads the rest once. So the
secret is in no store, command line, file or environment, and is not inherited by what a rank
starts.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from packcast.errors import PackcastError, RendezvousError
from packcast.units import format_duration

# The number of the descriptor from which a rank reads its handover.
HANDOVER_VARIABLE = "PACKCAST_LAUNCH_FD"

LOOPBACK = "127.0.0.1"

_PORT_NBYTES = 2
_MAX_NBYTES = 4096  # fewer than a pipe holds, so that writing never blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """One rank's; the descriptors are shared with the other ranks and closed with the process."""

    rank: int
    launcher_pid: int
    token: str
    port_fd: int  # rank 0 writes its control channel's port, the others read it
    failures_fd: int  # failed ranks write here: the first line is the root cause
    said_fd: int  # a file in memory: the errors that a rank has printed for all

    @property
    def said(self) -> Path:
        """A path, so that every process opens the file anew and can lock it."""
        return Path(f"/proc/self/fd/{self.said_fd}")

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The inherited ones."""
        return (self.port_fd, self.failures_fd, self.said_fd)

    def publish_port(self, port: int, num_workers: int) -> None:
        """On rank 0: one record for each of the others."""
        os.write(self.port_fd, port.to_bytes(_PORT_NBYTES) * num_workers)

    def await_port(self, timeout_s: float) -> int:
        """The port of rank 0, on loopback. Raises RendezvousError at the time limit.

        This also waits if rank 0 has ended: the launcher knows why, and ends this rank.
        """
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if not select.select([self.port_fd], [], [], left_s)[0]:
                continue
            record = os.read(self.port_fd, _PORT_NBYTES)
            if record:
                return int.from_bytes(record)
            time.sleep(min(left_s, 0.1))
        raise RendezvousError(
            f"rank 0 did not say which port it listens on within {format_duration(timeout_s)}"
        )

    def record_failure(self, error: PackcastError) -> None:
        """For the launcher, which takes the first one as the root cause."""
        with suppress(OSError):
            os.write(self.failures_fd, f"{self.rank} {error.exit_code}\n".encode())

    def write(self) -> int:
        """A pipe from which the rank reads this once; to be inherited and closed."""
        reader, writer = os.pipe()
        data = json.dumps(asdict(self)).encode()
        assert len(data) <= _MAX_NBYTES
        os.write(writer, data)
        os.close(writer)
        return reader


_received: dict[str, Handover | None] = {}  # by descriptor: each can be read only once


def received(environ: Mapping[str, str] = os.environ) -> Handover | None:
    """This process's handover, if `--nproc` started it. The main thread must call this first."""
    number = environ.get(HANDOVER_VARIABLE, "")
    if number not in _received:
        _received[number] = _read(int(number)) if number.isdecimal() else None
    return _received[number]


def _read(fd: int) -> Handover | None:
    try:
        if not select.select([fd], [], [], 0)[0]:  # it was written before this process began
            return None
        handover = Handover(**json.loads(os.read(fd, _MAX_NBYTES)))
        for each in handover.descriptors:
            os.set_inheritable(each, False)  # not for what this rank starts
    except (OSError, ValueError, TypeError):
        return None  # this process has inherited the variable only
    os.close(fd)
    return handover
