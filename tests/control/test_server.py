"""The sender's end: who may come in, who is missing, who is lost; and nobody harms the others."""

from __future__ import annotations

import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial

import pytest

from packcast.control import acceptor, channel, connection
from packcast.control.acceptor import listen
from packcast.control.client import ControlClient
from packcast.control.frames import ACCEPTED, CHALLENGE, PROTOCOL, REJECTED, Progress, frame_of
from packcast.control.messages import Abort, Commit, Hello
from packcast.control.server import ControlServer
from packcast.errors import (
    CheckpointError,
    DestinationError,
    PackcastError,
    RendezvousError,
    TransferError,
)
from tests.control.helpers import (
    PATIENCE_S,
    Child,
    Group,
    Joining,
    Pang,
    Ping,
    Pong,
    Raw,
    eventually,
    info,
)


def alive(server: ControlServer, clients: list[ControlClient]) -> bool:
    """Whether the whole channel still carries messages both ways."""
    server.broadcast(Ping())
    for client in clients:
        client.expect(Ping, PATIENCE_S)
        client.send(Pong())
    return len(server.gather(Pong, PATIENCE_S)) == len(clients)


def wait_for(event: threading.Event) -> None:
    event.wait(PATIENCE_S)


# Joining.


def test_workers_without_a_launcher_are_ranked_once_all_are_there(group: Group) -> None:
    server = group.server(3, token=b"secret")
    with Joining(server) as joining:
        clients = [
            group.client(server, info(rank, host=host), token=b"secret")[0]
            for rank, host in ((None, "z"), (1, "y"), (None, "b"))
        ]
    assert [(i.rank, i.host) for i in joining.infos] == [
        (0, "host-s"),
        (1, "y"),
        (2, "b"),
        (3, "z"),
    ]
    assert [(joined, wanted) for _, joined, wanted in joining.arrivals] == [(1, 3), (2, 3), (3, 3)]
    assert [client.await_joined(PATIENCE_S) for client in clients] == [
        (joining.infos[3], 4),
        (joining.infos[1], 4),
        (joining.infos[2], 4),
    ]
    assert clients[0].sender == joining.infos[0]
    assert clients[0].transfer_id == "transfer-1"


def test_workers_may_come_before_the_join_begins(group: Group) -> None:
    server = group.server(frozenset({0, 1}))
    client, _ = group.client(server, info(1))
    with Joining(server) as joining:
        pass
    assert [i.rank for i in joining.infos] == [0, 1]
    assert alive(server, [client])


def test_a_sender_alone_waits_for_no_rank(group: Group) -> None:
    server = group.server(0)
    assert [i.rank for i in server.join(1.0, lambda *_: None)] == [0]
    assert server.gather(Pong, 1.0) == {}


def test_a_busy_port_is_one_sentence(group: Group) -> None:
    host, port = group.server().address
    with pytest.raises(RendezvousError, match=f"cannot listen on {host}:{port}: Address already"):
        group.server(port=port)


def test_a_surplus_worker_is_refused_without_harm_to_others(group: Group) -> None:
    server, clients, _ = group.joined(2)
    with pytest.raises(RendezvousError, match="one too many: 2 workers have joined already"):
        group.client(server, info())
    assert alive(server, clients)


@pytest.mark.parametrize(
    ("rank", "sentence"), [(1, "asked for a rank that rank 1"), (0, "not among 1 to 2"), (3, "not")]
)
def test_a_rank_that_cannot_be_had_is_refused_and_another_may_come(
    group: Group, rank: int, sentence: str
) -> None:
    server = group.server(2)
    with Joining(server) as joining:
        group.client(server, info(1))
        with pytest.raises(RendezvousError, match=sentence):
            group.client(server, info(rank, host="other"))
        group.client(server, info())
    assert joining.error is None
    assert group.seen.failures == []


def test_a_duplicate_rank_that_has_the_token_ends_everybody_with_one_sentence(
    group: Group,
) -> None:
    server = group.server(frozenset({0, 1, 2}), token=b"secret")
    with Joining(server) as joining:
        _, seen = group.client(server, info(1), token=b"secret")
        with pytest.raises(RendezvousError, match="rank 1 is there twice") as refused:
            group.client(server, info(1, host="host-b"), token=b"secret")
    assert isinstance(joining.error, RendezvousError)
    assert seen.wait_failure().message == joining.error.message == refused.value.message
    assert group.seen.wait_failure() is joining.error


