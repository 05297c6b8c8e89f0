"""Strangers at the door of a running launch, all at once, until they are told to go.

They know what is public: the frames' shape, the kinds of messages, the store's protocol and the
names of the keys. They have no token. Black box: nothing of packcast is imported.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from tests.helpers.sockets import Listening, listening

if TYPE_CHECKING:
    from torch._C._distributed_c10d import PrefixStore, TCPStore

_SILENT_AT_ONCE = 40
_PAUSE_S = 0.02
_CONNECT_S = 1.0
_REPLY_S = 0.3
_SPOIL_EVERY_S = 1.0
_OURS = re.compile(r"(.*packcast/\d+/\d+)/")
_SENTENCE = "a stranger says that this is over"

_CHALLENGE, _PROOF, _ACCEPTED, _HEARTBEAT = 1, 2, 3, 5  # kinds of fixed layout
_MESSAGES = range(16, 40)  # kinds of messages in JSON


def frame(kind: int, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + bytes([kind]) + body


def said(kind: int, **message: object) -> bytes:
    return frame(kind, json.dumps(message, separators=(",", ":")).encode())


def first_words() -> list[bytes]:
    """What strangers say: one thing on each connection."""
    info = {"role": "recv", "rank": 1, "host": "stranger", "boot_id": "x", "pid": 1}
    wrong = {n: frame(_PROOF, n.to_bytes(2, "big") + os.urandom(64)) for n in (0, 1, 3, 4, 5, 99)}
    anything = {
        "info": info, "heartbeat_timeout_s": 3.0, "code": 5, "message": _SENTENCE, "hint": None,
    }  # fmt: skip
    return [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
        os.urandom(4096),
        b"\xff\xff\xff\xff\xff" + bytes(65536),  # a frame of 4 GiB
        (1 << 30).to_bytes(4, "big") + bytes([_PROOF]) + bytes(65536),
        (0).to_bytes(4, "big"),
        frame(_PROOF, b""),
        frame(_PROOF, bytes(65)),
        frame(_CHALLENGE, b"packcast" + bytes(40)),
        frame(_ACCEPTED, bytes(32)),
        frame(_HEARTBEAT, bytes(32)),
        *wrong.values(),
        *(said(kind, **anything) for kind in _MESSAGES),
        *(wrong[4] + said(kind, **anything) for kind in _MESSAGES),
        b"[" * 10_000,
        frame(_MESSAGES[0], b"[" * 10_000),
    ]


class Strangers:
    """From `with` until its end. `pids` are the processes of the launch, as they come and go.

    `counts` is how often each thing was done, `seen` what the processes listened on. What torch
    and gloo open on the way is not attacked.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self.counts: Counter[str] = Counter()
        self.seen: set[Listening] = set()
        self._pids = pids
        self._agents: set[int] = set()
        self._store_port: int | None = None
        self._doors: dict[int, str] = {}  # port -> address, of the control channel
        self._over = threading.Event()
        self._silent: list[socket.socket] = []
        self._prefixes = {"packcast/0/0"}  # of ranks without an agent
        self._spoilt_at = 0.0
        self._recorded: list[bytes] = []
        bodies = (self._watch, self._talk, self._replay, self._stay_silent, self._set_keys)
        self._threads = [threading.Thread(target=body, daemon=True) for body in bodies]

    def know(self, *, store_port: int | None, agents: Iterable[int]) -> None:
        """The launcher's store, where its port is no secret; and torchrun's own processes."""
        self._store_port = store_port
        self._agents = set(agents)

    @property
    def seen_of_ranks(self) -> set[Listening]:
        """What processes listened on that are not torchrun's own."""
        return {each for each in self.seen if each.pid not in self._agents}

    def __enter__(self) -> Strangers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(10)
        for sock in self._silent:
            sock.close()

    def _watch(self) -> None:
        """Which doors there are: the first that a process opens and that speaks frames."""
        while not self._over.wait(_PAUSE_S):
            found = listening(self._pids())
            self.seen |= found
            for each in found:
                if each.port in self._doors:
                    continue
                if each.pid in self._agents:
                    self._store_port = self._store_port or each.port
                elif each.port != self._store_port and _speaks_frames(each):
                    self._doors[each.port] = each.address

    def _connect(self) -> socket.socket | None:
        for port, address in list(self._doors.items()):
            host = "127.0.0.1" if address in ("0.0.0.0", "::") else address
            with suppress(OSError):
                sock = socket.create_connection((host, port), _CONNECT_S)
                sock.settimeout(_REPLY_S)
                return sock
        return None

    def _talk(self) -> None:
        words = first_words()
        while not self._over.wait(_PAUSE_S):
            sock = self._connect()
            if sock is None:
                continue
            with sock, suppress(OSError):
                said = words[self.counts["first words"] % len(words)]
                self.counts["first words"] += 1
                sock.sendall(said)
                sock.recv(65536)

    def _replay(self) -> None:
        """Say to the sender what it has said itself, and what a worker might have."""
        while not self._over.wait(_PAUSE_S):
            sock = self._connect()
            if sock is None:
                continue
            with sock, suppress(OSError):
                heard = sock.recv(65536)
                self._recorded.append(heard)
                sock.sendall(self._recorded[self.counts["replays"] % len(self._recorded)])
                self.counts["replays"] += 1
                sock.recv(65536)

    def _stay_silent(self) -> None:
        while not self._over.wait(_PAUSE_S):
            if len(self._silent) >= _SILENT_AT_ONCE:
                self._silent.pop(0).close()
            sock = self._connect()
            if sock is not None:
                self._silent.append(sock)
                self.counts["silent"] += 1

    def _set_keys(self) -> None:
        """In the launcher's store, if there is one that can be reached: end it, redirect it."""
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        while not self._over.wait(_PAUSE_S):
            if self._store_port is None:
                continue
            with suppress(RuntimeError, OSError):
                socket.create_connection(("127.0.0.1", self._store_port), _CONNECT_S).close()
                limit = timedelta(seconds=2)
                store = TCPStore(
                    "127.0.0.1", self._store_port, None, False, limit, wait_for_workers=False
                )
                self._spoil_all(store)
                for prefix in list(self._prefixes):
                    self._spoil(PrefixStore(prefix, store))

    def _spoil_all(self, store: TCPStore) -> None:
        """What a stranger finds who asks the store for its keys, which not every torch can."""
        if time.monotonic() < self._spoilt_at + _SPOIL_EVERY_S or not hasattr(store, "list_keys"):
            return
        self._spoilt_at = time.monotonic()
        for key in store.list_keys():
            if found := _OURS.match(key):
                self._prefixes.add(found[1].lstrip("/"))
                store.set(key, "spoilt")
                self.counts["keys found"] += 1

    def _spoil(self, store: PrefixStore) -> None:
        failure = {"code": 5, "message": _SENTENCE, "hint": None}
        address = {"hosts": ["127.0.0.1"], "port": 1, "beside_store": False}
        told = {
            "failure": json.dumps(failure),
            "address": json.dumps(address),
            **{f"role/{rank}": role for rank in range(3) for role in ("send", "recv", "")},
            **{f"route/{rank}": "203.0.113.1" for rank in range(3)},
        }
        for _ in range(3):
            for key, value in told.items():
                if self._over.is_set():
                    return
                store.set(key, value)
                self.counts["keys"] += 1
            time.sleep(_PAUSE_S)


def _speaks_frames(door: Listening) -> bool:
    """Whether it greets as the control channel does: with its name."""
    host = "127.0.0.1" if door.address in ("0.0.0.0", "::") else door.address
    with suppress(OSError), socket.create_connection((host, door.port), _CONNECT_S) as sock:
        sock.settimeout(_REPLY_S)
        return b"packcast" in sock.recv(64)
    return False
