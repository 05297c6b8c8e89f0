"""What the ranks tell each other at the end, and the verdict that is made of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from packcast.errors import (
    DestinationError,
    Interrupted,
    PackcastError,
    TransferError,
    VerificationError,
)
from packcast.io.pool import pool_kind
from packcast.io.sinks.discard import DiscardSink
from packcast.packed.counters import Counters
from packcast.report import Report, StageReport
from packcast.settings import Settings
from packcast.transfer.data_plane import DataPhaseResult
from packcast.transfer.protocol import Proved, Published
from packcast.transfer.results import (
    agreed_digests,
    done_for,
    facts_of,
    failure_told_by,
    failures_of,
    make_report,
    proof_of,
    published_by,
    rank_reports,
    stage_reports,
)
from tests.transfer.offers import member, offer_of, sidecar, valid_offer

OFFER = offer_of([sidecar("a", 3), sidecar("b", 5)])


def moved(counters: Counters) -> DataPhaseResult:
    return DataPhaseResult(counters, 1.0, 2.0, ["d1", "d2"], 11, 12)


GOOD = Published(result={}, error=None, hint=None, code=0)
PROVED = Proved(
    digests=["d1", "d2"],
    seconds=1.0,
    stages={},
    peak_device_bytes=0,
    pinned_bytes=0,
    device="cpu",
    pool="native",
    difference=None,
)
DIFFERS = PROVED.model_copy(update={"difference": "b differs"})


class DifferingSink(DiscardSink):
    """One that has found something."""

    def result(self) -> dict[str, object]:
        return {"sink": "verify", "sentence": "b differs at byte 7" + "!" * 5000}


def proved(*digests: str) -> Proved:
    return PROVED.model_copy(update={"digests": list(digests)})


def failed(error: str | None, code: int) -> Published:
    return GOOD.model_copy(update={"error": error, "code": code})


def test_who_wrote_a_share_has_no_copy_where_its_owner_has_not_published() -> None:
    proofs = dict.fromkeys((1, 2, 3), PROVED)
    said = {1: failed("no space", 7), 2: GOOD, 3: GOOD}
    owners = {2: 1}
    failures = failures_of([1, 2, 3], proofs, said, {}, owners)
    sentences = {rank: failure.message for rank, failure in failures.items()}
    assert sentences == dict.fromkeys((1, 2), "no space")
    told = {rank: failure_told_by(done_for(rank, owners, failures)) for rank in (1, 2, 3)}
    assert told[1] is None  # it knows
    assert told[3] is None
    assert told[2] is not None
    assert (told[2].exit_code, told[2].message) == (7, "no space")


def test_digests_that_all_found_are_the_result() -> None:
    proofs = {1: proved("d1", "d2"), 2: proved("d1", "d2")}
    for mine in (["d1", "d2"], None):
        assert agreed_digests(OFFER, mine, proofs) == {"a": "d1", "b": "d2"}


@pytest.mark.parametrize("mine", [["d1", "d2"], None])
def test_a_worker_with_other_bytes_is_named_with_the_file(mine: list[str] | None) -> None:
    with pytest.raises(TransferError, match="b: the bytes of rank 3 differ"):
        agreed_digests(OFFER, mine, {1: proved("d1", "d2"), 3: proved("d1", "d3")})


def test_where_the_sender_has_no_digests_of_its_own_it_is_not_named_as_the_measure() -> None:
    with pytest.raises(TransferError, match="from rank 1"):
        agreed_digests(OFFER, None, {3: proved("d1", "d3"), 1: proved("d1", "d2")})


@pytest.mark.parametrize("digests", [None, [], ["d1"], ["d1", "d2", "d3"]])
@pytest.mark.parametrize("mine", [["d1", "d2"], None])
def test_a_worker_without_a_digest_of_every_file_is_named(
    mine: list[str] | None, digests: list[str] | None
) -> None:
    proof = PROVED.model_copy(update={"digests": digests})
    with pytest.raises(TransferError, match="rank 2 sent no digests of the 2 files"):
        agreed_digests(OFFER, mine, {2: proof})


def test_nothing_failed_where_all_published() -> None:
    assert failures_of([1, 2], {1: PROVED, 2: PROVED}, {1: GOOD, 2: GOOD}, {}) == {}


def test_a_lost_worker_failed_for_the_reason_it_was_lost() -> None:
    failures = failures_of([1, 2], {1: PROVED, 2: PROVED}, {1: GOOD}, {2: "lost rank 2 (b, pid 7)"})
    assert list(failures) == [2]
    assert type(failures[2]) is TransferError
    assert failures[2].message == "lost rank 2 (b, pid 7)"
    assert "`packcast clean`" in str(failures[2].hint)


def test_a_worker_that_said_no_last_word_failed() -> None:
    failures = failures_of([1], {1: PROVED}, {}, {})
    assert "before it published" in failures[1].message


def test_a_worker_lost_after_it_published_did_not_fail() -> None:
    assert failures_of([1], {1: PROVED}, {1: GOOD}, {1: "lost rank 1"}) == {}


@pytest.mark.parametrize("kind", [DestinationError, TransferError, PackcastError])
def test_a_worker_that_could_not_publish_failed_with_its_own_error(
    kind: type[PackcastError],
) -> None:
    said = published_by(DiscardSink(), kind("no such luck", hint="try again"))
    failure = failures_of([1], {1: PROVED}, {1: said}, {})[1]
    assert (type(failure), failure.message, failure.hint) == (kind, "no such luck", "try again")
    said = published_by(DiscardSink(), kind("no such luck"))
    assert failures_of([1], {1: PROVED}, {1: said}, {})[1].hint is None


def test_an_interrupted_worker_failed() -> None:
    said = published_by(DiscardSink(), Interrupted("interrupted", signal_number=15))
    assert failures_of([1], {1: PROVED}, {1: said}, {})[1].exit_code == 5


def test_a_failure_without_a_code_is_still_a_failure() -> None:
    assert failures_of([1], {1: PROVED}, {1: failed("no", 0)}, {})[1].message == "no"


def test_a_code_without_a_sentence_is_a_failure_too() -> None:
    assert failures_of([1], {1: PROVED}, {1: failed("", 7)}, {})[1].exit_code == 7


def test_a_difference_is_a_failed_verification() -> None:
    failure = failures_of([1], {1: DIFFERS}, {1: GOOD}, {})[1]
    assert (type(failure), failure.message) == (VerificationError, "b differs")


def test_not_publishing_weighs_more_than_a_difference_on_one_rank() -> None:
    assert failures_of([1], {1: DIFFERS}, {1: failed("no space", 7)}, {})[1].exit_code == 7


def report_of(failures: Mapping[int, PackcastError]) -> Report:
    return make_report(
        Settings(command="send"),
        OFFER,
        moved(Counters()),
        seconds=2.0,
        ranks=[],
        digests={"a": "d1"},
        workers={},
        warnings=["w"],
        failures=failures,
        ends_cleanly=True,
    )


@pytest.mark.parametrize(
    ("failures", "exit_code"),
    [
        ({}, 0),
        ({1: VerificationError("x")}, 6),
        ({1: VerificationError("x"), 2: VerificationError("y")}, 6),
        ({1: VerificationError("x"), 2: DestinationError("y")}, 7),
        ({1: VerificationError("x"), 3: TransferError("y"), 2: DestinationError("z")}, 7),
        ({2: TransferError("x"), 3: DestinationError("y")}, 5),
        ({4: PackcastError("x"), 2: VerificationError("y")}, 1),
    ],
    ids=str,
)
def test_the_exit_code_is_the_lowest_ranks_but_a_difference_counts_last(
    failures: dict[int, PackcastError], exit_code: int
) -> None:
    report = report_of(failures)
    assert report.exit_code == exit_code
    assert report.ok is (exit_code == 0)


def test_the_report_lists_who_failed_and_why() -> None:
    assert report_of({}).error is None
    error = report_of({1: VerificationError("b differs"), 2: DestinationError("full")}).error
    assert error == "rank 1: b differs; rank 2: full"


def test_the_same_error_of_many_ranks_is_one_sentence() -> None:
    same = {rank: VerificationError("b differs at byte 7") for rank in range(1, 9)}
    assert report_of(same).error == "ranks 1-8: b differs at byte 7"
    each = {rank: VerificationError(f"b differs at byte {rank}") for rank in range(1, 600)}
    error = str(report_of(each).error)
    assert error.endswith("; rank 8: b differs at byte 8; and 591 more")


def test_the_report_says_what_was_moved_and_how() -> None:
    report = report_of({})
    assert (report.rank, report.is_sender, report.world_size) == (1, False, 2)
    assert (report.num_files, report.nbytes, report.bytes_per_second) == (2, 8, 4.0)
    assert report.pool == pool_kind()
    assert (report.peak_device_nbytes, report.peak_pinned_nbytes) == (11, 12)
    assert (report.digests, report.warnings, report.ends_cleanly) == ({"a": "d1"}, ("w",), True)
    assert (report.buffer_size, report.num_buffers, report.staging) == (
        OFFER.buffer_size,
        OFFER.num_buffers,
        OFFER.staging,
    )


def test_a_stage_lasts_from_its_first_beginning_to_its_last_end() -> None:
    counters = Counters()
    counters.add("read", 0, 10, 3.0, 4.0)
    counters.add("read", 1, 10, 1.0, 2.0)
    with counters.waiting_on("write"):
        pass
    stages = stage_reports(counters)
    assert stages["read"] == StageReport(20, 3.0, 0.0)
    assert (stages["write"].nbytes, stages["write"].seconds) == (0, 0.0)
    assert stages["write"].bytes_per_second == 0.0


def test_a_proof_travels_and_carries_what_was_counted() -> None:
    counters = Counters()
    counters.add("discard", 0, 8, 1.0, 3.0)
    proof = proof_of(OFFER, moved(counters), DiscardSink(), 2.5)
    assert Proved.model_validate_json(proof.model_dump_json()) == proof
    assert proof.difference is None
    stage = {"nbytes": 8, "seconds": 2.0, "waiting_seconds": 0.0}
    assert facts_of(proof, GOOD.model_copy(update={"result": {"path": "/p"}})) == {
        "device": "cpu",
        "pool": pool_kind(),
        "seconds": 2.5,
        "stages": {"discard": stage},
        "peak_device_bytes": 11,
        "pinned_bytes": 12,
        "path": "/p",
    }


@pytest.mark.parametrize("published", [None, GOOD])
def test_facts_need_no_result(published: Published | None) -> None:
    assert set(facts_of(PROVED, published)) == {
        "device",
        "pool",
        "seconds",
        "stages",
        "peak_device_bytes",
        "pinned_bytes",
    }


def test_a_difference_travels_as_one_sentence_of_bounded_length() -> None:
    proof = proof_of(OFFER, moved(Counters()), DifferingSink(), 1.0)
    sentence = str(proof.difference)
    assert sentence.startswith("b differs at byte 7!")
    assert len(sentence) == 2000


def test_published_carries_the_sinks_result_and_no_error() -> None:
    expected = GOOD.model_copy(update={"result": {"sink": "discard"}})
    assert published_by(DiscardSink(), None) == expected


def test_a_result_with_a_path_that_is_no_text_travels_too() -> None:
    class OddSink(DiscardSink):
        def result(self) -> dict[str, object]:
            return {"target": "/data/\udce9", "notes": ("a", 1, None)}

    published = published_by(OddSink(), DestinationError("/data/\udce9: no"))
    assert Published.model_validate_json(published.model_dump_json()) == published
    assert published.result == {"target": r"/data/\udce9", "notes": ["a", 1, None]}


def test_each_rank_has_a_line_with_how_it_ended() -> None:
    members = [member(0), member(1, "recv", host="b"), member(2)]
    offer = valid_offer()
    lines = rank_reports(members, {0: offer, 1: offer}, 0, {1: DestinationError("full")})
    assert [(line.rank, line.role, line.host) for line in lines] == [
        (0, "sender", "host-a"),
        (1, "worker", "b"),
        (2, "worker", "host-a"),
    ]
    assert [(line.ok, line.error) for line in lines] == [
        (True, None),
        (False, "full"),
        (True, None),
    ]
    assert [line.device for line in lines] == ["cpu", "cpu", ""]
