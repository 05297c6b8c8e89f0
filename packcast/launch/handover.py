"""What `--nproc` hands to each rank that it starts, by inheritance: a secret and descriptors.

The environment names only the number of a pipe, from which the rank reads the rest once. So no
store, no command line and no file has the secret, and unlike an environment variable it is not
handed on to what a rank starts, nor shown by whatever lists a process's environment.
"""

from __future__ import annotations

import json
import os
import secrets
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
_MAX_NBYTES = 4096  # fewer than a pipe holds, so that writing it waits for nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """One rank's. The descriptors are shared with the other ranks and closed with the process."""

    rank: int
    launcher_pid: int
    token: str
    port_fd: int  # rank 0 writes there where its control channel listens, the others read it
    failures_fd: int  # where a rank that fails says so: the first line is the root cause
    said_fd: int  # a file in memory: the errors that a rank has printed for all

    @property
    def said(self) -> Path:
        """By its path every process opens the file anew, so that a lock on it means something."""
        return Path(f"/proc/self/fd/{self.said_fd}")

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Those that the rank inherits."""
        return (self.port_fd, self.failures_fd, self.said_fd)

    def publish_port(self, port: int, num_workers: int) -> None:
        """Rank 0 says where it listens on loopback: one record for each of the others."""
        os.write(self.port_fd, port.to_bytes(_PORT_NBYTES) * num_workers)

    def await_port(self, timeout_s: float) -> int:
        """Where rank 0 listens. Raises RendezvousError at the time limit.

        If rank 0 has ended without a word this waits too: the launcher knows its reason, and ends
        this rank.
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
        """Tell the launcher, which looks for the first rank to do so."""
        with suppress(OSError):
            os.write(self.failures_fd, f"{self.rank} {error.exit_code}\n".encode())

    def write(self) -> int:
        """The end of a pipe from which it can be read, once; to be inherited and closed."""
        reader, writer = os.pipe()
        data = json.dumps(asdict(self)).encode()
        assert len(data) <= _MAX_NBYTES
        os.write(writer, data)
        os.close(writer)
        return reader


def new_token() -> str:
    """A secret for one launch."""
    return secrets.token_urlsafe(32)


_received: dict[str, Handover | None] = {}  # by descriptor: each can be read only once


def received(environ: Mapping[str, str] = os.environ) -> Handover | None:
    """What this process was handed, if `--nproc` started it. The main thread asks first."""
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
            os.set_inheritable(each, False)  # what this rank starts is not part of the launch
    except (OSError, ValueError, TypeError):
        return None  # what started this process has inherited the variable only
    os.close(fd)
    return handover
