"""Frames, models, proofs and membership: whatever a hostile host sends is one error, no more."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import packcast.transfer.protocol as transfer
from packcast.control import auth, messages
from packcast.control.clock import AwakeClock
from packcast.control.frames import (
    HEARTBEAT,
    FrameReader,
    Progress,
    ProtocolError,
    heartbeat_frame,
    progress_of,
)
from packcast.control.membership import Membership
from packcast.control.messages import (
    Abort,
    Bye,
    Commit,
    Hello,
    Joined,
    JoinStatus,
    Message,
    OfferMessage,
    Welcome,
    decode,
    limits_by,
)
from packcast.control.rank_info import RankInfo
from packcast.errors import DestinationError, PackcastError, TransferError
from packcast.io.memory import MemoryLimit
from tests.control.helpers import ANYTHING, Ping, Pong, info

# The models with their fields, but for the bench's, whose answers are free.
MODELS = [cls for kind, cls in sorted(messages._kinds.items()) if kind < 64]


def frames_in(stream: bytes, limits: dict[int, int] = ANYTHING) -> Iterator[tuple[int, bytes]]:
    reader = FrameReader(limits)
    reader.feed(stream)
    while (frame := reader.next_frame()) is not None:
        yield frame


def received(message: Message) -> Message:
    ((kind, body),) = frames_in(message.encode())
    return decode(kind, body)


# Frames.


@given(st.lists(st.integers(1, 40), max_size=30), st.text(max_size=50))
def test_messages_survive_any_cut_of_the_stream(cuts: list[int], text: str) -> None:
    stream = Ping(text=text).encode() * 3 + heartbeat_frame(Progress(1, 2, 3.0))
    reader, got = FrameReader(ANYTHING), []
    for nbytes in [*cuts, len(stream)]:
        reader.feed(stream[:nbytes])
        stream = stream[nbytes:]
        while (frame := reader.next_frame()) is not None:
            got.append(frame)
    assert [decode(*frame) for frame in got[:3]] == [Ping(text=text)] * 3
    assert progress_of(got[3][1]) == Progress(1, 2, 3.0)


@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error_and_nothing_worse(garbage: bytes) -> None:
    try:
        for kind, body in frames_in(garbage, limits_by("worker")):
            _ = progress_of(body) if kind == HEARTBEAT else decode(kind, body)
    except ProtocolError:
        pass


def test_what_is_too_large_or_unexpected_is_refused_by_its_header_alone() -> None:
    limits = limits_by("worker")
    for nbytes, kind in ((1 << 20, transfer.Ready.kind), (3, OfferMessage.kind), (3, 255)):
        with pytest.raises(ProtocolError, match=r"over the limit|unexpected"):
            list(frames_in(nbytes.to_bytes(4, "big") + bytes([kind]), limits))


def test_what_came_before_a_fault_still_counts() -> None:
    frames = frames_in(Bye().encode() + b"\xff" * 20, limits_by("worker"))
    assert decode(*next(frames)) == Bye()
    with pytest.raises(ProtocolError):
        next(frames)


@given(
    st.integers(0, 1 << 70),
    st.integers(0, 1 << 70),
    st.floats(0, 1e9),
    st.sampled_from(["", "h2d", "broadcast"]),
)
def test_a_heartbeat_has_one_size_whatever_it_says(
    done: int, moved: int, patience: float, stage: str
) -> None:
    ((kind, body),) = frames_in(heartbeat_frame(Progress(done, moved, patience, stage)))
    assert (kind, len(body)) == (HEARTBEAT, 32)
    assert progress_of(body).done == min(done, (1 << 64) - 1)
    assert 0 <= progress_of(body).patience_s <= min(patience, 600.0)
    assert progress_of(body).stage == stage


@pytest.mark.parametrize("stage", [b"\x1b[31m", b"two words", b"\xff" * 12])
def test_a_heartbeat_with_a_stage_that_is_no_word_is_refused(stage: bytes) -> None:
    with pytest.raises(ProtocolError):
        progress_of(bytes(20) + stage.ljust(12, b"\0"))


# Models.


RANKS = st.integers(0, 1_000_000)
CODES = st.integers(1, 255)
SHORT = st.text(max_size=64)
SENTENCES = st.none() | st.text(max_size=100)
NAMES = st.text(st.characters(exclude_categories=("C", "Z")), max_size=255)
DIGESTS = st.text("0123456789abcdef", min_size=1, max_size=128)
NBYTES = st.integers(0, 1 << 63)
INODES = st.integers(0, (1 << 64) - 1)
LIMITS = st.builds(MemoryLimit, key=st.just("0:1"), free=NBYTES, name=st.just("a limit"))
SECONDS = st.floats(0, 1e12)
INFOS = st.builds(
    RankInfo,
    role=st.sampled_from(["send", "recv"]),
    rank=st.none() | RANKS,
    host=NAMES,
    boot_id=NAMES,
    pid=st.integers(0, 1 << 31),
    local_rank=st.none() | RANKS,
    device=st.just("cuda:1"),
    gpus=st.lists(NAMES, max_size=64).map(tuple),
    gpu_free=st.lists(st.none() | NBYTES, max_size=64).map(tuple),
    memory=st.lists(LIMITS, max_size=8).map(tuple),
    checkpoint=st.none() | NAMES,
    fingerprint=st.none() | NAMES,
)
FIGURES = st.builds(transfer.StageFigures, nbytes=NBYTES, seconds=SECONDS, waiting_seconds=SECONDS)
FIELDS: dict[type[Message], dict[str, st.SearchStrategy[Any]]] = {
    Hello: {"info": INFOS, "heartbeat_timeout_s": st.floats(1e-3, 1e9)},
    Welcome: {"sender": INFOS, "heartbeat_interval_s": st.floats(1e-3, 1e9)},
    Joined: {"rank": RANKS, "world_size": st.integers(1, 1_000_001)},
    Abort: {"code": CODES, "message": st.text(max_size=100), "hint": SENTENCES},
    Bye: {},
    Commit: {"code": CODES},
    OfferMessage: {"compressed": st.binary()},
    JoinStatus: {
        "joined": RANKS,
        "wanted": st.integers(1, 1_000_000),
        "missing": st.lists(RANKS, max_size=8).map(tuple),
        "left_s": st.floats(0, 1e9),
    },
    transfer.RankAssignment: {
        "rank": RANKS,
        "device": st.just("cpu") | st.integers(0, 99).map("cuda:{}".format),
        "ranks_on_host": st.integers(1, 1_000_001),
        "readers_on_host": st.integers(1, 1_000_001),
    },
    transfer.Prepared: {
        "copy_id": st.none() | st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
        "directory": st.none() | st.tuples(INODES, INODES),
        "owns": st.booleans(),
    },
    transfer.WritingShare: {"index": st.integers(0, 499), "count": st.integers(500, 1_000_001)},
    transfer.Ready: {"plan": DIGESTS, "sums": st.booleans()},
    transfer.Go: {
        "host": st.just("fe80::1%eth0"),
        "port": st.integers(1, 65535),
        "sums": st.booleans(),
    },
    transfer.Moved: {},
    transfer.Close: {},
    transfer.Proved: {
        "digests": st.none() | st.lists(DIGESTS),
        "seconds": SECONDS,
        "stages": st.dictionaries(SHORT, FIGURES, max_size=16),
        "peak_device_bytes": NBYTES,
        "pinned_bytes": NBYTES,
        "device": SHORT,
        "pool": SHORT,
        "difference": SENTENCES,
    },
    transfer.Published: {
        "result": st.dictionaries(st.text(), st.none() | st.integers() | st.text()),
        "code": CODES,
        "error": SENTENCES,
        "hint": SENTENCES,
    },
    transfer.Done: {"code": CODES, "error": SENTENCES, "hint": SENTENCES},
}


def test_every_message_has_its_property_tests() -> None:
    assert list(FIELDS) == MODELS


@given(st.data())
@settings(max_examples=120)
def test_every_message_is_the_same_after_the_wire(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(MODELS))
    message = data.draw(st.builds(model, **FIELDS[model]))
    assert received(message) == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.sampled_from(MODELS), st.data())
@settings(max_examples=120)
def test_any_json_is_a_message_within_its_bounds_or_one_error(
    model: type[Message], data: st.DataObject
) -> None:
    names = st.sampled_from([*model.model_fields, "more"])
    value = data.draw(JSON | st.dictionaries(names, JSON, max_size=8))
    try:
        message = decode(model.kind, json.dumps(value).encode())
    except ProtocolError as fault:
        error = str(fault)
    else:
        error = ""
        assert received(message) == message
    assert error.isprintable()
    assert len(error) < 1000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"number":NaN}',
        b'{"number":true}',
        b'{"number":"1"}',
        b'{"number":1.5}',
        b'{"number":-1}',
        b'{"number":1001}',
        b'{"number":' + b"9" * 100_000 + b"}",
        b'{"number":1,"other":2}',
        b"[" * 100_000,
    ],
)
def test_what_a_model_does_not_declare_is_one_error(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="a malformed Pong"):
        decode(Pong.kind, body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", "x y"),
        ("host", ""),
        ("host", 7),
        ("port", 0),
        ("port", 65536),
        ("port", "29400"),
        ("port", 10**30),
        ("sums", 1),
        ("sums", None),
    ],
)
def test_a_malformed_go_is_one_error_that_names_the_field(field: str, value: Any) -> None:
    go = {"host": "fe80::1%eth0", "port": 29400, "sums": True}
    assert decode(transfer.Go.kind, json.dumps(go).encode()) == transfer.Go(**go)
    with pytest.raises(ProtocolError, match=f"a malformed Go: {field}: "):
        decode(transfer.Go.kind, json.dumps(go | {field: value}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "boss"),
        ("rank", -1),
        ("rank", True),
        ("rank", 1 << 40),
        ("host", "a\x1b[2J"),
        ("host", "h" * 300),
        ("host", None),
        ("pid", 1.5),
        ("device", ["cuda"]),
        ("gpus", "GPU-1"),
        ("gpus", ["g"] * 65),
        ("gpus", [7]),
        ("checkpoint", "p" * 5000),
        ("fingerprint", {}),
        ("friend", 1),
    ],
)
def test_a_hostile_introduction_is_one_error(field: str, value: object) -> None:
    good = Hello(info=info(1, gpus=("GPU-1",)), heartbeat_timeout_s=3.0)
    hello = json.loads(good.model_dump_json())
    hello["info"][field] = value
    with pytest.raises(ProtocolError, match=f"a malformed Hello: info.{field}"):
        decode(Hello.kind, json.dumps(hello).encode())


def test_a_message_over_its_limit_is_not_even_sent() -> None:
    with pytest.raises(PackcastError, match="over its limit"):
        transfer.Published(result={"x": "x" * 70_000}, code=0, error=None, hint=None).encode()


def test_only_the_sender_may_send_what_is_large() -> None:
    assert limits_by("sender")[OfferMessage.kind] > 50 << 20
    assert max(limits_by("worker").values()) <= 64 << 20
    assert OfferMessage.kind not in limits_by("worker")


# Errors and offers.


def test_an_error_keeps_its_code_sentence_and_hint_on_the_way() -> None:
    error = DestinationError("no space", hint="free some")
    once = received(Abort.of(error))
    assert isinstance(once, Abort)
    told = once.error(said_by="rank 3 (b, pid 1)")
    assert isinstance(told, DestinationError)
    assert (told.message, told.hint) == ("rank 3 (b, pid 1): no space", "free some")
    assert Abort.of(told).error(said_by="rank 3 (b, pid 1)").message == told.message


@given(st.text(st.characters(exclude_categories=())), st.none() | st.text())
def test_any_sentence_fits_and_is_fit_to_print(message: str, hint: str | None) -> None:
    abort = received(Abort.of(DestinationError("/data/\udce9" + message * 50, hint=hint)))
    assert isinstance(abort, Abort)
    assert abort.error().message.isprintable()
    assert len(abort.encode()) < Abort.limit


def test_a_sentence_that_others_make_is_fit_to_print() -> None:
    body = json.dumps({"code": 5, "message": "\x1b]0;owned\x07bad\nnews", "hint": "\x00"})
    abort = decode(Abort.kind, body.encode())
    assert isinstance(abort, Abort)
    assert abort.message.isprintable()
    assert "bad news" in abort.message
    assert isinstance(abort.error(), TransferError)


def test_an_offer_travels_compressed_and_is_inflated_within_a_bound() -> None:
    text = json.dumps({"files": [["model.safetensors", 123]] * 1000}).encode()
    message = OfferMessage.of(text)
    assert len(message.encode()) < len(text) / 10
    assert received(message) == message
    assert message.content() == text
    with pytest.raises(ProtocolError, match="over the limit"):
        OfferMessage.of(bytes(10_000)).content(limit=9_999)


@given(st.binary(max_size=100))
def test_what_is_no_offer_is_one_error(body: bytes) -> None:
    for compressed in (body, zlib.compress(body)[:-1], zlib.compress(body) + b"x"):
        message = decode(OfferMessage.kind, compressed)
        assert isinstance(message, OfferMessage)
        with pytest.raises(ProtocolError):
            message.content()


# The proof.


def test_proofs_differ_by_token_nonces_transfer_and_protocol_and_are_not_reflected() -> None:
    first, second = (auth.Challenge.new(name, wants_token=True) for name in ("a", "b"))
    proof = auth.Proof.new(b"t", first)
    assert auth.Proof.parse(proof.body) == proof
    assert auth.Challenge.parse(first.body) == first
    assert proof.is_right(b"t", first)
    assert not proof.is_right(b"u", first)
    assert not proof.is_right(None, first)
    assert not proof.is_right(b"t", second)
    assert not proof.is_right(b"t", auth.Challenge.new("a", wants_token=True))
    assert not auth.Proof(9, proof.nonce, proof.digest).is_right(b"t", first)
    answer = proof.answer(b"t", first)
    assert proof.is_answered(answer, b"t", first)
    assert not proof.is_answered(proof.digest, b"t", first)
    assert not proof.is_answered(answer, b"u", first)
    assert not auth.Proof.new(b"t", first).is_answered(answer, b"t", first)


@given(st.binary(max_size=200))
def test_what_is_no_challenge_or_proof_is_one_error(body: bytes) -> None:
    for parse in (auth.Challenge.parse, auth.Proof.parse):
        try:
            parse(body)
        except ProtocolError:
            pass
        else:
            assert len(body) == 66, "a proof of the right size is compared, not parsed"


# Membership and time.


def membership(expected: int | frozenset[int], *workers: Any) -> Membership:
    made = Membership(expected, info(0, role="send", pid=1))
    for key, worker in enumerate(workers):
        made.add(key, worker)
    return made


def test_ranks_that_were_asked_for_are_kept_and_the_rest_go_by_host_then_arrival() -> None:
    there = [
        info(host="b", pid=1),
        info(2, host="z"),
        info(host="a"),
        info(host="b", pid=2),
    ]
    ranked = list(membership(4, *there).ranked().values())
    assert [(w.rank, w.host, w.pid) for w in ranked if w.host == "b"] == [(3, "b", 1), (4, "b", 2)]
    assert [w.rank for w in ranked] == [3, 2, 1, 4]


def test_the_missing_are_named_and_so_are_those_who_are_there() -> None:
    error = membership(frozenset(range(4)), info(2, pid=2)).missing(300.0)
    assert error.message.startswith("rank 1, rank 3 have not joined within 5 min")
    assert error.message.endswith("here: rank 0 (host-a, pid 1), rank 2 (host-a, pid 2)")
    assert membership(1).missing(9.0).message.startswith("1 of 1 worker has not joined")
    assert "and 92 more" in membership(frozenset(range(101))).missing(9.0).message


def test_only_a_launchers_twin_is_fatal() -> None:
    under_launcher = membership(frozenset({0, 1, 2}), info(1)).refusal(info(1))
    by_hand = membership(2, info(1)).refusal(info(1))
    assert under_launcher is not None
    assert under_launcher.fatal
    assert by_hand is not None
    assert not by_hand.fatal


def test_time_asleep_counts_as_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = AwakeClock(0.5)
    now = 60.0
    assert clock.read() == 0.5
    now += 0.25
    assert clock.read() == 0.75