def test_a_duplicate_rank_without_proof_is_refused_and_ends_nothing(group: Group) -> None:
    server = group.server(frozenset({0, 1, 2}))
    with Joining(server) as joining:
        group.client(server, info(1))
        with pytest.raises(RendezvousError, match="rank 1 is there twice"):
            group.client(server, info(1, host="host-b"))
        group.client(server, info(2))
    assert joining.error is None


def test_a_rank_of_another_launch_is_refused_only(group: Group) -> None:
    server = group.server(frozenset({0, 1}))
    with Joining(server) as joining:
        for rank in (7, None):
            with pytest.raises(RendezvousError, match="does not belong to this launch"):
                group.client(server, info(rank))
        group.client(server, info(1))
    assert joining.error is None


def test_missing_ranks_are_named_at_the_deadline_and_those_who_came_are_told(group: Group) -> None:
    server = group.server(frozenset(range(4)))
    client, seen = group.client(server, info(1))
    with Joining(server, limit_s=0.4) as joining:
        pass
    assert isinstance(joining.error, RendezvousError)
    assert joining.error.message.startswith("rank 2, rank 3 have not joined within 0.40 s; here:")
    assert seen.wait_failure().message == joining.error.message
    assert seen.wait_failure().exit_code == 4
    with pytest.raises(RendezvousError, match="have not joined"):
        client.await_joined(PATIENCE_S)
    assert group.seen.failures == [], "whoever joins has raised it"


def test_missing_workers_are_counted_if_no_rank_is_fixed(group: Group) -> None:
    with pytest.raises(RendezvousError, match=r"3 of 3 workers have not joined within 0\.10 s"):
        group.server(3).join(0.1, lambda *_: None)


def test_without_a_launcher_a_worker_that_leaves_early_may_come_back(group: Group) -> None:
    server = group.server(2)
    with Joining(server) as joining:
        with Raw(server.address) as raw:
            raw.enter(info())
        group.client(server, info())
        group.client(server, info())
    assert joining.error is None
    assert group.seen.failures == []


def test_a_launchers_rank_that_dies_before_all_are_there_ends_the_join(group: Group) -> None:
    server = group.server(frozenset({0, 1, 2}))
    with Joining(server) as joining, Raw(server.address) as raw:
        raw.enter(info(1))
    assert isinstance(joining.error, TransferError)
    assert joining.error.message.startswith("lost rank 1 (host-a, pid ")


def test_a_launchers_rank_that_gives_up_while_joining_ends_the_join_at_once(group: Group) -> None:
    server = group.server(frozenset({0, 1, 2}))
    with Joining(server) as joining:
        client, _ = group.client(server, info(1))
        client.fail(CheckpointError("no such file"))
    assert isinstance(joining.error, CheckpointError)
    assert joining.error.message.startswith("rank 1 (host-a, pid ")


@pytest.mark.parametrize("expected", [2, frozenset({0, 1, 2})])
def test_a_worker_that_freezes_while_others_still_join_is_known_by_its_silence(
    group: Group, expected: int | frozenset[int]
) -> None:
    server = group.server(expected, heartbeat_timeout_s=0.4)
    with Joining(server) as joining, Raw(server.address) as raw:
        raw.enter(info(1))
        assert raw.hear_message(Abort).message.endswith("no sign of life for 0.4 s")
        if expected == 2:  # others may come, itself too
            for _ in range(2):
                group.client(server, info())
    assert (joining.error is None) == (expected == 2)


def test_a_late_arrival_is_sent_away(group: Group) -> None:
    server, clients, _ = group.joined(1)
    server.commit()
    clients[0].close()
    with pytest.raises(RendezvousError, match="one too many"):
        group.client(server, info())


# Strangers.


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff\xff\xff\xff" + b"x" * 100,
        b"\x00\x00\x00\x02\x02{}",
        b"\x00\x00\x00\x41\x02" + b"x" * 65,
        Hello(info=info(1), heartbeat_timeout_s=3.0).encode(),
        b"",
    ],
)
@pytest.mark.parametrize("token", [None, b"secret"])
def test_garbage_is_dropped_with_one_line_and_without_harm(
    group: Group, rubbish: bytes, token: bytes | None
) -> None:
    server = group.server(token=token)
    with Joining(server) as joining, Raw(server.address) as raw:
        raw.hear(CHALLENGE)
        raw.sock.sendall(rubbish)
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.is_closed_by_peer()
        group.client(server, info(), token=token)
    assert joining.error is None
    (line,) = group.seen.log
    assert line.startswith("dropped a stranger at 127.0.0.1: ")


