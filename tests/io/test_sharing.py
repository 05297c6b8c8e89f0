"""Several sinks of one host that write one copy: every byte once, published once, or gone."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcast.errors import DestinationError, TransferError
from packcast.io.schedule import Span
from packcast.io.sinks import open_partial, record
from packcast.io.sinks.sharing import Share
from packcast.io.sinks.write import WriteSink
from packcast.packed.plan import TURN, Extent
from tests.helpers.commands import Commands
from tests.io.sinks import CONTENT, MTIME_NS, copy, names_in, put_all, sink_for, tree

LARGE = {f"m{i}.safetensors": os.urandom(TURN + 5) for i in range(2)}
MANY = {**CONTENT, **LARGE}


def shared(target: Path, count: int, **options: bool) -> list[WriteSink]:
    """Prepared, and each with its share."""
    sinks = [sink_for(target, MANY, **options) for _ in range(count)]
    for sink in sinks:
        sink.prepare()
    assert [sink.wrote for sink in sinks] == [True] + [False] * (count - 1)
    assert len({(sink.copy_id, sink.partial_identity) for sink in sinks}) == 1
    assert sinks[0].copy_id is not None
    for index, sink in enumerate(sinks):
        sink.take_share(Share(index, count))
    return sinks


@given(
    count=st.integers(1, 5),
    file=st.integers(0, 9),
    offset=st.integers(0, 5 * TURN),
    nbytes=st.integers(1, 2 * TURN),
)
def test_the_shares_of_an_extent_are_all_its_bytes_once(
    count: int, file: int, offset: int, nbytes: int
) -> None:
    extent = Extent(file, offset, nbytes)
    spans = sorted(span for index in range(count) for span in Share(index, count).spans(extent))
    at = offset
    for span in spans:
        assert span == Span(file, at, at - offset, span.nbytes)
        assert span.nbytes > 0
        at += span.nbytes
    assert at == offset + nbytes
    for index in range(count):
        share = Share(index, count)
        assert share.has_part_of(file, offset + nbytes) == any(
            True for _ in share.spans(Extent(file, 0, offset + nbytes))
        )


@pytest.mark.parametrize("count", [2, 3])
def test_a_copy_is_whole_once_all_have_written_and_is_published_once(
    count: int, tmp_path: Path
) -> None:
    sinks = shared(tmp_path / "out", count)
    for sink in reversed(sinks):  # the owner is the last, and the first
        put_all(sink, MANY, TURN)
        sink.finish()
    for sink in sinks:
        sink.publish()
    assert tree(tmp_path / "out") == MANY
    assert names_in(tmp_path) == ["out"]
    assert [sink.published for sink in sinks] == [True] + [False] * (count - 1)
    assert {sink.result()["sharing"] for sink in sinks} == {count}
    times = {path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert times == {MTIME_NS}


def test_each_writes_its_share_only(tmp_path: Path) -> None:
    owner, helper = shared(tmp_path / "out", 2)
    put_all(owner, MANY, TURN)
    owner.finish()
    (partial,) = tmp_path.iterdir()
    halves = {name: (partial / name).read_bytes() for name in LARGE}
    assert all(len(data) == len(LARGE[name]) for name, data in halves.items())
    for name, data in sorted(halves.items()):
        runs = [data[i : i + TURN] for i in range(0, len(data), TURN)]
        whole = [LARGE[name][i : i + TURN] for i in range(0, len(data), TURN)]
        mine = [run == other for run, other in zip(runs, whole, strict=True)]
        assert mine.count(True) == 1, name
        assert all(not any(run) for run, is_mine in zip(runs, mine, strict=True) if not is_mine)
    put_all(helper, MANY, TURN)
    helper.finish()
    for sink in (helper, owner):
        sink.publish()
    assert tree(tmp_path / "out") == MANY


@pytest.mark.parametrize("first", [0, 1])
def test_nothing_is_left_in_whatever_order_the_ranks_stop(first: int, tmp_path: Path) -> None:
    sinks = shared(tmp_path / "above" / "out", 2)
    put_all(sinks[0], MANY, TURN)
    threads = [threading.Thread(target=sinks[i].abort) for i in (first, 1 - first)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert names_in(tmp_path) == []
    with pytest.raises(TransferError):
        sinks[1].finish()


def test_a_helper_that_stops_leaves_what_a_living_owner_has(tmp_path: Path) -> None:
    owner, helper = shared(tmp_path / "out", 2)
    helper.abort()
    assert len(names_in(tmp_path)) == 1
    owner.abort()
    assert names_in(tmp_path) == []


def test_a_helper_that_stops_late_touches_neither_the_new_copy_nor_the_old_one(
    tmp_path: Path,
) -> None:
    copy(tmp_path / "out", MANY, transfer_id="before")
    (tmp_path / "out" / "m0.safetensors").chmod(0o600)
    owner, helper = shared(tmp_path / "out", 2, force=True)
    for sink in (owner, helper):
        put_all(sink, MANY, TURN)
        sink.finish()
    owner.publish()
    helper.abort()
    assert tree(tmp_path / "out") == MANY
    assert names_in(tmp_path) == ["out"]


OWNER = """
import sys, time
from pathlib import Path
from tests.io.sinks import put_all
from tests.io.test_sharing import MANY, sink_for
from packcast.io.sinks.sharing import Share
sink = sink_for(Path(sys.argv[1]), MANY)
sink.prepare()
sink.take_share(Share(0, 2))
print("ready", sink.wrote, file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_a_helper_removes_what_a_killed_owner_has_left(commands: Commands, tmp_path: Path) -> None:
    owner = commands.start_warm([sys.executable, "-c", OWNER, tmp_path / "out"])
    owner.read_until("ready True\n")
    helper = sink_for(tmp_path / "out", MANY)
    helper.prepare()
    assert not helper.wrote
    helper.take_share(Share(1, 2))
    put_all(helper, MANY, TURN)
    owner.kill()
    helper.abort()
    assert names_in(tmp_path) == []


def test_another_users_directory_is_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, other = (sink_for(tmp_path / "out", MANY) for _ in range(2))
    owner.prepare()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    other.prepare()
    monkeypatch.undo()
    assert other.partial_identity is None
    assert list(other.spans(Extent(0, 0, 1))) == []
    for sink in (owner, other):
        put_all(sink, MANY, TURN)
        sink.finish()
        sink.publish()
    assert tree(tmp_path / "out") == MANY


def test_a_file_that_was_cut_meanwhile_is_not_published(tmp_path: Path) -> None:
    owner, helper = shared(tmp_path / "out", 2)
    for sink in (owner, helper):
        put_all(sink, MANY, TURN)
        sink.finish()
    (partial,) = tmp_path.iterdir()
    os.truncate(partial / "m1.safetensors", 7)
    with pytest.raises(DestinationError, match=r"m1\.safetensors was changed by another process"):
        owner.publish()
    assert names_in(tmp_path) == []


def test_a_sink_that_comes_while_the_owner_gives_up_makes_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "copy"
    owner, later = sink_for(target, CONTENT), sink_for(target, CONTENT)
    owner.prepare()

    def look_too_late(holder_fd: int, name: str, path: str) -> str | None:
        owner.abort()
        return record.check_in_use(holder_fd, name, path)

    monkeypatch.setattr(open_partial, "check_in_use", look_too_late)
    later.prepare()
    assert later.wrote
    later.abort()
    assert not os.listdir(tmp_path)
