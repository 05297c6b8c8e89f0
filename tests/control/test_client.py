"""A worker's end: finding the sender, trusting it no further than it proves, and losing it."""

from __future__ import annotations

import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from packcast.control import auth, handshake
from packcast.control.client import ControlClient
from packcast.control.frames import (
    ACCEPTED,
    CHALLENGE,
    PROOF,
    PROTOCOL,
    REJECTED,
    FrameReader,
    Progress,
    frame_of,
)
from packcast.control.handshake import enter
from packcast.control.messages import (
    Abort,
    Bye,
    Commit,
    Hello,
    Joined,
    JoinStatus,
    Message,
    Welcome,
    decode,
)
from packcast.errors import CheckpointError, PackcastError, RendezvousError, TransferError
from tests.control.helpers import (
    ANYTHING,
    PATIENCE_S,
    SENDER,
    Child,
    Group,
    Joining,
    Ping,
    Pong,
    Witness,
    eventually,
    info,
)

WELCOME = Welcome(sender=SENDER, heartbeat_interval_s=0.1)


class FakeSender:
    """A listening socket that does what a test tells it, for one connection."""

    def __init__(self, act: Callable[[FakeSender], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._reader = FrameReader(ANYTHING)
        self._act = act
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.challenge = auth.Challenge.new("t", wants_token=False)
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

    def say(self, *messages: Message) -> None:
        self.sock.sendall(b"".join(message.encode() for message in messages))

    def hear(self, kind: int) -> bytes:
        while True:
            frame = self._reader.next_frame()
            if frame is None:
                self._reader.feed(self.sock.recv(65536))
            elif frame[0] == kind:
                return frame[1]

    def hear_message(self, kind: type[Message]) -> Any:
        return decode(kind.kind, self.hear(kind.kind))

    def stay(self) -> None:
        """Until the test is over."""
        self._leave.wait(PATIENCE_S)

    def ask(self, *, token: bool = False, protocol: int = PROTOCOL) -> auth.Proof:
        body = auth.Challenge.new("t", wants_token=token).body
        body = body[:8] + protocol.to_bytes(2, "big") + body[10:]
        self.challenge = auth.Challenge.parse(body)
        self.sock.sendall(frame_of(CHALLENGE, body))
        return auth.Proof.parse(self.hear(PROOF))

    def accept(self, token: bytes | None = None, protocol: int = PROTOCOL) -> None:
        proof = self.ask(token=token is not None, protocol=protocol)
        self.sock.sendall(frame_of(ACCEPTED, proof.answer(token, self.challenge)))

    def let_in(self) -> None:
        self.accept()
        self.say(WELCOME, Joined(rank=3, world_size=5))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# Finding the sender.


def test_a_worker_tries_every_address_that_may_be_the_senders(group: Group) -> None:
    server = group.server()
    port = server.address[1]
    with socket.create_server(("127.0.0.2", port)) as other, Joining(server) as joining:

        def answer() -> None:
            with other.accept()[0] as sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(4096))

        threading.Thread(target=answer, daemon=True).start()
        hosts = ["no-such-host.invalid", "127.0.0.3", "127.0.0.2", "127.0.0.1"]
        group.client(server, info(1), hosts=hosts)
        joining.wait()
        assert len(joining.infos) == 2
        assert server.host_met() == "127.0.0.1"


def test_if_no_address_answers_each_is_named_with_its_reason(group: Group) -> None:
    hosts = ["no-such-host.invalid", "127.0.0.3"]
    with pytest.raises(RendezvousError) as caught:
        group.client(("", free_port()), info(1), hosts=hosts, join_timeout_s=0.1)
    assert "no sender at no-such-host.invalid:" in caught.value.message
    assert "its name cannot be resolved: " in caught.value.message
    assert "connection refused" in caught.value.message


def test_a_worker_may_start_before_its_sender(group: Group) -> None:
    port, seen = free_port(), Witness()
    address, clients = ("127.0.0.1", port), []

    def connect() -> None:
        clients.append(group.client(address, info(1), seen=seen)[0])

    worker = threading.Thread(target=connect)
    worker.start()
    eventually(lambda: seen.log)
    time.sleep(0.5)
    server = group.server(port=port)
    assert len(server.join(PATIENCE_S, lambda *_: None)) == 2
    worker.join(PATIENCE_S)
    (line,) = seen.log
    assert line.startswith(f"waiting for the sender at 127.0.0.1:{port} (connection refused")


def test_no_sender_until_the_join_timeout_is_one_sentence(group: Group) -> None:
    port = free_port()
    with pytest.raises(RendezvousError, match=f"no sender at 127.0.0.1:{port} within 0.30 s: conn"):
        group.client(("127.0.0.1", port), info(), join_timeout_s=0.3)


def test_a_host_that_does_not_exist_is_reported_at_once(group: Group) -> None:
    with pytest.raises(RendezvousError, match="no-such-host"):
        group.client(("no-such-host.invalid", 1), info(), join_timeout_s=0.3)


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
        group.client(("127.0.0.1", free_port()), info(), join_timeout_s=0.3)


# Trusting it.


@pytest.mark.parametrize(
    "words",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00\x00\x00\x02\x01{}",
        Bye().encode(),
        Abort(code=7, message="trust me", hint=None).encode(),
        frame_of(CHALLENGE, b"packcast"),
        frame_of(REJECTED, b""),
        b"\xff\xff\xff\xff\xff",
    ],
)
def test_another_program_at_the_address_is_reported(group: Group, words: bytes) -> None:
    def act(sender: FakeSender) -> None:
        sender.sock.sendall(words)
        sender.stay()

    with FakeSender(act) as sender, pytest.raises(RendezvousError, match="not a packcast sender"):
        group.client(sender.address, info())


