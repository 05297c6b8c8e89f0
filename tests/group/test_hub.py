"""The sender's end: who may come in, who is missing, who is lost; and nobody harms the others."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial

import pytest

from packcast.errors import (
    CheckpointError,
    DestinationError,
    PackcastError,
    RendezvousError,
    TransferError,
)
from packcast.group import door, peer
from packcast.group.hub import Hub
from packcast.group.line import Line
from packcast.group.wire import PROTOCOL
from tests.group.control_helpers import (
    PATIENCE_S,
    Child,
    Group,
    Joining,
    Raw,
    eventually,
    hello_frame,
    member,
)


@pytest.fixture
def group() -> Iterator[Group]:
    with ExitStack() as stack:
        yield Group(stack)


def alive(hub: Hub, lines: list[Line]) -> bool:
    """Whether the whole channel still carries messages both ways."""
    hub.broadcast({"kind": "PING"})
    for line in lines:
        line.expect("PING", PATIENCE_S)
        line.send({"kind": "PONG"})
    return len(hub.gather("PONG", PATIENCE_S)) == len(lines)


def wait_for(event: threading.Event) -> None:
    event.wait(PATIENCE_S)


# Joining.


def test_workers_without_a_launcher_are_ranked_once_all_are_there(group: Group) -> None:
    hub = group.hub(token=b"secret")
    with Joining(hub, 3) as joining:
        lines = [
            group.line(hub, member(rank, host=host), token=b"secret")[0]
            for rank, host in ((None, "z"), (1, "y"), (None, "b"))
        ]
    assert [(m.rank, m.host) for m in joining.members] == [
        (0, "host-s"),
        (1, "y"),
        (2, "b"),
        (3, "z"),
    ]
    assert [(joined, wanted) for _, joined, wanted in joining.arrivals] == [(1, 3), (2, 3), (3, 3)]
    assert [line.await_joined(PATIENCE_S) for line in lines] == [
        (joining.members[3], 4),
        (joining.members[1], 4),
        (joining.members[2], 4),
    ]
    assert lines[0].sender == joining.members[0]
    assert lines[0].transfer_id == "transfer-1"


def test_workers_that_came_before_the_join_began_are_let_in_when_it_does(group: Group) -> None:
    hub = group.hub()
    got: list[Line] = []
    early = threading.Thread(target=lambda: got.append(group.line(hub, member(1))[0]))
    early.start()
    eventually(lambda: hub._held)
    with Joining(hub, frozenset({0, 1})) as joining:
        pass
    early.join(PATIENCE_S)
    assert [m.rank for m in joining.members] == [0, 1]
    assert alive(hub, got)


def test_a_sender_alone_has_nobody_to_wait_for(group: Group) -> None:
    hub = group.hub()
    assert [m.rank for m in hub.join(0, 1.0, lambda *_: None)] == [0]
    assert hub.gather("READY", 1.0) == {}


def test_a_busy_port_is_one_sentence(group: Group) -> None:
    host, port = group.hub().address
    with pytest.raises(RendezvousError, match=f"cannot listen on {host}:{port}: Address already"):
        Hub(
            host=host,
            port=port,
            me=member(0, role="send"),
            transfer_id="t",
            token=None,
            heartbeat_timeout_s=3.0,
            on_fatal=lambda error: None,
            log=print,
        )


def test_one_too_many_is_told_so_and_harms_nobody(group: Group) -> None:
    hub, lines, _ = group.joined(2)
    with pytest.raises(RendezvousError, match="one too many: 2 workers have joined already"):
        group.line(hub, member())
    assert alive(hub, lines)


@pytest.mark.parametrize(
    ("rank", "sentence"), [(1, "asked for a rank that rank 1"), (0, "not among 1 to 2"), (3, "not")]
)
def test_a_rank_that_cannot_be_had_is_refused_and_another_may_come(
    group: Group, rank: int, sentence: str
) -> None:
    hub = group.hub()
    with Joining(hub, 2) as joining:
        group.line(hub, member(1))
        with pytest.raises(RendezvousError, match=sentence):
            group.line(hub, member(rank, host="other"))
        group.line(hub, member())
    assert joining.error is None
    assert group.seen.fatal == []


def test_a_duplicate_rank_under_a_launcher_ends_everybody(group: Group) -> None:
    hub = group.hub()
    with Joining(hub, frozenset({0, 1, 2})) as joining:
        _, seen = group.line(hub, member(1))
        with pytest.raises(RendezvousError, match="rank 1 is there twice") as refused:
            group.line(hub, member(1, host="host-b"))
    assert isinstance(joining.error, RendezvousError)
    assert seen.wait_fatal().message == joining.error.message == refused.value.message
    assert group.seen.wait_fatal() is joining.error


def test_a_rank_of_another_launch_is_refused_only(group: Group) -> None:
    hub = group.hub()
    with Joining(hub, frozenset({0, 1})) as joining:
        for rank in (7, None):
            with pytest.raises(RendezvousError, match="does not belong to this launch"):
                group.line(hub, member(rank))
        group.line(hub, member(1))
    assert joining.error is None


def test_missing_ranks_are_named_at_the_deadline_and_those_who_came_are_told(group: Group) -> None:
    hub = group.hub()
    with Joining(hub, frozenset(range(4)), deadline_s=0.4) as joining:
        line, seen = group.line(hub, member(1))
    assert isinstance(joining.error, RendezvousError)
    assert joining.error.message.startswith("rank 2, rank 3 have not joined within 0.40 s; here:")
    assert seen.wait_fatal().message == joining.error.message
    assert seen.wait_fatal().exit_code == 4
    with pytest.raises(RendezvousError, match="have not joined"):
        line.await_joined(PATIENCE_S)


def test_missing_workers_are_counted_where_nobody_has_a_rank(group: Group) -> None:
    with pytest.raises(RendezvousError, match=r"3 of 3 workers have not joined within 0\.10 s"):
        group.hub().join(3, 0.1, lambda *_: None)


def test_without_a_launcher_a_worker_that_leaves_early_may_come_back(group: Group) -> None:
    hub = group.hub()
    with Joining(hub, 2) as joining:
        with Raw(hub.address) as raw:
            raw.enter(member())
        group.line(hub, member())
        group.line(hub, member())
    assert joining.error is None
    assert group.seen.fatal == []


def test_a_launchers_rank_that_dies_before_all_are_there_ends_the_join(group: Group) -> None:
    hub = group.hub()
    with Joining(hub, frozenset({0, 1, 2})) as joining, Raw(hub.address) as raw:
        raw.enter(member(1))
    assert isinstance(joining.error, TransferError)
    assert joining.error.message.startswith("lost rank 1 (host-a, pid ")


def test_a_launchers_rank_that_gives_up_while_joining_ends_the_join_at_once(group: Group) -> None:
    hub = group.hub()
    with Joining(hub, frozenset({0, 1, 2})) as joining:
        line, _ = group.line(hub, member(1))
        line.abort(CheckpointError("no such file"))
    assert isinstance(joining.error, CheckpointError)
    assert joining.error.message.startswith("rank 1 (host-a, pid ")


def test_a_late_arrival_is_sent_away(group: Group) -> None:
    hub, lines, _ = group.joined(1)
    hub.committed()
    lines[0].close()
    with pytest.raises(RendezvousError, match="one too many"):
        group.line(hub, member())


# Strangers.


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff\xff\xff\xff" + b"x" * 100,
        b"\x00\x00\x40\x01" + b"x" * 100,
        b"\x00\x00\x00\x02{}",
        b"\x00\x00\x00\x11" + b'{"kind":"READY1"}',
        b'\x00\x00\x00\x2f{"kind":"HELLO","protocol":2,"nonce":"","member"',
        hello_frame(member(1)).replace(b"recv", b"boss"),
    ],
)
def test_garbage_is_dropped_with_a_line_and_harms_nobody(group: Group, rubbish: bytes) -> None:
    hub = group.hub()
    with Joining(hub, 1) as joining, Raw(hub.address) as raw:
        raw.sock.sendall(rubbish)
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.is_closed_by_peer()
        group.line(hub, member())
    assert joining.error is None
    assert [line for line in group.seen.log if line.startswith("dropped a peer at 127.0.0.1")]


def test_a_slow_stranger_is_sent_away_in_time(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_TIMEOUT_S", 0.3)
    hub = group.hub()
    with Raw(hub.address) as raw:
        began = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            for byte in hello_frame(member(1))[:-1] + b"never ending" * 100:
                raw.sock.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - began < PATIENCE_S / 2
    assert any("no HELLO within 0.3 s" in line for line in group.seen.log)


def test_a_crowd_of_silent_strangers_only_delays_the_next(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(door, "PAUSE_S", 0.05)
    monkeypatch.setattr(door, "MAX_PENDING", 3)
    hub = group.hub()
    with ExitStack() as crowd, Joining(hub, 1) as joining:
        for _ in range(8):
            crowd.enter_context(Raw(hub.address))
        group.line(hub, member())
    assert joining.error is None


@pytest.mark.parametrize(
    ("of_sender", "of_worker", "sentence"),
    [
        (b"secret", b"other", "this worker's token is not the sender's"),
        (b"secret", None, "asks for a token and this worker has none"),
        (None, b"secret", "this worker has a token and the sender at .* asks for none"),
    ],
)
def test_tokens_that_do_not_match_are_said_by_side(
    group: Group, of_sender: bytes | None, of_worker: bytes | None, sentence: str
) -> None:
    hub = group.hub(token=of_sender)
    with Joining(hub, 1) as joining:
        with pytest.raises(RendezvousError, match=sentence):
            group.line(hub, member(), token=of_worker)
        group.line(hub, member(), token=of_sender)
    assert joining.error is None
    assert group.seen.fatal == []


def test_a_worker_without_proof_is_refused_even_if_it_does_not_mind(group: Group) -> None:
    hub = group.hub(token=b"secret")
    with Raw(hub.address) as raw:
        assert raw.hear("CHALLENGE")["token"] is True
        raw.sock.sendall(hello_frame(member(1)))
        assert raw.hear("REFUSED")["code"] == 4


def test_another_protocol_ends_both_sides_with_one_sentence(group: Group) -> None:
    hub = group.hub()
    with Joining(hub, 1) as joining, Raw(hub.address) as raw:
        raw.hear("CHALLENGE")
        raw.say("HELLO", protocol=9, nonce="0" * 64, member=member(1).to_json())
        told = raw.hear("REFUSED")
    assert isinstance(joining.error, RendezvousError)
    assert told["message"] == joining.error.message
    assert joining.error.message.endswith(f"speaks protocol 9, the sender protocol {PROTOCOL}")


def test_a_stranger_with_another_protocol_cannot_end_what_a_token_guards(group: Group) -> None:
    hub = group.hub(token=b"secret")
    with Joining(hub, 1) as joining, Raw(hub.address) as raw:
        raw.hear("CHALLENGE")
        raw.say("HELLO", protocol=9, nonce="0" * 64, member=member(1).to_json())
        raw.hear("REFUSED")
        group.line(hub, member(), token=b"secret")
    assert joining.error is None


# Messages.


def test_messages_that_arrive_at_once_are_all_kept_in_order(group: Group) -> None:
    hub, lines, _ = group.joined(2)
    for number in range(300):
        for line in lines:
            line.send({"kind": f"KIND{number % 3}", "number": number})
    for number in range(300):
        got = hub.gather(f"KIND{number % 3}", PATIENCE_S)
        assert [got[rank]["number"] for rank in (1, 2)] == [number, number]


def test_a_large_offer_reaches_everybody_while_heartbeats_are_armed(group: Group) -> None:
    hub, lines, seen = group.joined(2, heartbeat_timeout_s=2.0)
    for end in (hub, *lines):
        end.arm(lambda: "")
    hub.broadcast({"kind": "OFFER", "text": "x" * (20 << 20)})
    hub.send(2, {"kind": "NEXT"})
    for line in lines:
        assert len(str(line.expect("OFFER", PATIENCE_S)["text"])) == 20 << 20
    lines[1].expect("NEXT", PATIENCE_S)
    assert [s.fatal for s in (group.seen, *seen)] == [[], [], []]


def test_silent_workers_are_named_at_the_time_out_and_nothing_is_lost(group: Group) -> None:
    hub, lines, _ = group.joined(3)
    lines[1].send({"kind": "READY"})
    with pytest.raises(TransferError, match=r"no READY from rank 1 \(host-1, .*rank 3 \(host-3, "):
        hub.gather("READY", 0.3)
    lines[0].send({"kind": "READY"})
    lines[2].send({"kind": "READY"})
    assert sorted(hub.gather("READY", PATIENCE_S)) == [1, 2, 3]


def test_heartbeats_carry_progress_both_ways(group: Group) -> None:
    hub, lines, _ = group.joined(2)
    lines[0].set_progress(lambda: {"nbytes": 7})
    lines[1].set_progress(lambda: {"nbytes": float("nan")})
    hub.set_progress(lambda: {"nbytes": 9})
    eventually(lambda: hub.progress()[1] == {"nbytes": 7})
    eventually(lambda: lines[1].progress() == {"nbytes": 9})
    assert hub.progress()[2] == {}


# Losses.


def test_a_killed_worker_ends_everybody_at_once_by_name_and_position(group: Group) -> None:
    hub = group.hub()
    with (
        Joining(hub, 2) as joining,
        Child(f"line({hub.address[1]}, 2, 3); say('in'); threading.Event().wait()") as child,
    ):
        assert child.hear() == "in"
        line, seen = group.line(hub, member(1))
        joining.wait()
        hub.arm(lambda: "model.safetensors, 1.2 of 4.9 GiB")
        began = time.monotonic()
        child.signal(signal.SIGKILL)
        with pytest.raises(TransferError) as raised:
            hub.gather("PROVED", PATIENCE_S)
        sentence = f"lost rank 2 (child-2, pid {child.pid}) at model.safetensors, 1.2 of 4.9 GiB"
        assert raised.value.message == sentence
        assert seen.wait_fatal().message == sentence
        assert time.monotonic() - began < 2.0
        with pytest.raises(TransferError, match="lost rank 2"):
            line.expect("COMMIT", PATIENCE_S)
        eventually(lambda: group.seen.fatal)
        assert group.seen.fatal == [raised.value]


def test_a_frozen_worker_ends_everybody_and_hears_why_when_it_goes_on(group: Group) -> None:
    hub = group.hub(heartbeat_timeout_s=0.8)
    code = f"line({hub.address[1]}, 1, 0.8).arm(str); say('in'); threading.Event().wait()"
    with Joining(hub, 2) as joining, Child(code) as child:
        assert child.hear() == "in"
        _, seen = group.line(hub, member(2), heartbeat_timeout_s=0.8)
        joining.wait()
        hub.arm(lambda: "")
        eventually(lambda: hub._by_rank[1].armed)
        child.signal(signal.SIGSTOP)
        sentence = f"lost rank 1 (child-1, pid {child.pid}): no sign of life for 0.8 s"
        assert group.seen.wait_fatal().message == sentence
        assert seen.wait_fatal().message == sentence
        child.signal(signal.SIGCONT)
        assert child.hear() == f"FATAL 5 {sentence}"


def test_a_silent_worker_is_not_lost_before_both_sides_are_armed(group: Group) -> None:
    hub = group.hub(heartbeat_timeout_s=0.4)
    with Raw(hub.address) as raw, Joining(hub, 1) as joining:
        raw.enter(member(1))
        joining.wait()
        hub.arm(lambda: "")
        assert hub.wait_verdict(1.2) is None
        raw.say("ARMED")
        assert "no sign of life for 0.4 s" in group.seen.wait_fatal().message
        assert raw.hear("ABORT")["code"] == 5


def test_a_worker_that_gives_up_reaches_everybody_with_its_own_code(group: Group) -> None:
    hub, lines, seen = group.joined(3)
    lines[1].abort(DestinationError("no space on /local", hint="free some"))
    with pytest.raises(DestinationError) as raised:
        hub.gather("READY", PATIENCE_S)
    assert raised.value.message.startswith("rank 2 (host-2, pid ")
    assert raised.value.message.endswith("): no space on /local")
    assert raised.value.hint == "free some"
    for witness in (seen[0], seen[2]):
        assert witness.wait_fatal().message == raised.value.message
        assert witness.wait_fatal().exit_code == 7
    assert seen[1].fatal == []


@pytest.mark.parametrize("attempt", range(5))
def test_the_last_words_of_a_dying_worker_win_over_its_death(group: Group, attempt: int) -> None:
    hub = group.hub()
    code = (
        "from packcast.errors import CheckpointError\n"
        f"end = line({hub.address[1]}, 1, 3); end.await_joined(20); sys.stdin.readline()\n"
        "end.abort(CheckpointError('bad header')); os._exit(3)"
    )
    with Joining(hub, 1) as joining, Child(code) as child:
        joining.wait()
        # The worker leaves with unread messages in its socket, so its host resets the connection.
        for _ in range(200):
            hub.broadcast({"kind": "NOISE", "text": "x" * 10_000})
        child.process.communicate("go\n", timeout=PATIENCE_S)
        assert group.seen.wait_fatal().message == f"rank 1 (child-1, pid {child.pid}): bad header"


def test_a_reason_of_its_own_wins_over_what_it_led_to(group: Group) -> None:
    hub = group.hub()
    with ExitStack() as stack, Joining(hub, 3) as joining:
        raws = [stack.enter_context(Raw(hub.address)) for _ in range(3)]
        for rank, raw in enumerate(raws, 1):
            raw.enter(member(rank))
        joining.wait()
        release = threading.Event()
        hub._loop.post(partial(wait_for, release))
        raws[0].say("ABORT", code=5, message="the collective broke")
        raws[1].say("ABORT", code=7, message="no space")
        raws[2].sock.close()
        release.set()
        assert group.seen.wait_fatal().message.endswith("no space")


def test_on_fatal_is_called_once_on_the_control_thread_with_no_lock_held(group: Group) -> None:
    hub, lines, _ = group.joined(3)
    free: list[bool] = []

    def try_the_locks() -> None:
        # Would wait for ever, were the control thread in on_fatal with a lock.
        with pytest.raises(PackcastError):
            hub.gather("READY", 1.0)
        hub.abort(TransferError("too"))
        free.append(True)

    def on_fatal(error: PackcastError) -> None:
        group.seen.on_fatal(error)
        other = threading.Thread(target=try_the_locks)
        other.start()
        other.join(PATIENCE_S)
        hub.abort(TransferError("again"))
        hub.close()

    hub._on_fatal = on_fatal
    for line in lines:
        line.abort(TransferError("everybody at once"))
    eventually(lambda: free)
    hub.close()
    assert len(group.seen.fatal) == 1
    assert group.seen.threads[0].name == "packcast-hub"


def test_a_verdict_from_before_anybody_waits_is_raised_by_whoever_comes(group: Group) -> None:
    hub, lines, _ = group.joined(1)
    lines[0].send({"kind": "READY"})
    lines[0].abort(TransferError("gone"))
    error = group.seen.wait_fatal()
    for call in (
        lambda: hub.gather("READY", None),
        lambda: hub.broadcast({"kind": "COMMIT"}),
        hub.committed,
    ):
        with pytest.raises(TransferError) as raised:
            call()
        assert raised.value is error


def test_the_senders_own_abort_reaches_all_and_is_raised_but_not_fatal(group: Group) -> None:
    hub, lines, seen = group.joined(2)
    error = CheckpointError("model.safetensors changed")
    hub.abort(error)
    hub.abort(TransferError("something else"))
    for line, witness in zip(lines, seen, strict=True):
        assert witness.wait_fatal().message == "model.safetensors changed"
        with pytest.raises(CheckpointError):
            line.expect("COMMIT", PATIENCE_S)
    with pytest.raises(CheckpointError) as raised:
        hub.gather("READY", PATIENCE_S)
    assert raised.value is error
    assert group.seen.fatal == []


@pytest.mark.parametrize(
    "rubbish", [b"\x7f\xff\xff\xff", b"\x00\x00\x00\x02[]", b'\x00\x00\x00\x10{"kind":"HELLO"}']
)
def test_a_worker_that_breaks_the_protocol_is_lost_by_name(group: Group, rubbish: bytes) -> None:
    hub = group.hub()
    with Raw(hub.address) as raw, Joining(hub, 1) as joining:
        raw.enter(member(1))
        joining.wait()
        raw.sock.sendall(rubbish)
        assert "lost rank 1 (host-a, pid " in group.seen.wait_fatal().message
        assert "it broke the protocol" in group.seen.wait_fatal().message


def test_a_worker_that_floods_us_is_lost(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "MAX_UNREAD_MESSAGES", 50)
    _, lines, _ = group.joined(1)
    for _ in range(51):
        lines[0].send({"kind": "CHATTER"})
    assert "more messages than anybody waits for" in group.seen.wait_fatal().message


def test_a_worker_that_reads_nothing_stalls_nobody_and_is_lost(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "MAX_UNSENT_NBYTES", 16 << 20)
    hub = group.hub()
    with Raw(hub.address) as raw, Joining(hub, 2) as joining:
        raw.enter(member(1))
        line, seen = group.line(hub, member(2))
        joining.wait()
        for _ in range(3):
            with suppress(TransferError):  # the verdict, should it be here before the OFFER
                hub.broadcast({"kind": "OFFER", "text": "x" * (7 << 20)})
                line.expect("OFFER", PATIENCE_S)
        assert seen.wait_fatal().message.endswith("it does not take in what is sent to it")


def test_a_control_thread_that_was_busy_reads_before_it_blames(group: Group) -> None:
    hub = group.hub(heartbeat_timeout_s=0.8)
    with Joining(hub, 1) as joining:
        line, _ = group.line(hub, member(1), heartbeat_timeout_s=60.0)
        joining.wait()
        line.arm(lambda: "")
        hub.arm(lambda: "")
        eventually(lambda: hub._by_rank[1].armed)

    def be_busy() -> None:
        for _ in range(12):
            time.sleep(0.12)
            hub._clock.read()

    hub._loop.post(be_busy)
    assert hub.wait_verdict(2.0) is None
    assert alive(hub, [line])


def test_a_bug_in_the_control_thread_ends_everybody_instead_of_hanging(group: Group) -> None:
    hub, _, seen = group.joined(1)

    def bug() -> None:
        raise KeyError("bug")

    hub._loop.post(bug)
    with pytest.raises(PackcastError, match="the control channel failed: KeyError"):
        hub.gather("READY", None)
    assert group.seen.wait_fatal().exit_code == 1
    assert "KeyError" in seen[0].wait_fatal().message


def test_callbacks_that_fail_cost_only_what_they_would_have_said(group: Group) -> None:
    hub, lines, _ = group.joined(1)
    hub.set_progress(lambda: {"rate": 1 // 0})
    hub.arm(lambda: str(1 // 0))
    assert alive(hub, lines)
    lines[0].close()
    assert group.seen.wait_fatal().message.startswith("lost rank 1 (host-1, pid ")


# The end.


def test_after_the_commitment_a_loss_is_noted_and_the_others_go_on(group: Group) -> None:
    hub = group.hub()
    code = f"line({hub.address[1]}, 2, 3); say('in'); threading.Event().wait()"
    with Joining(hub, 3) as joining, Child(code) as child:
        assert child.hear() == "in"
        pairs = [group.line(hub, member(rank, host=f"host-{rank}")) for rank in (1, 3)]
        joining.wait()
        hub.committed()
        hub.broadcast({"kind": "COMMIT"})
        child.signal(signal.SIGKILL)
        pairs[0][0].send({"kind": "PUBLISHED"})
        pairs[1][0].expect("COMMIT", PATIENCE_S)
        pairs[1][0].abort(DestinationError("the rename failed"))
        assert sorted(hub.gather("PUBLISHED", PATIENCE_S)) == [1]
        assert sorted(hub.lost) == [2, 3]
        assert hub.lost[2] == f"lost rank 2 (child-2, pid {child.pid})"
        assert hub.lost[3].endswith("the rename failed")
    assert [seen.fatal for seen in (group.seen, pairs[0][1], pairs[1][1])] == [[], [], []]


def test_a_worker_that_published_and_died_has_published(group: Group) -> None:
    hub, lines, _ = group.joined(1)
    hub.committed()
    lines[0].send({"kind": "PUBLISHED"})
    lines[0].abort(TransferError("after all"))
    eventually(lambda: hub.lost)
    assert sorted(hub.gather("PUBLISHED", PATIENCE_S)) == [1]
    assert hub.gather("PUBLISHED", PATIENCE_S) == {}


@pytest.mark.parametrize("first", ["hub", "lines", "both"])
def test_good_byes_in_any_order_are_no_death(group: Group, first: str) -> None:
    hub, lines, seen = group.joined(2)
    hub.committed()
    hub.broadcast({"kind": "COMMIT"})
    for line in lines:
        line.expect("COMMIT", PATIENCE_S)
        line.send({"kind": "PUBLISHED"})
    hub.gather("PUBLISHED", PATIENCE_S)
    hub.broadcast({"kind": "DONE"})
    ends = {"hub": [hub, *lines], "lines": [*lines, hub], "both": [lines[0], hub, lines[1]]}[first]
    if first == "both":
        threads = [threading.Thread(target=end.close) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    for end in ends:
        end.close()
    assert [witness.fatal for witness in (group.seen, *seen)] == [[], [], []]
    assert hub.lost == {}
    assert [line.lost for line in lines] == [None, None]
    if first == "hub":
        lines[0].expect("DONE", PATIENCE_S)


def test_a_worker_that_says_good_bye_too_early_is_lost(group: Group) -> None:
    hub, lines, _ = group.joined(2)
    lines[0].close()
    assert group.seen.wait_fatal().message.endswith("it left before the end")
    with pytest.raises(TransferError):
        hub.gather("READY", PATIENCE_S)


def test_who_waits_on_a_closed_hub_is_told(group: Group) -> None:
    hub, _, _ = group.joined(1)
    threading.Timer(0.1, hub.close).start()
    with pytest.raises(TransferError, match="closed"):
        hub.gather("READY", None)
