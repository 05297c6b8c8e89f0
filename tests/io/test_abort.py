"""WriteSink among others and under fire: one directory for several, abort, sudden death."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from packcast.errors import DestinationError, TransferError
from packcast.io.sinks.write import WriteSink
from tests.helpers.commands import run_warm
from tests.helpers.processes import num_descriptors
from tests.helpers.waiting import Waiter
from tests.io.pools import no_thread_left
from tests.io.sinks import (
    CONTENT,
    copy,
    filled,
    finished,
    in_threads,
    names_in,
    prepared,
    put_all,
    sink_for,
    tree,
)

# -- several sinks, one directory ----------------------------------------------------------------


def put_for_ever(sink: WriteSink, content: Mapping[str, bytes]) -> None:
    while True:
        put_all(sink, content, step=10_000)


def test_of_many_sinks_for_one_directory_exactly_one_writes(tmp_path: Path) -> None:
    target = tmp_path / "made" / "together" / "out"
    sinks = [sink_for(target) for _ in range(8)]
    barrier = threading.Barrier(8)

    def work(sink: WriteSink) -> None:
        barrier.wait()
        sink.prepare()
        put_all(sink)
        sink.finish()
        barrier.wait()
        sink.publish()

    in_threads(work, sinks)
    assert [sink.wrote for sink in sinks].count(True) == 1
    assert [sink.published for sink in sinks].count(True) == 1
    assert tree(target) == CONTENT
    assert names_in(target.parent) == ["out"]


def test_two_names_of_one_directory_are_one_directory(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    targets = [Path("real/out"), tmp_path / "link" / "out", Path("real/x/../out/.")]
    sinks = [prepared(target) for target in targets]
    assert [sink.wrote for sink in sinks] == [True, False, False]
    sinks[1].abort()
    assert names_in(tmp_path / "real") == [".out.packcast-t1"]
    sinks[0].abort()
    assert names_in(tmp_path / "real") == []


def test_two_transfers_to_one_directory_do_not_mix(tmp_path: Path) -> None:
    one, two = (finished(tmp_path / "out", transfer_id=name) for name in ("one", "two"))
    one.publish()
    with pytest.raises(DestinationError, match="exists and is not empty") as caught:
        two.publish()
    assert ".out.packcast-two" in str(caught.value.hint)
    assert tree(tmp_path / "out") == CONTENT
    two.abort()
    assert tree(tmp_path / ".out.packcast-two") == CONTENT


# -- abort ---------------------------------------------------------------------------------------


def test_abort_removes_the_copy_and_the_parents_it_made(tmp_path: Path) -> None:
    sink = filled(tmp_path / "a" / "b" / "out")
    sink.abort()
    sink.abort()
    assert names_in(tmp_path) == []


def test_abort_leaves_parents_that_others_use(tmp_path: Path) -> None:
    sink = prepared(tmp_path / "a" / "b" / "out")
    (tmp_path / "a" / "mine").write_bytes(b"")
    sink.abort()
    assert names_in(tmp_path / "a") == ["mine"]


def test_abort_before_prepare_lets_nothing_be_made(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "a" / "out")
    sink.abort()
    with pytest.raises(TransferError):
        sink.prepare()
    assert names_in(tmp_path) == []


def test_after_abort_nothing_is_put_and_nothing_is_published(tmp_path: Path) -> None:
    sink = filled(tmp_path / "out")
    sink.abort()
    for step in (lambda: put_all(sink), sink.finish, sink.publish):
        with pytest.raises(TransferError, match="aborted"):
            step()
    assert names_in(tmp_path) == []


def test_abort_after_publish_does_nothing(tmp_path: Path) -> None:
    sink = copy(tmp_path / "out")
    sink.abort()
    sink.publish()
    assert tree(tmp_path / "out") == CONTENT


@pytest.mark.parametrize("delay_s", [0.0, 0.002, 0.005, 0.01, 0.02])
def test_abort_while_four_threads_write_leaves_nothing(
    tmp_path: Path, delay_s: float, pool: str, pauses: None
) -> None:
    num_before = num_descriptors()
    content = {f"{name}.bin": bytes(400_000) for name in "abcd"}
    sink = prepared(tmp_path / "x" / "out", content)

    def work() -> None:
        with pytest.raises(TransferError, match="aborted"):
            put_for_ever(sink, content)

    with no_thread_left():
        writing = Waiter(work)
        time.sleep(delay_s)
        aborts = [Waiter(sink.abort) for _ in range(3)]
        for each in aborts:
            each.result()
        assert names_in(tmp_path) == []
        writing.result()
    assert num_descriptors() <= num_before


@pytest.mark.parametrize("step", ["prepare", "finish"])
@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.003, 0.006, 0.01])
def test_abort_during_a_step_leaves_nothing(tmp_path: Path, step: str, delay_s: float) -> None:
    num_before = num_descriptors()
    content = {f"d{index % 7}/f{index:03}.bin": b"x" * 5000 for index in range(300)}
    sink = sink_for(tmp_path / "out", content)
    if step == "finish":
        sink.prepare()
        put_all(sink, content)
    timer = threading.Timer(delay_s, sink.abort)
    timer.start()
    was_aborted = False
    try:
        getattr(sink, step)()
    except TransferError as error:
        was_aborted = "aborted" in error.message
        # Whoever removes: when the step has raised, all is gone.
        assert names_in(tmp_path) == []
    timer.join()
    assert names_in(tmp_path) == []
    assert was_aborted or delay_s
    assert num_descriptors() <= num_before


# -- death ---------------------------------------------------------------------------------------

LIFE = """
import os, signal, sys
from pathlib import Path
from tests.helpers.waiting import Waiter
from tests.io.pools import no_thread_left
from tests.io.sinks import put_all, sink_for
from packcast.io.sinks import publish as publishing
target, last = Path(sys.argv[1]), sys.argv[2]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if last == "exchanged": publishing._remove_old = die
sink = sink_for(target, force=True, transfer_id="t2")
for name, step in (("prepare", sink.prepare), ("put", lambda: put_all(sink)),
                   ("finish", sink.finish), ("publish", sink.publish)):
    step()
    if name == last: die()
"""


@pytest.mark.chaos
@pytest.mark.parametrize("last", ["prepare", "put", "finish", "exchanged", "publish"])
def test_a_killed_process_leaves_the_old_copy_or_the_new_one(tmp_path: Path, last: str) -> None:
    old = {"config.json": b"old", "gone.txt": b"old"}
    copy(tmp_path / "out", old)
    assert run_warm(LIFE, tmp_path / "out", last).returncode == -9
    is_new = last in ("exchanged", "publish")
    assert tree(tmp_path / "out") == (CONTENT if is_new else old)
    # And the next transfer works whatever was left lying about.
    copy(tmp_path / "out", force=True, transfer_id="t3")
    assert tree(tmp_path / "out") == CONTENT
