"""Many workers in one process, as light as they can be, for the simulation of a large group.

Each has a connection of its own and does what the protocol asks of a worker: the proof, HELLO,
heartbeats. Orders come on standard input, a line each; answers go to standard output, as JSON.
"""

from __future__ import annotations

import json
import random
import selectors
import socket
import sys
import time
from collections import deque
from contextlib import suppress

from packcast.control import auth
from packcast.control.frames import (
    ACCEPTED,
    CHALLENGE,
    HEARTBEAT,
    PROOF,
    FrameReader,
    Progress,
    frame_of,
    heartbeat_frame,
)
from packcast.control.messages import Abort, Hello, Joined, OfferMessage, Welcome, decode
from packcast.control.rank_info import RankInfo

TOKEN = b"a token"
RANKS_ON_HOST = 8
ANYTHING = dict.fromkeys(range(256), 1 << 30)


class LightWorkers:
    """Ranks `first` to `first + count - 1`, eight of them on each (loopback) address."""

    def __init__(self, port: int, first: int, count: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._retries: list[tuple[float, int]] = [
            (0.0, rank) for rank in range(first, first + count)
        ]
        self._wanted = count
        self._beats: deque[tuple[float, socket.socket]] = deque()
        self._interval_s = 1.0
        self._proofs: dict[socket.socket, tuple[auth.Challenge, auth.Proof]] = {}
        self.socks: set[socket.socket] = set()
        self.num_tries = self.num_joined = self.num_offered = self.num_told = self.num_lost = 0

    def run(self) -> None:
        frame = heartbeat_frame(Progress(1, 1))
        while self.num_told + self.num_lost < self._wanted:
            for key, _ in self._selector.select(0.02):
                if key.data is None:
                    self._take_order(sys.stdin.readline().strip())
                else:
                    self._read(key.fileobj, *key.data)
            now = time.monotonic()
            while self._beats and self._beats[0][0] <= now:
                due, sock = self._beats.popleft()
                with suppress(OSError):
                    sock.send(frame)
                if sock in self.socks:
                    self._beats.append((due + self._interval_s, sock))
            retries, self._retries = self._retries, []
            for at, rank in retries:
                if at > now:
                    self._retries.append((at, rank))
                else:
                    self._connect(rank)
        say(event="told", at=time.monotonic(), told=self.num_told, lost=self.num_lost)

    def _take_order(self, order: str) -> None:
        if order == "die":
            say(event="died", at=time.monotonic())
            sock = next(iter(self.socks))
            self._forget(sock)
            self.num_lost += 1

    def _connect(self, rank: int) -> None:
        self.num_tries += 1
        host = rank // RANKS_ON_HOST
        sock = socket.socket()
        sock.bind((f"127.{1 + host // 65536}.{host // 256 % 256}.{host % 256}", 0))
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", self._port))
        self._selector.register(sock, selectors.EVENT_READ, (rank, FrameReader(ANYTHING)))

    def _forget(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._proofs.pop(sock, None)
        self.socks.discard(sock)
        sock.close()

    def _read(self, sock: socket.socket, rank: int, reader: FrameReader) -> None:
        try:
            data = sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            if sock in self.socks:
                self.num_lost += 1
            else:
                self._retries.append((time.monotonic() + random.uniform(0.2, 1.0), rank))
            self._forget(sock)
            return
        reader.feed(data)
        while sock.fileno() >= 0 and (frame := reader.next_frame()) is not None:
            if frame[0] != HEARTBEAT:
                self._on_frame(sock, rank, *frame)

    def _on_frame(self, sock: socket.socket, rank: int, kind: int, body: bytes) -> None:
        if kind == CHALLENGE:
            challenge = auth.Challenge.parse(body)
            proof = auth.Proof.new(TOKEN, challenge)
            self._proofs[sock] = challenge, proof
            sock.send(frame_of(PROOF, proof.body))
        elif kind == ACCEPTED:
            challenge, proof = self._proofs.pop(sock)
            assert proof.is_answered(body, TOKEN, challenge)
            host = f"host-{rank // RANKS_ON_HOST}"
            me = RankInfo(role="recv", rank=rank, host=host, boot_id=host, pid=rank)
            sock.send(Hello(info=me, heartbeat_timeout_s=3.0).encode())
        elif kind == Welcome.kind:
            welcome = decode(kind, body)
            assert isinstance(welcome, Welcome)
            self._interval_s = welcome.heartbeat_interval_s
            self.socks.add(sock)
            self._beats.append((time.monotonic() + self._interval_s, sock))
        elif kind == Joined.kind:
            self.num_joined += 1
            if self.num_joined == self._wanted:
                say(event="joined", at=time.monotonic(), tries=self.num_tries)
        elif kind == OfferMessage.kind:
            self.num_offered += 1
            if self.num_offered == self._wanted:
                say(event="offered", at=time.monotonic())
        elif kind == Abort.kind:
            self.num_told += 1
            self._forget(sock)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    workers = LightWorkers(*map(int, sys.argv[1:]))
    say(event="ready")
    sys.stdin.readline()
    workers.run()
