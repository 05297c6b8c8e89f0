"""Servers, clients and child processes for the control channel's tests: real sockets and kills."""

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
from typing import Annotated, Any

from pydantic import Field

from packcast.control import auth
from packcast.control.acceptor import listen
from packcast.control.client import ControlClient
from packcast.control.frames import ACCEPTED, CHALLENGE, PROOF, PROTOCOL, FrameReader, frame_of
from packcast.control.handshake import enter
from packcast.control.messages import Hello, Message, Welcome, decode
from packcast.control.rank_info import RankInfo
from packcast.control.server import ControlServer
from packcast.errors import PackcastError
from packcast.units import MIB

PATIENCE_S = 20.0
ANYTHING = dict.fromkeys(range(256), 1 << 30)


class Ping(Message, kind=240, by="sender", limit=64 * MIB):
    """From the server, as large as one likes."""

    text: str = ""


class Pong(Message, kind=241, by="worker", limit=64 * MIB):
    """From a client."""

    number: Annotated[int, Field(ge=0, le=1000)] = 0


class Pang(Message, kind=242, by="worker"):
    """From a client, too."""


def info(
    rank: int | None = None, *, role: str = "recv", host: str = "host-a", **more: Any
) -> RankInfo:
    fields: dict[str, Any] = {"boot_id": "boot", "pid": os.getpid(), **more}
    return RankInfo(role="send" if role == "send" else "recv", rank=rank, host=host, **fields)


SENDER = info(0, role="send", host="host-s")


def eventually(happened: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@dataclass
class Witness:
    """What one end told its owner."""

    failures: list[PackcastError] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def on_failure(self, error: PackcastError) -> None:
        self.threads.append(threading.current_thread())
        self.failures.append(error)

    def wait_failure(self) -> PackcastError:
        eventually(lambda: self.failures)
        return self.failures[0]


class Group:
    """A server and some clients in this process, closed at the end of the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.seen = Witness()

    def server(
        self,
        expected: int | frozenset[int] = 1,
        *,
        port: int = 0,
        listener: socket.socket | None = None,
        token: bytes | None = None,
        heartbeat_timeout_s: float = 3.0,
    ) -> ControlServer:
        server = ControlServer(
            expected,
            listener=listener or listen("127.0.0.1", port),
            me=SENDER,
            transfer_id="transfer-1",
            token=token,
            heartbeat_timeout_s=heartbeat_timeout_s,
            on_failure=self.seen.on_failure,
            log=self.seen.log.append,
        )
        self._stack.callback(server.close)
        return server

    def client(
        self,
        server: ControlServer | tuple[str, int],
        me: RankInfo,
        *,
        hosts: list[str] | None = None,
        token: bytes | None = None,
        heartbeat_timeout_s: float = 3.0,
        join_timeout_s: float = PATIENCE_S,
        seen: Witness | None = None,
    ) -> tuple[ControlClient, Witness]:
        seen = seen or Witness()
        host, port = server.address if isinstance(server, ControlServer) else server
        entered = enter(
            hosts or [host],
            port,
            me=me,
            token=token,
            join_timeout_s=join_timeout_s,
            heartbeat_timeout_s=heartbeat_timeout_s,
            log=seen.log.append,
        )
        client = ControlClient(entered, on_failure=seen.on_failure, log=seen.log.append)
        self._stack.callback(client.close)
        return client, seen

    def joined(
        self, num_workers: int, *, heartbeat_timeout_s: float = 3.0
    ) -> tuple[ControlServer, list[ControlClient], list[Witness]]:
        """A server and its workers, ranks 1 to `num_workers`, all joined."""
        server = self.server(num_workers, heartbeat_timeout_s=heartbeat_timeout_s)
        with Joining(server) as joining:
            pairs = [
                self.client(
                    server,
                    info(rank, host=f"host-{rank}"),
                    heartbeat_timeout_s=heartbeat_timeout_s,
                )
                for rank in range(1, num_workers + 1)
            ]
        assert joining.error is None
        return server, [client for client, _ in pairs], [seen for _, seen in pairs]


class Joining:
    """`server.join` in a thread of its own, as the main thread of a sender would be in it."""

    def __init__(self, server: ControlServer, limit_s: float = PATIENCE_S) -> None:
        self.infos: tuple[RankInfo, ...] = ()
        self.error: PackcastError | None = None
        self.arrivals: list[tuple[RankInfo, int, int]] = []
        self._work = (server, limit_s)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        server, limit_s = self._work
        try:
            self.infos = server.join(limit_s, lambda *arrival: self.arrivals.append(arrival))
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
    """A client of the server that says what it likes."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, timeout=PATIENCE_S)
        self._reader = FrameReader(ANYTHING)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def say(self, message: Message) -> None:
        self.sock.sendall(message.encode())

    def hear(self, kind: int) -> bytes:
        """The next frame of this kind; others are skipped."""
        while True:
            frame = self._reader.next_frame()
            if frame is None:
                data = self.sock.recv(65536)
                assert data, f"the connection ended before {kind}"
                self._reader.feed(data)
            elif frame[0] == kind:
                return frame[1]

    def hear_message(self, kind: type[Message]) -> Any:
        return decode(kind.kind, self.hear(kind.kind))

    def is_closed_by_peer(self) -> bool:
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def prove(self, token: bytes | None = None, protocol: int = PROTOCOL) -> None:
        challenge = auth.Challenge.parse(self.hear(CHALLENGE))
        self.sock.sendall(frame_of(PROOF, auth.Proof.new(token, challenge, protocol).body))

    def enter(self, me: RankInfo, token: bytes | None = None) -> None:
        """A correct handshake."""
        self.prove(token)
        self.hear(ACCEPTED)
        self.say(Hello(info=me, heartbeat_timeout_s=3.0))
        self.hear(Welcome.kind)


_CHILD = """
import os, sys, threading
from packcast.control.acceptor import listen
from packcast.control.client import ControlClient
from packcast.control.handshake import enter
from packcast.control.server import ControlServer
from packcast.control.rank_info import RankInfo
from tests.control.helpers import Ping, Pong

def say(*words):
    print(*words, flush=True)

def on_failure(error):
    say("FAILED", error.exit_code, error.message)

def me(rank, role="recv"):
    return RankInfo(role=role, rank=rank, host=f"child-{rank}", boot_id="b", pid=os.getpid())

def client(port, rank, heartbeat_timeout_s):
    entered = enter(["127.0.0.1"], port, me=me(rank), token=None, join_timeout_s=20,
        heartbeat_timeout_s=heartbeat_timeout_s, log=lambda text: None)
    return ControlClient(entered, on_failure=on_failure, log=lambda text: None)

def server(expected, heartbeat_timeout_s):
    return ControlServer(expected, listener=listen("127.0.0.1", 0), me=me(0, "send"),
        transfer_id="t", token=None, heartbeat_timeout_s=heartbeat_timeout_s, on_failure=on_failure,
        log=lambda text: None)
"""


class Child:
    """A Python process with `client`, `server` and `say` at hand."""

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
