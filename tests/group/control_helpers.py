"""Hubs, lines and child processes for the tests of the control channel: real sockets and kills."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from packcast.errors import PackcastError
from packcast.group.hub import Hub
from packcast.group.line import Line
from packcast.group.member import Member
from packcast.group.wire import BEFORE_PROOF, PROTOCOL, FrameReader, Limits, encode_frame

PATIENCE_S = 20.0
ANYTHING = Limits(1 << 30)


def member(
    rank: int | None = None, *, role: str = "recv", host: str = "host-a", **more: Any
) -> Member:
    fields: dict[str, Any] = {"boot_id": "boot", "pid": os.getpid(), **more}
    return Member(role="send" if role == "send" else "recv", rank=rank, host=host, **fields)


def eventually(happened: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@dataclass
class Witness:
    """What one end told its owner."""

    fatal: list[PackcastError] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def on_fatal(self, error: PackcastError) -> None:
        self.threads.append(threading.current_thread())
        self.fatal.append(error)

    def wait_fatal(self) -> PackcastError:
        eventually(lambda: self.fatal)
        return self.fatal[0]


class Group:
    """A hub and some lines in this process, closed at the end of the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.seen = Witness()

    def hub(self, *, token: bytes | None = None, heartbeat_timeout_s: float = 3.0) -> Hub:
        hub = Hub(
            host="127.0.0.1",
            port=0,
            me=member(0, role="send", host="host-s"),
            transfer_id="transfer-1",
            token=token,
            heartbeat_timeout_s=heartbeat_timeout_s,
            on_fatal=self.seen.on_fatal,
            log=self.seen.log.append,
        )
        self._stack.callback(hub.close)
        return hub

    def line(
        self,
        hub: Hub | tuple[str, int],
        me: Member,
        *,
        token: bytes | None = None,
        heartbeat_timeout_s: float = 3.0,
        join_timeout_s: float = PATIENCE_S,
    ) -> tuple[Line, Witness]:
        seen = Witness()
        host, port = hub.address if isinstance(hub, Hub) else hub
        line = Line.connect(
            [host],
            port,
            me=me,
            token=token,
            join_timeout_s=join_timeout_s,
            heartbeat_timeout_s=heartbeat_timeout_s,
            on_fatal=seen.on_fatal,
            log=seen.log.append,
        )
        self._stack.callback(line.close)
        return line, seen

    def joined(
        self, num_workers: int, *, heartbeat_timeout_s: float = 3.0
    ) -> tuple[Hub, list[Line], list[Witness]]:
        """A hub and its workers, ranks 1 to `num_workers`, all joined."""
        hub = self.hub(heartbeat_timeout_s=heartbeat_timeout_s)
        with Joining(hub, num_workers) as joining:
            pairs = [
                self.line(
                    hub, member(rank, host=f"host-{rank}"), heartbeat_timeout_s=heartbeat_timeout_s
                )
                for rank in range(1, num_workers + 1)
            ]
        assert joining.error is None
        return hub, [line for line, _ in pairs], [seen for _, seen in pairs]


class Joining:
    """`hub.join` in a thread of its own, as the main thread of a sender would be in it."""

    def __init__(
        self, hub: Hub, expected: int | frozenset[int], deadline_s: float = PATIENCE_S
    ) -> None:
        self.members: tuple[Member, ...] = ()
        self.error: PackcastError | None = None
        self.arrivals: list[tuple[Member, int, int]] = []
        self._work = (hub, expected, deadline_s)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        hub, expected, deadline_s = self._work
        try:
            self.members = hub.join(
                expected, deadline_s, lambda *arrival: self.arrivals.append(arrival)
            )
        except PackcastError as error:
            self.error = error

    def __enter__(self) -> Joining:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


class Raw:
    """A peer that says what it likes."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, timeout=PATIENCE_S)
        self._reader = FrameReader(ANYTHING)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def say(self, kind: str, **fields: object) -> None:
        self.sock.sendall(encode_frame({"kind": kind, **fields}, ANYTHING))

    def hear(self, kind: str) -> dict[str, Any]:
        """The next message of this kind; others are skipped."""
        while True:
            message = self._reader.next_message()
            if message is None:
                data = self.sock.recv(65536)
                assert data, f"the connection ended before {kind}"
                self._reader.feed(data)
            elif message["kind"] == kind:
                return message

    def is_closed_by_peer(self) -> bool:
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def enter(self, me: Member) -> None:
        """A correct handshake, where no token is asked for."""
        self.hear("CHALLENGE")
        self.say("HELLO", protocol=PROTOCOL, nonce="0" * 64, member=me.to_json())
        self.hear("WELCOME")


def hello_frame(me: Member) -> bytes:
    return encode_frame(
        {"kind": "HELLO", "protocol": PROTOCOL, "nonce": "0" * 64, "member": me.to_json()},
        BEFORE_PROOF,
    )


_CHILD = """
import sys, threading
from packcast.group.line import Line
from packcast.group.hub import Hub
from packcast.group.member import Member
import os

def say(*words):
    print(*words, flush=True)

def on_fatal(error):
    say("FATAL", error.exit_code, error.message)

def me(rank, role="recv"):
    return Member(role=role, rank=rank, host=f"child-{rank}", boot_id="b", pid=os.getpid())

def line(port, rank, heartbeat_timeout_s):
    return Line.connect(["127.0.0.1"], port, me=me(rank), token=None, join_timeout_s=20,
        heartbeat_timeout_s=heartbeat_timeout_s, on_fatal=on_fatal, log=lambda text: None)
"""


class Child:
    """A Python process with `line(port, rank, heartbeat_timeout_s)` and `say` at hand."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def tell(self, line: str) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(line + "\n")
        stdin.flush()

    def hear(self) -> str:
        """Its next line; the pipe holds one line at a time in these tests."""
        stdout = self.process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], PATIENCE_S)
        assert ready, "the child says nothing"
        return stdout.readline().strip()
