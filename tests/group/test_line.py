"""A worker's end: finding the sender, trusting it no further than it proves, and losing it."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from packcast.errors import CheckpointError, RendezvousError, TransferError
from packcast.group import auth, handshake
from packcast.group.hub import Hub
from packcast.group.line import Line
from packcast.group.wire import FROM_SENDER, PROTOCOL, FrameReader, encode_frame
from tests.group.control_helpers import (
    PATIENCE_S,
    Child,
    Group,
    Joining,
    Witness,
    eventually,
    member,
)

SENDER = member(0, role="send", host="host-s")


@pytest.fixture
def group() -> Iterator[Group]:
    with ExitStack() as stack:
        yield Group(stack)


class FakeSender:
    """A listening socket that does what a test tells it, for one connection."""

    def __init__(self, act: Callable[[FakeSender], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._reader = FrameReader(FROM_SENDER)
        self._act = act
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sock: socket.socket

    def _run(self) -> None:
        self.sock, _ = self._listener.accept()
        with self.sock:
            self.sock.settimeout(PATIENCE_S)
            # Closing over unread heartbeats resets the connection, and drops what Nagle held back.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._act(self)

    def __enter__(self) -> FakeSender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._listener.close()
        self._thread.join(PATIENCE_S)

    def say(self, kind: str, **fields: object) -> None:
        self.sock.sendall(encode_frame({"kind": kind, **fields}, FROM_SENDER))

    def hear(self) -> dict[str, object]:
        while (message := self._reader.next_message()) is None:
            self._reader.feed(self.sock.recv(65536))
        return message

    def stay(self) -> None:
        """Until the test is over."""
        self._leave.wait(PATIENCE_S)

    def challenge(self, *, token: bool = False, protocol: int = PROTOCOL) -> None:
        self.say("CHALLENGE", protocol=protocol, nonce="0" * 64, transfer="t", token=token)
        assert self.hear()["kind"] == "HELLO"

    def let_in(self) -> None:
        self.challenge()
        self.say("WELCOME", proof=None, member=SENDER.to_json())
        self.say("JOINED", rank=3, world_size=5)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# Finding the sender.


def test_a_worker_tries_every_address_that_may_be_the_senders(group: Group) -> None:
    hub = group.hub()
    port = hub.address[1]
    with socket.create_server(("127.0.0.2", port)) as other, Joining(hub, 1) as joining:

        def answer() -> None:
            with other.accept()[0] as sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(4096))

        threading.Thread(target=answer, daemon=True).start()
        seen = Witness()
        line = Line.connect(
            ["no-such-host.invalid", "127.0.0.3", "127.0.0.2", "127.0.0.1"],
            port,
            me=member(1),
            token=None,
            join_timeout_s=PATIENCE_S,
            heartbeat_timeout_s=3.0,
            on_fatal=seen.on_fatal,
            log=seen.log.append,
        )
        joining.wait()
        assert len(joining.members) == 2
        assert hub.host_met() == "127.0.0.1"
        line.close()


def test_where_nobody_is_every_address_is_named_and_why(group: Group) -> None:
    with pytest.raises(RendezvousError) as caught:
        Line.connect(
            ["no-such-host.invalid", "127.0.0.3"],
            free_port(),
            me=member(1),
            token=None,
            join_timeout_s=0.1,
            heartbeat_timeout_s=3.0,
            on_fatal=group.seen.on_fatal,
            log=group.seen.log.append,
        )
    assert "no sender at no-such-host.invalid:" in caught.value.message
    assert "its name cannot be resolved: " in caught.value.message
    assert "connection refused" in caught.value.message


def test_a_worker_may_start_before_its_sender(group: Group) -> None:
    port = free_port()
    me, seen = member(1), Witness()
    lines: list[Line] = []

    def connect() -> None:
        lines.append(
            Line.connect(
                ["127.0.0.1"],
                port,
                me=me,
                token=None,
                join_timeout_s=PATIENCE_S,
                heartbeat_timeout_s=3.0,
                on_fatal=seen.on_fatal,
                log=seen.log.append,
            )
        )

    worker = threading.Thread(target=connect)
    worker.start()
    eventually(lambda: seen.log)
    time.sleep(0.5)
    hub = Hub(
        host="127.0.0.1",
        port=port,
        me=SENDER,
        transfer_id="t",
        token=None,
        heartbeat_timeout_s=3.0,
        on_fatal=group.seen.on_fatal,
        log=group.seen.log.append,
    )
    assert len(hub.join(1, PATIENCE_S, lambda *_: None)) == 2
    worker.join(PATIENCE_S)
    assert len(seen.log) == 1
    assert seen.log[0].startswith(f"waiting for the sender at 127.0.0.1:{port} (connection refused")
    hub.committed()
    hub.close()
    lines[0].close()


def test_nobody_there_until_the_join_timeout_is_one_sentence(group: Group) -> None:
    port = free_port()
    with pytest.raises(RendezvousError, match=f"no sender at 127.0.0.1:{port} within 0.30 s: conn"):
        group.line(("127.0.0.1", port), member(), join_timeout_s=0.3)


def test_a_host_that_does_not_exist_is_said_at_once(group: Group) -> None:
    with pytest.raises(RendezvousError, match="no-such-host"):
        group.line(("no-such-host.invalid", 1), member(), join_timeout_s=0.3)


def test_a_socket_that_met_itself_is_no_sender(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_itself(address: tuple[str, int], timeout: float) -> socket.socket:
        sock = socket.socket()
        sock.settimeout(timeout)
        sock.bind(address)
        sock.connect(address)
        return sock

    monkeypatch.setattr("socket.create_connection", to_itself)
    with pytest.raises(RendezvousError, match="connection refused"):
        group.line(("127.0.0.1", free_port()), member(), join_timeout_s=0.3)


# Trusting it.


@pytest.mark.parametrize(
    "words",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00\x00\x00\x02{}",
        b'\x00\x00\x00\x0e{"kind":"BYE"}',
        b'\x00\x00\x00\x14{"kind":"CHALLENGE"}',
        b"\xff\xff\xff\xff",
    ],
)
def test_another_program_at_that_address_is_said_to_be_one(group: Group, words: bytes) -> None:
    def act(sender: FakeSender) -> None:
        sender.sock.sendall(words)
        sender.stay()

    with FakeSender(act) as sender, pytest.raises(RendezvousError, match="not a packcast sender"):
        group.line(sender.address, member())


def test_a_listener_that_says_nothing_is_left_after_the_join_timeout(group: Group) -> None:
    with FakeSender(FakeSender.stay) as sender:
        began = time.monotonic()
        with pytest.raises(RendezvousError, match="said nothing"):
            group.line(sender.address, member(), join_timeout_s=0.5)
        assert time.monotonic() - began < 5.0


def test_a_sender_that_cannot_prove_the_token_is_not_believed(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.challenge(token=True)
        proof = auth.sender_proof(b"other", "0" * 64, "0" * 64, "t")
        sender.say("WELCOME", proof=proof, member=SENDER.to_json())
        sender.stay()

    with (
        FakeSender(act) as sender,
        pytest.raises(RendezvousError, match="does not have this worker's token"),
    ):
        group.line(sender.address, member(), token=b"secret")


def test_a_workers_own_proof_reflected_is_not_believed(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.say("CHALLENGE", protocol=PROTOCOL, nonce="0" * 64, transfer="t", token=True)
        proof = sender.hear()["proof"]
        sender.say("WELCOME", proof=proof, member=SENDER.to_json())
        sender.stay()

    with FakeSender(act) as sender, pytest.raises(RendezvousError, match="does not have this"):
        group.line(sender.address, member(), token=b"secret")


def test_a_sender_of_another_protocol_is_told_and_left(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "APART_TIMEOUT_S", 0.2)

    def act(sender: FakeSender) -> None:
        sender.challenge(protocol=9)
        sender.stay()

    with (
        FakeSender(act) as sender,
        pytest.raises(RendezvousError, match=f"speaks protocol {PROTOCOL}, the sender protocol 9"),
    ):
        group.line(sender.address, member(3))


def test_a_sender_that_leaves_instead_of_welcoming_is_a_failed_rendezvous(group: Group) -> None:
    with (
        FakeSender(FakeSender.challenge) as sender,
        pytest.raises(RendezvousError, match="closed the connection or did not let"),
    ):
        group.line(sender.address, member(3))


# Losing it.


def test_what_comes_right_behind_the_welcome_is_not_lost(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.challenge()
        words: list[dict[str, object]] = [
            {"kind": "WELCOME", "proof": None, "member": SENDER.to_json()},
            {"kind": "JOINED", "rank": 3, "world_size": 5},
            {"kind": "OFFER", "files": []},
        ]
        sender.sock.sendall(b"".join(encode_frame(word, FROM_SENDER) for word in words))
        sender.stay()

    with FakeSender(act) as sender:
        line, _ = group.line(sender.address, member())
        me, world_size = line.await_joined(PATIENCE_S)
        assert (me.rank, world_size) == (3, 5)
        assert line.expect("OFFER", PATIENCE_S)["files"] == []


def test_a_sender_that_dies_before_all_have_joined_is_a_failed_rendezvous(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.challenge()
        sender.say("WELCOME", proof=None, member=SENDER.to_json())

    with FakeSender(act) as sender:
        line, seen = group.line(sender.address, member(3))
        with pytest.raises(RendezvousError, match=r"the sender, rank 0 \(host-s, .* left before"):
            line.await_joined(PATIENCE_S)
        assert seen.wait_fatal().exit_code == 4


def test_a_lost_sender_is_named_with_the_position(group: Group) -> None:
    go = threading.Event()

    def act(sender: FakeSender) -> None:
        sender.let_in()
        go.wait(PATIENCE_S)

    with FakeSender(act) as sender:
        line, seen = group.line(sender.address, member())
        line.await_joined(PATIENCE_S)
        line.arm(lambda: "model.safetensors, 1 of 2 GiB")
        go.set()
        assert seen.wait_fatal().message == (
            f"lost the sender, rank 0 (host-s, pid {SENDER.pid}) at model.safetensors, 1 of 2 GiB"
        )
        with pytest.raises(TransferError) as raised:
            line.expect("COMMIT", None)
        assert seen.fatal == [raised.value]


def test_a_frozen_sender_is_lost_and_hears_why(group: Group) -> None:
    heard: list[dict[str, object]] = []

    def act(sender: FakeSender) -> None:
        sender.let_in()
        sender.say("ARMED")
        while not heard:
            message = sender.hear()
            if message["kind"] == "ABORT":
                heard.append(message)
        sender.stay()

    with FakeSender(act) as sender:
        line, seen = group.line(sender.address, member(), heartbeat_timeout_s=0.5)
        assert line.wait_verdict(1.0) is None
        line.arm(lambda: "")
        assert seen.wait_fatal().message.endswith("no sign of life for 0.5 s")
        eventually(lambda: heard)
        assert heard[0]["message"] == seen.fatal[0].message


def test_a_commit_that_has_arrived_counts_though_its_sender_died_at_once(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.let_in()
        sender.say("COMMIT")

    with FakeSender(act) as sender:
        line, seen = group.line(sender.address, member())
        eventually(lambda: line.lost or seen.fatal)
        assert line.expect("COMMIT", PATIENCE_S) == {"kind": "COMMIT"}
        line.committed()
        line.send({"kind": "PUBLISHED"})
        with pytest.raises(TransferError, match=r"lost the sender, .* before it sent DONE"):
            line.expect("DONE", None)
        assert seen.fatal == []


def test_a_sentence_of_the_sender_is_made_fit_to_print(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.let_in()
        sender.say("ABORT", code=5, message="\x1b]0;owned\x07bad\nnews")

    with FakeSender(act) as sender:
        _, seen = group.line(sender.address, member())
        assert seen.wait_fatal().message.isprintable()


def test_silence_of_the_sender_ends_a_wait_with_its_name(group: Group) -> None:
    _, lines, seen = group.joined(1)
    with pytest.raises(TransferError, match=r"no OFFER from the sender, rank 0 \(host-s, "):
        lines[0].expect("OFFER", 0.2)
    assert seen[0].fatal == []


def test_giving_up_beats_a_commit_that_comes_later(group: Group) -> None:
    hub, lines, _ = group.joined(1)
    lines[0].abort(CheckpointError("differs"))
    with pytest.raises(CheckpointError):
        lines[0].committed()
    assert group.seen.wait_fatal().message.endswith("differs")
    with pytest.raises(CheckpointError):
        hub.committed()


def test_an_abort_takes_no_longer_than_a_second_whoever_does_not_answer(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sender.let_in()
        sender.stay()

    with FakeSender(act) as sender:
        line, _ = group.line(sender.address, member())
        for _ in range(200):
            line.send({"kind": "READY", "text": "x" * 60_000})
        began = time.monotonic()
        line.abort(TransferError("enough"))
        line.abort(TransferError("enough"))
        line.close()
        assert time.monotonic() - began < 3.5


# Being stopped oneself.


def test_a_worker_that_was_stopped_itself_does_not_blame_the_sender(group: Group) -> None:
    hub = group.hub(heartbeat_timeout_s=60.0)
    code = (
        f"end = line({hub.address[1]}, 1, 0.8); end.arm(str)\n"
        "end.expect('GO', 20); say('went'); threading.Event().wait()"
    )
    with Joining(hub, 1) as joining, Child(code) as child:
        joining.wait()
        hub.arm(lambda: "")
        eventually(lambda: hub._by_rank[1].armed)
        child.signal(signal.SIGSTOP)
        time.sleep(1.5)
        child.signal(signal.SIGCONT)
        assert hub.wait_verdict(0.7) is None
        hub.send(1, {"kind": "GO"})
        assert child.hear() == "went"


def test_a_sender_that_was_stopped_itself_does_not_blame_its_workers(group: Group) -> None:
    code = (
        "hub = Hub(host='127.0.0.1', port=0, me=me(0, 'send'), transfer_id='t', token=None,\n"
        "    heartbeat_timeout_s=0.8, on_fatal=on_fatal, log=lambda text: None)\n"
        "say(hub.address[1]); hub.join(1, 20, lambda *_: None); hub.arm(str); say('armed')\n"
        "hub.gather('GO', 20); say('went'); threading.Event().wait()"
    )
    with Child(code) as child:
        address = ("127.0.0.1", int(child.hear()))
        line, seen = group.line(address, member(1), heartbeat_timeout_s=60.0)
        line.arm(lambda: "")
        assert child.hear() == "armed"
        eventually(lambda: line._peer.armed)
        time.sleep(0.2)
        child.signal(signal.SIGSTOP)
        time.sleep(1.5)
        child.signal(signal.SIGCONT)
        assert line.wait_verdict(0.7) is None
        line.send({"kind": "GO"})
        assert child.hear() == "went"
    assert seen.wait_fatal().message.startswith("lost the sender")


def test_both_stopped_and_woken_one_after_the_other_go_on(group: Group) -> None:
    hub_code = (
        "hub = Hub(host='127.0.0.1', port=0, me=me(0, 'send'), transfer_id='t', token=None,\n"
        "    heartbeat_timeout_s=1.0, on_fatal=on_fatal, log=lambda text: None)\n"
        "say(hub.address[1]); hub.join(1, 20, lambda *_: None); hub.arm(str); say('armed')\n"
        "hub.gather('GO', 20); say('went'); threading.Event().wait()"
    )
    with Child(hub_code) as sender:
        line_code = (
            f"end = line({sender.hear()}, 1, 1.0); end.await_joined(20); end.arm(str)\n"
            "say('armed'); sys.stdin.readline(); end.send({'kind': 'GO'})\n"
            "threading.Event().wait()"
        )
        with Child(line_code) as worker:
            assert [sender.hear(), worker.hear()] == ["armed", "armed"]
            time.sleep(0.3)
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for child in (sender, worker):
                    child.signal(number)
                    time.sleep(0.2)
                time.sleep(1.5 if number == signal.SIGSTOP else 0.5)
            worker.tell("go")
            assert sender.hear() == "went"