def test_a_slow_stranger_is_sent_away_in_time(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "HANDSHAKE_LIMIT_S", 0.3)
    server = group.server()
    with Raw(server.address) as raw:
        began = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            for byte in b"\0\0\0\x42\x02" + b"never ending" * 100:
                raw.sock.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - began < PATIENCE_S / 2
    assert any("no proof within 0.3 s" in line for line in group.seen.log)


@pytest.mark.parametrize("token", [None, b"secret"])
def test_many_silent_strangers_delay_no_rank_and_make_one_line(
    group: Group, token: bytes | None
) -> None:
    server = group.server(token=token)
    with ExitStack() as crowd, Joining(server) as joining:
        for _ in range(acceptor.MAX_VISITORS_OF_NETWORK + 100):
            crowd.enter_context(Raw(server.address))
        began = time.monotonic()
        group.client(server, info(), token=token)
        assert time.monotonic() - began < 2.0
    assert joining.error is None
    assert len([line for line in group.seen.log if "silent while others came" in line]) == 1


def test_silent_strangers_from_everywhere_are_bounded_too(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "MAX_VISITORS", 5)
    server = group.server()
    with ExitStack() as crowd, Joining(server) as joining:
        sources = [(f"127.0.0.{i}", 0) for i in range(2, 12)]
        for source in sources:
            sock = socket.create_connection(server.address, source_address=source)
            crowd.enter_context(sock)
        eventually(lambda: group.seen.log)
        assert server._acceptor._num_visitors <= 5
        group.client(server, info())
    assert joining.error is None


