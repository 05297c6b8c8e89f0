"""A large group, simulated: the real server of the control channel, and light workers around it.

    python -m tests.control.simulate 10000 [--strangers 10000] [--offer-mib 12]

Prints what joining, heartbeats, an offer and a death cost. The server is this process, with a core
of its own; the workers are in two others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packcast.control.acceptor import listen, raise_descriptor_limit
from packcast.control.messages import OfferMessage
from packcast.control.rank_info import RankInfo
from packcast.control.server import ControlServer
from packcast.errors import PackcastError, TransferError
from tests.control.light_workers import TOKEN

_NUM_PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured; seconds, and the share of one processor that the server took."""

    workers: int
    join_s: float
    tries: int  # connections that the workers made until all were in
    join_processor_s: float
    offer_s: float
    offer_nbytes: int
    heartbeat_processors: float
    told_s: float  # from a worker's death until the last one has heard of it
    told: int
    peak_nbytes: int
    log: list[str]


class _Workers:
    """A process of light workers."""

    def __init__(self, port: int, first: int, count: int) -> None:
        argv = [sys.executable, "-m", "tests.control.light_workers", str(port), str(first)]
        self._process = subprocess.Popen(
            [*argv, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, order: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()

    def hear(self, event: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the light workers have ended"
        told: dict[str, Any] = json.loads(line)
        assert told["event"] == event, told
        return told

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def strangers(address: tuple[str, int], count: int) -> Iterator[None]:
    """This many silent connections from one address, made as fast as they can be."""
    script = (
        "import resource, selectors, socket, sys\n"
        "port, count = map(int, sys.argv[1:])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(7)[1],) * 2)\n"
        "kept = []\n"
        "for _ in range(count):\n"
        "    kept.append(sock := socket.socket()); sock.setblocking(False)\n"
        "    sock.connect_ex(('127.0.0.1', port))\n"
        "print('there', flush=True); sys.stdin.read()\n"
    )
    crowd = subprocess.Popen(
        [sys.executable, "-c", script, str(address[1]), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert crowd.stdout is not None
        if count:
            crowd.stdout.readline()
        yield
    finally:
        crowd.kill()
        crowd.communicate()


def simulate(
    num_workers: int, *, num_strangers: int = 0, offer_nbytes: int = 100_000, watch_s: float = 5.0
) -> Figures:
    """A group from its beginning to a worker's death; `watch_s` of heartbeats in between."""
    raise_descriptor_limit()
    failed = threading.Event()
    log: list[str] = []

    def on_failure(_: PackcastError) -> None:
        failed.set()

    with ExitStack() as stack:
        server = ControlServer(
            frozenset(range(num_workers + 1)),
            listener=listen("127.0.0.1", 0),
            me=RankInfo(role="send", rank=0, host="sender", boot_id="sender", pid=1),
            transfer_id="simulation",
            token=TOKEN,
            heartbeat_timeout_s=3.0,
            on_failure=on_failure,
            log=log.append,
        )
        stack.callback(server.close)
        share = -(-num_workers // _NUM_PROCESSES)
        groups = [
            _Workers(server.address[1], first, min(share, num_workers + 1 - first))
            for first in range(1, num_workers + 1, share)
        ]
        for group in groups:
            stack.callback(group.close)
            group.hear("ready")
        stack.enter_context(strangers(server.address, num_strangers))

        began, used = time.monotonic(), _processor_s()
        for group in groups:
            group.tell("go")
        server.join(300.0, lambda *_: None)
        joined = [group.hear("joined") for group in groups]
        join_processor_s = _processor_s() - used

        offered_at = time.monotonic()
        server.broadcast(OfferMessage.of(os.urandom(offer_nbytes)))
        try:
            offered = [group.hear("offered") for group in groups]
        except AssertionError:
            raise (server.failure or RuntimeError("the light workers failed")) from None

        time.sleep(0.5)
        used = _processor_s()
        time.sleep(watch_s)
        heartbeat_processors = (_processor_s() - used) / watch_s
        assert server.failure is None, server.failure

        groups[0].tell("die")
        died_at = groups[0].hear("died")["at"]
        told = [group.hear("told") for group in groups]
        assert failed.wait(10)
        assert isinstance(server.failure, TransferError)
        return Figures(
            workers=num_workers,
            join_s=max(event["at"] for event in joined) - began,
            tries=sum(event["tries"] for event in joined),
            join_processor_s=join_processor_s,
            offer_s=max(event["at"] for event in offered) - offered_at,
            offer_nbytes=offer_nbytes,
            heartbeat_processors=heartbeat_processors,
            told_s=max(event["at"] for event in told) - died_at,
            told=sum(event["told"] for event in told),
            peak_nbytes=_peak_nbytes(),
            log=log,
        )


def delay_of_a_join(num_strangers: int) -> float:
    """How long one worker takes to join while so many silent strangers come."""
    return simulate(1, num_strangers=num_strangers, watch_s=0.1).join_s


def _processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_nbytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workers", type=int)
    parser.add_argument("--strangers", type=int, default=0)
    parser.add_argument("--offer-mib", type=float, default=0.1)
    given = parser.parse_args()
    figures = simulate(
        given.workers, num_strangers=given.strangers, offer_nbytes=int(given.offer_mib * 2**20)
    )
    print(json.dumps(asdict(figures), indent=2))
