"""Frames, limits, members and proofs: what comes from a hostile peer is a ValueError, no more."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcast.errors import DestinationError, PackcastError, TransferError
from packcast.group import auth
from packcast.group.clock import AwakeClock, Deadline
from packcast.group.member import Member
from packcast.group.roster import assign_ranks, missing, refusal
from packcast.group.wire import (
    BEFORE_PROOF,
    FROM_SENDER,
    FROM_WORKER,
    FrameReader,
    Limits,
    WireError,
    encode_frame,
    error_message,
    error_of,
)
from tests.group.control_helpers import member


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@given(st.lists(st.integers(1, 40), max_size=30), st.dictionaries(st.text(), st.text(), max_size=4))
def test_messages_survive_any_cut_of_the_stream(cuts: list[int], fields: dict[str, str]) -> None:
    sent = [{"kind": f"K{i}", "fields": fields} for i in range(3)]
    stream = b"".join(encode_frame(message, FROM_WORKER) for message in sent)
    reader, got = FrameReader(FROM_WORKER), []
    for nbytes in [*cuts, len(stream)]:
        reader.feed(stream[:nbytes])
        stream = stream[nbytes:]
        while (message := reader.next_message()) is not None:
            got.append(message)
    assert got == sent


@given(st.binary(max_size=300))
def test_garbage_gives_a_wire_error_and_nothing_worse(garbage: bytes) -> None:
    reader = FrameReader(BEFORE_PROOF)
    reader.feed(garbage)
    try:
        while reader.next_message() is not None:
            pass
    except WireError:
        pass


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"kind":3}',
        b'{"kind":"A","x":NaN}',
        b'{"kind":"A","x":-Infinity}',
        b'{"kind":"\xff"}',
        b"[" * 15_000,
        b'{"kind":"A","x":' + b"9" * 10_000 + b"}",
        b'{"kind":"' + b"A" * 100 + b'"}',
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    reader = FrameReader(BEFORE_PROOF)
    reader.feed(frame(body))
    with pytest.raises(WireError):
        reader.next_message()


def test_an_oversized_message_is_refused_by_its_length_alone() -> None:
    reader = FrameReader(FROM_WORKER)
    reader.feed((1 << 20).to_bytes(4, "big") + b'{"kind":"READY"')
    with pytest.raises(WireError, match="over the limit"):
        reader.next_message()


def test_only_the_kinds_that_may_be_large_are_taken_in_large() -> None:
    text = "x" * (1 << 20)
    reader = FrameReader(FROM_WORKER)
    reader.feed(encode_frame({"digests": text, "kind": "PROVED"}, FROM_WORKER))
    assert reader.next_message() == {"kind": "PROVED", "digests": text}
    reader.feed((17 << 20).to_bytes(4, "big") + b'{"kind":"PROVED"')
    with pytest.raises(WireError):
        reader.next_message()


def test_a_kind_that_is_written_twice_does_not_lift_the_limit() -> None:
    reader = FrameReader(Limits(100, {"PROVED": 10_000}))
    reader.feed(frame(b'{"kind":"PROVED","x":"' + b"x" * 200 + b'","kind":"READY"}'))
    with pytest.raises(WireError):
        reader.next_message()


def test_a_text_takes_no_more_bytes_on_the_wire_than_in_its_file() -> None:
    text = json.dumps({"workflow": "\U0001f600é\u2028" * 1000}, ensure_ascii=False)
    body = encode_frame({"kind": "OFFER", "header": text}, FROM_SENDER)
    assert len(body) < len(text.encode()) + 100


def test_bytes_of_a_path_that_are_no_text_survive_the_wire() -> None:
    message = error_message("ABORT", DestinationError("/data/\udce9\U0001f600: no space"))
    reader = FrameReader(FROM_WORKER)
    reader.feed(encode_frame(message, FROM_WORKER))
    assert reader.next_message() == message


def test_the_longest_sentence_fits_before_the_proof() -> None:
    error = DestinationError("\U0001f600" * 9999, hint="\U0001f600" * 9999)
    assert len(encode_frame(error_message("REFUSED", error), BEFORE_PROOF)) < BEFORE_PROOF.most


def test_what_came_before_a_fault_still_counts() -> None:
    reader = FrameReader(FROM_WORKER)
    reader.feed(encode_frame({"kind": "ABORT"}, FROM_WORKER) + frame(b"rubbish"))
    assert reader.next_message() == {"kind": "ABORT"}
    with pytest.raises(WireError):
        reader.next_message()


def test_a_message_over_its_limit_is_not_even_sent() -> None:
    with pytest.raises(PackcastError, match="over its limit"):
        encode_frame({"kind": "READY", "x": "x" * 70_000}, FROM_WORKER)


def test_an_error_keeps_its_code_sentence_and_hint_on_the_way() -> None:
    message = error_message("ABORT", DestinationError("no space", hint="free some"))
    error = error_of(message, said_by="rank 3 (b, pid 1)")
    assert isinstance(error, DestinationError)
    assert error.message == "rank 3 (b, pid 1): no space"
    assert error.hint == "free some"
    again = error_of(error_message("ABORT", error), said_by="rank 3 (b, pid 1)")
    assert again.message == error.message


@pytest.mark.parametrize("code", [0, -1, 256, True, "7", None, 1 << 70])
def test_a_hostile_exit_code_becomes_a_failed_transfer(code: object) -> None:
    error = error_of({"kind": "ABORT", "code": code, "message": "x\x1b[2J\n" + "y" * 9999})
    assert isinstance(error, TransferError)
    assert error.message.isprintable()
    assert len(error.message) < 3000


def test_a_member_is_the_same_after_the_wire() -> None:
    me = member(
        3, local_rank=1, gpus=("GPU-1",), checkpoint="/a/b", fingerprint="f", extra={"a": 1}
    )
    assert Member.from_json(json.loads(json.dumps(me.to_json()))) == me
    assert me.label.startswith("rank 3 (host-a, pid ")


def test_a_member_with_an_unprintable_path_can_still_introduce_itself() -> None:
    me = member(3, checkpoint="/a/\udcff\n")
    assert Member.from_json(me.to_json()).checkpoint == r"/a/\udcff\n"


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "boss"),
        ("role", None),
        ("rank", -1),
        ("rank", True),
        ("rank", 1 << 40),
        ("rank", "1"),
        ("host", "a\x1b[2J"),
        ("host", "h" * 300),
        ("host", None),
        ("pid", 1.5),
        ("local_rank", -2),
        ("device", ["cuda"]),
        ("gpus", "GPU-1"),
        ("gpus", ["g"] * 65),
        ("gpus", [7]),
        ("checkpoint", 7),
        ("checkpoint", "p" * 5000),
        ("fingerprint", {}),
        ("extra", []),
        ("extra", {"a": "x" * 10_000}),
        ("extra", {"a": nested(100_000)}),
    ],
)
def test_a_hostile_member_is_a_value_error(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Member.from_json({**member(1).to_json(), field: value})


def test_proofs_differ_by_side_token_nonces_and_transfer() -> None:
    said: list[tuple[Any, ...]] = [
        (b"t", "a", "b", "x"),
        (b"u", "a", "b", "x"),
        (b"t", "c", "b", "x"),
        (b"t", "a", "c", "x"),
        (b"t", "a", "b", "y"),
    ]
    proofs = {auth.worker_proof(*words) for words in said} | {
        auth.sender_proof(*words) for words in said
    }
    assert len(proofs) == 10


def test_a_proof_that_is_no_text_proves_nothing() -> None:
    right = auth.worker_proof(b"t", "a", "b", "x")
    assert auth.same_proof({"proof": right}, right)
    assert not any(
        auth.same_proof({"proof": wrong}, right) for wrong in (None, 1, "", "\xe9", right[:-1])
    )


def test_ranks_that_were_asked_for_are_kept_and_the_rest_go_by_host_then_arrival() -> None:
    there = [
        member(host="b", pid=1),
        member(2, host="z"),
        member(host="a"),
        member(host="b", pid=2),
    ]
    ranked = assign_ranks(4, there)
    assert [(m.rank, m.host, m.pid) for m in ranked if m.host == "b"] == [(3, "b", 1), (4, "b", 2)]
    assert [m.rank for m in ranked] == [3, 2, 1, 4]


def test_the_missing_are_named_and_so_are_those_who_are_there() -> None:
    me = member(0, role="send", pid=1)
    error = missing(frozenset(range(4)), me, [member(2, pid=2)], 300.0)
    assert error.message.startswith("rank 1, rank 3 have not joined within 5 min")
    assert error.message.endswith("here: rank 0 (host-a, pid 1), rank 2 (host-a, pid 2)")
    assert missing(1, me, [], 9.0).message.startswith("1 of 1 worker has not joined")
    assert "and 92 more" in missing(frozenset(range(101)), me, [], 9.0).message


def test_only_a_launchers_twin_is_fatal() -> None:
    me = member(0, role="send")
    under_launcher = refusal(frozenset({0, 1, 2}), me, [member(1)], member(1))
    by_hand = refusal(2, me, [member(1)], member(1))
    assert under_launcher is not None
    assert under_launcher.fatal
    assert by_hand is not None
    assert not by_hand.fatal


def test_time_asleep_counts_as_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock, deadline = AwakeClock(0.5), Deadline(3.0)
    now = 60.0
    assert clock.read() == 0.5
    assert deadline.left_s() > 0
    for _ in range(20):
        now += 0.2
        deadline.left_s()
    assert clock.read() == 1.0
    assert deadline.left_s() <= 0