def test_a_worker_that_was_evicted_tries_again_until_it_is_in(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = group.server()
    greet, greeted = server._acceptor._greet, []

    def drop_the_first(sock: socket.socket, *addresses: str) -> None:
        greeted.append(sock)
        if len(greeted) == 1:
            sock.close()
        else:
            greet(sock, *addresses)

    monkeypatch.setattr(server._acceptor, "_greet", drop_the_first)
    with Joining(server) as joining:
        group.client(server, info())
    assert joining.error is None
    assert len(greeted) == 2


@pytest.mark.parametrize(
    ("of_sender", "of_worker", "sentence"),
    [
        (b"secret", b"other", "this worker's token is not the sender's"),
        (b"secret", None, "asks for a token and this worker has none"),
        (None, b"secret", "this worker has a token and the sender at .* asks for none"),
    ],
)
def test_the_error_for_tokens_that_differ_names_the_side(
    group: Group, of_sender: bytes | None, of_worker: bytes | None, sentence: str
) -> None:
    server = group.server(token=of_sender)
    with Joining(server) as joining:
        with pytest.raises(RendezvousError, match=sentence):
            group.client(server, info(), token=of_worker)
        group.client(server, info(), token=of_sender)
    assert joining.error is None
    assert group.seen.failures == []


@pytest.mark.parametrize("token", [b"other", None])
def test_a_worker_without_the_token_is_remembered_where_one_is_missing(
    group: Group, token: bytes | None
) -> None:
    server = group.server(1, token=b"secret")
    with pytest.raises(RendezvousError, match=r"token is not|has none"):
        group.client(server, info(), token=token)
    eventually(lambda: any("token" in line for line in group.seen.log))
    with Joining(server, limit_s=0.1) as joining:
        pass
    assert joining.error is not None
    assert "1 of 1 worker has not joined" in str(joining.error)
    hint = getattr(joining.error, "hint", "")
    assert hint.startswith("a process at 127.0.0.1 came without this token: set the same")


def test_where_nobody_has_connected_it_is_said_how_to_try_that(group: Group) -> None:
    server = group.server(1, token=b"secret", listener=listen("", 0))
    with Joining(server, limit_s=0.1) as joining:
        pass
    port = server.address[1]
    hint = getattr(joining.error, "hint", "")
    assert hint.startswith(f"nothing has connected to port {port}: start the workers sooner")
    assert f"`packcast doctor --reach HOST:{port}`" in hint


def test_who_left_before_there_was_a_server_is_no_stranger(group: Group) -> None:
    listener = listen("127.0.0.1", 0)
    socket.create_connection(listener.getsockname(), PATIENCE_S).close()
    server = group.server(1, token=b"secret", listener=listener)
    with Joining(server) as joining:
        group.client(server, info(), token=b"secret")
    assert joining.error is None
    assert group.seen.log == []


def test_nothing_is_read_of_a_worker_without_proof(group: Group) -> None:
    server = group.server(token=b"secret")
    with Raw(server.address) as raw:
        raw.prove(None)
        raw.hear(REJECTED)
        with suppress(OSError):
            raw.say(Hello(info=info(1), heartbeat_timeout_s=3.0))
        assert raw.is_closed_by_peer()


@pytest.mark.parametrize("token", [None, b"secret"])
def test_another_protocol_ends_all_with_one_sentence_where_it_is_proven(
    group: Group, token: bytes | None
) -> None:
    server = group.server(2, token=token)
    with Joining(server) as joining, Raw(server.address) as raw:
        _, seen = group.client(server, info(), token=token)
        raw.prove(token, protocol=9)
        raw.hear(ACCEPTED)
        told = raw.hear_message(Abort)
        assert told.message.endswith(f"127.0.0.1 speaks protocol 9, the sender protocol {PROTOCOL}")
        if token is None:  # which anybody could say
            group.client(server, info())
    if token is None:
        assert joining.error is None
        return
    assert isinstance(joining.error, RendezvousError)
    assert told.message == joining.error.message == seen.wait_failure().message


# Messages.


def test_messages_that_arrive_at_once_are_all_kept_in_order(group: Group) -> None:
    server, clients, _ = group.joined(2)
    for number in range(300):
        for client in clients:
            client.send(Pong(number=number) if number % 2 else Pang())
    for number in range(300):
        got = server.gather(Pong if number % 2 else Pang, PATIENCE_S)
        assert sorted(got) == [1, 2]
        if number % 2:
            assert [pong.number for pong in got.values() if isinstance(pong, Pong)] == [number] * 2


def test_a_large_message_reaches_everybody_whatever_the_heartbeats(group: Group) -> None:
    server, clients, seen = group.joined(2, heartbeat_timeout_s=2.0)
    server.broadcast(Ping(text="x" * (20 << 20)))
    server.send(2, Ping())
    for client in clients:
        assert len(client.expect(Ping, PATIENCE_S).text) == 20 << 20
    clients[1].expect(Ping, PATIENCE_S)
    assert [s.failures for s in (group.seen, *seen)] == [[], [], []]


def test_silent_workers_are_named_at_the_time_out_and_nothing_is_lost(group: Group) -> None:
    server, clients, _ = group.joined(3)
    clients[1].send(Pong())
    with pytest.raises(TransferError, match=r"no Pong from rank 1 \(host-1, .*rank 3 \(host-3, "):
        server.gather(Pong, 0.3)
    clients[0].send(Pong())
    clients[2].send(Pong())
    assert sorted(server.gather(Pong, PATIENCE_S)) == [1, 2, 3]


def test_heartbeats_tell_every_rank_that_something_moves_anywhere(group: Group) -> None:
    server, clients, _ = group.joined(2, heartbeat_timeout_s=0.4)
    clients[0].follow(str, lambda: Progress(done=7, moved=30))
    clients[1].follow(str, lambda: Progress(done=1 // 0))
    server.follow(str, lambda: Progress(moved=100))
    eventually(lambda: [p.done for p in server.progress_by_worker().values()] == [7, 0])
    assert server.moved_elsewhere() == 30
    eventually(lambda: [client.moved_elsewhere() for client in clients] == [130, 130])


# Losses.


def test_a_killed_worker_ends_everybody_at_once_by_name_and_position(group: Group) -> None:
    server = group.server(2)
    with (
        Joining(server) as joining,
        Child(f"client({server.address[1]}, 2, 3); say('in'); threading.Event().wait()") as child,
    ):
        assert child.hear() == "in"
        client, seen = group.client(server, info(1))
        joining.wait()
        server.follow(lambda: "model.safetensors, 1.2 of 4.9 GiB", Progress)
        began = time.monotonic()
        child.signal(signal.SIGKILL)
        with pytest.raises(TransferError) as raised:
            server.gather(Pong, PATIENCE_S)
        sentence = f"lost rank 2 (child-2, pid {child.pid}) at model.safetensors, 1.2 of 4.9 GiB"
        assert raised.value.message == sentence
        assert seen.wait_failure().message == sentence
        assert time.monotonic() - began < 2.0
        with pytest.raises(TransferError, match="lost rank 2"):
            client.expect(Commit, PATIENCE_S)
        eventually(lambda: group.seen.failures)
        assert group.seen.failures == [raised.value]


def test_a_frozen_worker_ends_everybody_and_hears_why_when_it_goes_on(group: Group) -> None:
    server = group.server(2, heartbeat_timeout_s=0.8)
    code = f"client({server.address[1]}, 1, 0.8); say('in'); threading.Event().wait()"
    with Joining(server) as joining, Child(code) as child:
        assert child.hear() == "in"
        _, seen = group.client(server, info(2), heartbeat_timeout_s=0.8)
        joining.wait()
        child.signal(signal.SIGSTOP)
        sentence = f"lost rank 1 (child-1, pid {child.pid}): no sign of life for 0.8 s"
        assert group.seen.wait_failure().message == sentence
        assert seen.wait_failure().message == sentence
        child.signal(signal.SIGCONT)
        assert child.hear() == f"FAILED 5 {sentence}"


def test_a_busy_main_thread_delays_no_heartbeat(group: Group) -> None:
    server = group.server(heartbeat_timeout_s=0.8)
    code = (
        f"end = client({server.address[1]}, 1, 0.8); say('in'); import time\n"
        "until = time.monotonic() + 2.5\n"
        "while time.monotonic() < until: sum(range(1000))\n"
        "say('done'); threading.Event().wait()"
    )
    with Joining(server) as joining, Child(code) as child:
        assert child.hear() == "in"
        joining.wait()
        assert child.hear() == "done"
        assert server.failure is None


def test_a_worker_that_asks_for_patience_is_lost_only_when_that_is_over(group: Group) -> None:
    server = group.server(heartbeat_timeout_s=0.8)
    code = (
        f"end = client({server.address[1]}, 1, 0.8); end.be_patient(2.5); sys.stdin.readline()\n"
        "end.be_patient(0); say('back'); threading.Event().wait()"
    )
    with Joining(server) as joining, Child(code) as child:
        joining.wait()
        (serving,) = server._connections
        eventually(lambda: serving.progress.patience_s == 2.5)
        child.signal(signal.SIGSTOP)
        assert server.wait_failure(1.6) is None
        child.signal(signal.SIGCONT)
        child.tell("go")
        assert child.hear() == "back"
        eventually(lambda: serving.progress.patience_s == 0)
        child.signal(signal.SIGSTOP)
        assert group.seen.wait_failure().message.endswith("no sign of life for 0.8 s")


def test_a_worker_that_gives_up_reaches_everybody_with_its_own_code(group: Group) -> None:
    server, clients, seen = group.joined(3)
    clients[1].fail(DestinationError("no space on /local", hint="free some"))
    with pytest.raises(DestinationError) as raised:
        server.gather(Pong, PATIENCE_S)
    assert raised.value.message.startswith("rank 2 (host-2, pid ")
    assert raised.value.message.endswith("): no space on /local")
    assert raised.value.hint == "free some"
    for witness in (seen[0], seen[2]):
        assert witness.wait_failure().message == raised.value.message
        assert witness.wait_failure().exit_code == 7
    assert seen[1].failures == []


@pytest.mark.parametrize("attempt", range(5))
def test_the_last_words_of_a_dying_worker_win_over_its_death(group: Group, attempt: int) -> None:
    server = group.server()
    code = (
        "from packcast.errors import CheckpointError\n"
        f"end = client({server.address[1]}, 1, 3); end.await_joined(20); sys.stdin.readline()\n"
        "end.fail(CheckpointError('bad header')); os._exit(3)"
    )
    with Joining(server) as joining, Child(code) as child:
        joining.wait()
        # The worker leaves with unread messages in its socket, so its host resets the connection.
        for _ in range(200):
            server.broadcast(Ping(text="x" * 10_000))
        child.process.communicate("go\n", timeout=PATIENCE_S)
        error = group.seen.wait_failure()
        assert error.message == f"rank 1 (child-1, pid {child.pid}): bad header"


def test_a_reason_of_its_own_wins_over_what_it_led_to(group: Group) -> None:
    server = group.server(3)
    with ExitStack() as stack, Joining(server) as joining:
        raws = [stack.enter_context(Raw(server.address)) for _ in range(3)]
        for rank, raw in enumerate(raws, 1):
            raw.enter(info(rank))
        joining.wait()
        release = threading.Event()
        server._post(partial(wait_for, release))
        raws[0].say(Abort(code=5, message="the collective broke", hint=None))
        raws[1].say(Abort(code=7, message="no space", hint=None))
        raws[2].sock.close()
        release.set()
        assert group.seen.wait_failure().message.endswith("no space")


def test_a_death_and_what_it_breaks_elsewhere_are_one_moment(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SETTLE_S", 1.0)
    server = group.server(2)
    with Raw(server.address) as first, Raw(server.address) as second, Joining(server) as joining:
        first.enter(info(1))
        second.enter(info(2))
        joining.wait()
        first.say(Abort(code=5, message="the collective broke", hint=None))
        time.sleep(0.1)
        second.sock.close()
        assert group.seen.wait_failure().message.startswith("lost rank 2")


def test_on_failure_is_called_once_on_the_control_thread_when_all_is_told(group: Group) -> None:
    server, clients, _ = group.joined(3)
    free: list[bool] = []

    def try_what_others_may() -> None:
        with pytest.raises(PackcastError):
            server.gather(Pong, 1.0)
        server.fail(TransferError("too"))
        free.append(True)

    def on_failure(error: PackcastError) -> None:
        group.seen.on_failure(error)
        other = threading.Thread(target=try_what_others_may)
        other.start()
        other.join(PATIENCE_S)
        server.fail(TransferError("again"))
        server.close()

    server._on_failure = on_failure
    for client in clients:
        client.fail(TransferError("everybody at once"))
    eventually(lambda: free)
    server.close()
    assert len(group.seen.failures) == 1
    assert group.seen.threads[0].name == "packcast-control"


def test_a_failure_before_any_wait_is_raised_by_later_calls(group: Group) -> None:
    server, clients, _ = group.joined(1)
    clients[0].send(Pong())
    clients[0].fail(TransferError("gone"))
    error = group.seen.wait_failure()
    for call in (
        lambda: server.gather(Pong, None),
        lambda: server.broadcast(Commit()),
        server.commit,
    ):
        with pytest.raises(TransferError) as raised:
            call()
        assert raised.value is error


def test_the_senders_own_failure_reaches_all_without_a_callback(group: Group) -> None:
    server, clients, seen = group.joined(2)
    error = CheckpointError("model.safetensors changed")
    server.fail(error)
    server.fail(TransferError("something else"))
    for client, witness in zip(clients, seen, strict=True):
        assert witness.wait_failure().message == "model.safetensors changed"
        with pytest.raises(CheckpointError):
            client.expect(Commit, PATIENCE_S)
    with pytest.raises(CheckpointError) as raised:
        server.gather(Pong, PATIENCE_S)
    assert raised.value is error
    assert group.seen.failures == []


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\x7f\xff\xff\xff\x18",
        frame_of(Pong.kind, b"[]"),
        frame_of(CHALLENGE, b""),
        frame_of(5, b"a heartbeat?"),
        Ping().encode(),
        Hello(info=info(1), heartbeat_timeout_s=3.0).encode(),
    ],
)
def test_a_worker_that_breaks_the_protocol_is_lost_by_name(group: Group, rubbish: bytes) -> None:
    server = group.server()
    with Raw(server.address) as raw, Joining(server) as joining:
        raw.enter(info(1))
        joining.wait()
        raw.sock.sendall(rubbish)
        assert isinstance(group.seen.wait_failure(), TransferError)
        assert "lost rank 1 (host-a, pid " in group.seen.wait_failure().message
        assert "it broke the protocol" in group.seen.wait_failure().message


def test_a_worker_that_floods_us_is_lost(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_UNREAD", 50)
    _, clients, _ = group.joined(1)
    for _ in range(51):
        clients[0].send(Pong())
    assert "too many messages that no thread fetches" in group.seen.wait_failure().message


def test_a_worker_that_reads_nothing_is_lost_and_stalls_no_other(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT_NBYTES", 16 << 20)
    server = group.server(2, heartbeat_timeout_s=60.0)
    with Raw(server.address) as raw, Joining(server) as joining:
        raw.enter(info(1))
        client, seen = group.client(server, info(2))
        joining.wait()
        for _ in range(3):
            with suppress(TransferError):  # the failure, should it be here before the PING
                server.broadcast(Ping(text="x" * (7 << 20)))
                client.expect(Ping, PATIENCE_S)
        assert seen.wait_failure().message.endswith("it does not receive what is sent to it")


def test_a_control_thread_that_was_busy_reads_before_it_blames(group: Group) -> None:
    server = group.server(heartbeat_timeout_s=0.8)
    with Joining(server) as joining:
        client, _ = group.client(server, info(1), heartbeat_timeout_s=60.0)
        joining.wait()

    def be_busy() -> None:
        for _ in range(12):
            time.sleep(0.12)
            server._clock.read()

    server._post(be_busy)
    assert server.wait_failure(2.0) is None
    assert alive(server, [client])


def test_a_bug_in_the_control_thread_ends_everybody_instead_of_hanging(group: Group) -> None:
    server, _, seen = group.joined(1)

    def bug() -> None:
        raise KeyError("bug")

    server._post(bug)
    with pytest.raises(PackcastError, match="the control channel failed: KeyError"):
        server.gather(Pong, None)
    assert group.seen.wait_failure().exit_code == 1
    assert "KeyError" in seen[0].wait_failure().message


def test_callbacks_that_fail_cost_only_what_they_would_have_said(group: Group) -> None:
    server, clients, _ = group.joined(1)
    server.follow(lambda: str(1 // 0), lambda: Progress(moved=1 // 0))
    assert alive(server, clients)
    clients[0].close()
    assert group.seen.wait_failure().message.startswith("lost rank 1 (host-1, pid ")


# The end.


def test_after_the_commitment_a_loss_is_noted_and_the_others_go_on(group: Group) -> None:
    server = group.server(3)
    code = f"client({server.address[1]}, 2, 3); say('in'); threading.Event().wait()"
    with Joining(server) as joining, Child(code) as child:
        assert child.hear() == "in"
        pairs = [group.client(server, info(rank, host=f"host-{rank}")) for rank in (1, 3)]
        joining.wait()
        server.commit()
        server.broadcast(Commit())
        child.signal(signal.SIGKILL)
        pairs[0][0].send(Pong())
        pairs[1][0].expect(Commit, PATIENCE_S)
        pairs[1][0].fail(DestinationError("the rename failed"))
        assert sorted(server.gather(Pong, PATIENCE_S)) == [1]
        assert sorted(server.lost) == [2, 3]
        assert server.lost[2] == f"lost rank 2 (child-2, pid {child.pid})"
        assert server.lost[3].endswith("the rename failed")
    assert [seen.failures for seen in (group.seen, pairs[0][1], pairs[1][1])] == [[], [], []]


def test_a_worker_that_published_and_died_has_published(group: Group) -> None:
    server, clients, _ = group.joined(1)
    server.commit()
    clients[0].send(Pong())
    clients[0].fail(TransferError("after all"))
    eventually(lambda: server.lost)
    assert sorted(server.gather(Pong, PATIENCE_S)) == [1]
    assert server.gather(Pong, PATIENCE_S) == {}


@pytest.mark.parametrize("first", ["server", "clients", "both"])
def test_good_byes_in_any_order_are_no_death(group: Group, first: str) -> None:
    server, clients, seen = group.joined(2)
    server.commit()
    server.broadcast(Commit())
    for client in clients:
        client.expect(Commit, PATIENCE_S)
        client.send(Pong())
    server.gather(Pong, PATIENCE_S)
    server.broadcast(Ping())
    ends = {
        "server": [server, *clients],
        "clients": [*clients, server],
        "both": [clients[0], server, clients[1]],
    }[first]
    if first == "both":
        threads = [threading.Thread(target=end.close) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    for end in ends:
        end.close()
    assert [witness.failures for witness in (group.seen, *seen)] == [[], [], []]
    assert server.lost == {}
    assert [client.lost for client in clients] == [None, None]


def test_a_worker_that_says_good_bye_too_early_is_lost(group: Group) -> None:
    server, clients, _ = group.joined(2)
    clients[0].close()
    assert group.seen.wait_failure().message.endswith("it left before the end")
    with pytest.raises(TransferError):
        server.gather(Pong, PATIENCE_S)


def test_who_waits_on_a_closed_server_is_told(group: Group) -> None:
    server, _, _ = group.joined(1)
    threading.Timer(0.1, server.close).start()
    with pytest.raises(TransferError, match="closed"):
        server.gather(Pong, None)