def test_a_listener_that_says_nothing_is_left_after_the_join_timeout(group: Group) -> None:
    with FakeSender(FakeSender.stay) as sender:
        began = time.monotonic()
        with pytest.raises(RendezvousError, match="said nothing"):
            group.client(sender.address, info(), join_timeout_s=0.5)
        assert time.monotonic() - began < 5.0


def test_a_sender_that_cannot_prove_the_token_is_not_believed_and_told_nothing(
    group: Group,
) -> None:
    heard: list[bytes] = []

    def act(sender: FakeSender) -> None:
        proof = sender.ask(token=True)
        sender.sock.sendall(frame_of(ACCEPTED, proof.answer(b"other", sender.challenge)))
        heard.append(sender.sock.recv(4096))

    with (
        FakeSender(act) as sender,
        pytest.raises(RendezvousError, match="does not have this worker's token"),
    ):
        group.client(sender.address, info(), token=b"secret")
    assert heard == [b""]


def test_a_workers_own_proof_reflected_is_not_believed(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        proof = sender.ask(token=True)
        sender.sock.sendall(frame_of(ACCEPTED, proof.digest))
        sender.stay()

    with FakeSender(act) as sender, pytest.raises(RendezvousError, match="does not have this"):
        group.client(sender.address, info(), token=b"secret")


def test_nothing_that_an_unproven_sender_says_is_read(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.ask(token=True)
        sender.say(Abort(code=3, message="the checkpoint is bad", hint=None))
        sender.stay()

    with FakeSender(act) as sender, pytest.raises(RendezvousError, match="not a packcast sender"):
        group.client(sender.address, info(), token=b"secret")


def test_a_sender_of_another_protocol_is_told_and_left_with_its_sentence(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "MISMATCH_LIMIT_S", 0.2)

    def says_it(sender: FakeSender) -> None:
        sender.accept(protocol=9)
        message = f"w speaks protocol {PROTOCOL}, the sender protocol 9"
        sender.say(Abort(code=4, message=message, hint=None))
        sender.stay()

    def says_nothing(sender: FakeSender) -> None:
        sender.accept(protocol=9)
        sender.stay()

    for act in (says_it, says_nothing):
        with (
            FakeSender(act) as sender,
            pytest.raises(RendezvousError, match=f"protocol {PROTOCOL}, the sender protocol 9"),
        ):
            group.client(sender.address, info(3))


def test_a_sender_that_leaves_instead_of_welcoming_is_waited_for(group: Group) -> None:
    with FakeSender(FakeSender.accept) as sender, pytest.raises(RendezvousError, match="no sender"):
        group.client(sender.address, info(3), join_timeout_s=0.5)


# Losing it.


def test_what_comes_right_behind_the_welcome_is_not_lost(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.accept()
        sender.hear(Hello.kind)
        sender.say(WELCOME, Joined(rank=3, world_size=5), Ping(text="x"))
        sender.stay()

    with FakeSender(act) as sender:
        client, _ = group.client(sender.address, info())
        me, world_size = client.await_joined(PATIENCE_S)
        assert (me.rank, world_size) == (3, 5)
        assert client.expect(Ping, PATIENCE_S).text == "x"


def test_a_worker_hears_how_many_have_joined_and_how_long_the_sender_waits(group: Group) -> None:
    server = group.server(frozenset(range(12)))
    heard: queue.Queue[JoinStatus] = queue.Queue()

    def wait(client: ControlClient) -> None:
        with suppress(PackcastError):
            client.await_joined(PATIENCE_S, heard.put)

    with Joining(server):
        client, _ = group.client(server, info(1))
        waiting = threading.Thread(target=wait, args=[client])
        waiting.start()
        first = heard.get(timeout=PATIENCE_S)
        group.client(server, info(2))
        second = heard.get(timeout=PATIENCE_S)
        server.fail(PackcastError("enough"))
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
    assert (first.joined, first.wanted, first.missing) == (1, 11, (2, 3, 4, 5, 6, 7, 8, 9))
    assert (second.joined, second.wanted, second.missing[0]) == (2, 11, 3)
    assert 0 < second.left_s < first.left_s <= PATIENCE_S


def test_a_sender_that_dies_before_all_have_joined_is_a_failed_rendezvous(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.accept()
        sender.say(WELCOME)
        sender.hear(Hello.kind)

    with FakeSender(act) as sender:
        client, seen = group.client(sender.address, info(3))
        with pytest.raises(RendezvousError, match=r"the sender, rank 0 \(host-s, .* left before"):
            client.await_joined(PATIENCE_S)
        assert seen.wait_failure().exit_code == 4


def test_a_lost_sender_is_named_with_the_position(group: Group) -> None:
    go = threading.Event()

    def act(sender: FakeSender) -> None:
        sender.let_in()
        go.wait(PATIENCE_S)

    with FakeSender(act) as sender:
        client, seen = group.client(sender.address, info())
        client.await_joined(PATIENCE_S)
        client.follow(lambda: "model.safetensors, 1 of 2 GiB", Progress)
        go.set()
        assert seen.wait_failure().message == (
            f"lost the sender, rank 0 (host-s, pid {SENDER.pid}) at model.safetensors, 1 of 2 GiB"
        )
        with pytest.raises(TransferError) as raised:
            client.expect(Commit, None)
        assert seen.failures == [raised.value]


@pytest.mark.parametrize(
    "joined", [Joined(rank=5, world_size=5), Joined(rank=3, world_size=5), Hello]
)
def test_a_sender_that_breaks_the_protocol_is_lost_with_one_error(
    group: Group, joined: Any
) -> None:
    def act(sender: FakeSender) -> None:
        sender.accept()
        sender.say(WELCOME)
        if joined is Hello:
            sender.sock.sendall(frame_of(Joined.kind, b'{"rank":1e99,"world_size":"many"}'))
        else:
            sender.say(joined, joined)
        sender.stay()

    with FakeSender(act) as sender:
        _, seen = group.client(sender.address, info())
        assert "it broke the protocol: " in seen.wait_failure().message
        assert seen.failures[0].exit_code in (4, 5)


def test_a_frozen_sender_is_lost_and_hears_why(group: Group) -> None:
    heard: list[Abort] = []

    def act(sender: FakeSender) -> None:
        sender.let_in()
        heard.append(sender.hear_message(Abort))
        sender.stay()

    with FakeSender(act) as sender:
        _, seen = group.client(sender.address, info(), heartbeat_timeout_s=0.5)
        assert seen.wait_failure().message.endswith("no sign of life for 0.5 s")
        eventually(lambda: heard)
        assert heard[0].message == seen.failures[0].message


def test_a_commit_that_has_arrived_counts_though_its_sender_died_at_once(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.let_in()
        sender.say(Commit())
        sender.hear(Hello.kind)

    with FakeSender(act) as sender:
        client, seen = group.client(sender.address, info())
        eventually(lambda: client.lost or seen.failures)
        assert client.expect(Commit, PATIENCE_S) == Commit()
        client.commit()
        client.send(Pong())
        with pytest.raises(TransferError, match=r"lost the sender, .* before it sent Ping"):
            client.expect(Ping, None)
        assert seen.failures == []


def test_an_interrupted_sender_says_whose_interruption_it_was(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.let_in()
        sender.say(Abort(code=143, message="interrupted by SIGTERM", hint=None))
        sender.stay()

    with FakeSender(act) as sender:
        _, seen = group.client(sender.address, info())
        assert seen.wait_failure().message.startswith("the sender, rank 0 (host-s, pid ")
        assert seen.failures[0].exit_code == 5


def test_silence_of_the_sender_ends_a_wait_with_its_name(group: Group) -> None:
    _, clients, seen = group.joined(1)
    with pytest.raises(TransferError, match=r"no Ping from the sender, rank 0 \(host-s, "):
        clients[0].expect(Ping, 0.2)
    assert seen[0].failures == []


def test_giving_up_beats_a_commit_that_comes_later(group: Group) -> None:
    server, clients, _ = group.joined(1)
    clients[0].fail(CheckpointError("differs"))
    with pytest.raises(CheckpointError):
        clients[0].commit()
    assert group.seen.wait_failure().message.endswith("differs")
    with pytest.raises(CheckpointError):
        server.commit()


def test_failing_takes_at_most_a_second_if_a_peer_does_not_answer(group: Group) -> None:
    def act(sender: FakeSender) -> None:
        sender.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sender.let_in()
        sender.stay()

    with FakeSender(act) as sender:
        client, _ = group.client(sender.address, info(), heartbeat_timeout_s=60.0)
        for _ in range(200):
            client._post(client._connection.send, Ping(text="x" * 60_000).encode())
        began = time.monotonic()
        client.fail(TransferError("enough"))
        client.fail(TransferError("enough"))
        client.close()
        assert time.monotonic() - began < 3.5


def test_who_is_waited_for_no_longer_ends_the_knocking(group: Group) -> None:
    with pytest.raises(RendezvousError, match="waited for no longer"):
        enter(
            ["127.0.0.1"],
            free_port(),
            me=info(1),
            token=None,
            join_timeout_s=PATIENCE_S,
            heartbeat_timeout_s=3.0,
            log=group.seen.log.append,
            still_wanted=lambda: False,
        )


# Being stopped oneself.


def test_a_worker_that_was_stopped_itself_does_not_blame_the_sender(group: Group) -> None:
    server = group.server(heartbeat_timeout_s=60.0)
    code = (
        f"end = client({server.address[1]}, 1, 0.8)\n"
        "end.expect(Ping, 20); say('went'); threading.Event().wait()"
    )
    with Joining(server) as joining, Child(code) as child:
        joining.wait()
        child.signal(signal.SIGSTOP)
        time.sleep(1.5)
        child.signal(signal.SIGCONT)
        assert server.wait_failure(0.7) is None
        server.send(1, Ping())
        assert child.hear() == "went"


def test_a_sender_that_was_stopped_itself_does_not_blame_its_workers(group: Group) -> None:
    code = (
        "end = server(1, 0.8); say(end.address[1]); end.join(20, lambda *_: None); say('joined')\n"
        "end.gather(Pong, 20); say('went'); threading.Event().wait()"
    )
    with Child(code) as child:
        address = ("127.0.0.1", int(child.hear()))
        client, seen = group.client(address, info(1), heartbeat_timeout_s=60.0)
        assert child.hear() == "joined"
        time.sleep(0.2)
        child.signal(signal.SIGSTOP)
        time.sleep(1.5)
        child.signal(signal.SIGCONT)
        assert client.wait_failure(0.7) is None
        client.send(Pong())
        assert child.hear() == "went"
    assert seen.wait_failure().message.startswith("lost the sender")


def test_both_stopped_and_woken_one_after_the_other_go_on(group: Group) -> None:
    server_code = (
        "end = server(1, 1.0); say(end.address[1]); end.join(20, lambda *_: None); say('joined')\n"
        "end.gather(Pong, 20); say('went'); threading.Event().wait()"
    )
    with Child(server_code) as sender:
        client_code = (
            f"end = client({sender.hear()}, 1, 1.0); end.await_joined(20)\n"
            "say('joined'); sys.stdin.readline(); end.send(Pong())\n"
            "threading.Event().wait()"
        )
        with Child(client_code) as worker:
            assert [sender.hear(), worker.hear()] == ["joined", "joined"]
            time.sleep(0.3)
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for child in (sender, worker):
                    child.signal(number)
                    time.sleep(0.2)
                time.sleep(1.5 if number == signal.SIGSTOP else 0.5)
            worker.tell("go")
            assert sender.hear() == "went"
