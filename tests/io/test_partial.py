"""Partial directories of processes that were killed, frozen, or live: which may be removed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from packcast.errors import DestinationError
from packcast.io.sinks import partial, record
from packcast.io.sinks.ownership import RECORD
from tests.helpers.commands import Command, Commands
from tests.io.sinks import (
    CONTENT,
    copy,
    finished,
    in_threads,
    names_in,
    prepared,
    sink_for,
    tree,
    write_tree,
)

# A worker in the middle of its copy.
WORKER = """
import sys, time
from pathlib import Path
from packcast.checkpoint.outgoing import FileSpec
from packcast.io.sinks.write import WriteSink
files = [FileSpec(name, 1000, 0, 0o644, 0o755, None) for name in sys.argv[3:]]
sink = WriteSink(Path(sys.argv[1]), files, transfer_id=sys.argv[2], force=True)
sink.prepare()
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""

Start = Callable[[Path, str], Command]


@pytest.fixture
def start(commands: Commands) -> Start:
    """Starts workers."""

    def start(target: Path, transfer_id: str) -> Command:
        worker = commands.start_warm([sys.executable, "-c", WORKER, target, transfer_id, *CONTENT])
        worker.read_until("ready")
        return worker

    return start


def killed(start: Start, target: Path, transfer_id: str = "t0") -> int:
    """The pid of a worker that was killed in the middle of its copy into `target`."""
    worker = start(target, transfer_id)
    worker.kill()
    worker.process.wait()
    return worker.pid


def states(target: Path) -> list[str]:
    return [found.state for found in partial.partials_of(str(target))]


def rewrite_record(folder: Path, **changes: object) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | changes))


def test_the_next_copy_removes_what_a_killed_worker_left_and_says_so(
    tmp_path: Path, start: Start
) -> None:
    pid = killed(start, tmp_path / "out")
    assert names_in(tmp_path) == [".out.packcast-t0"]
    assert states(tmp_path / "out") == ["unused"]
    sink = copy(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]
    assert tree(tmp_path / "out") == CONTENT
    (note,) = sink.notes
    assert note.startswith(f"{tmp_path}/.out.packcast-t0 (")
    assert f"was left behind by pid {pid} on " in note
    assert note.endswith(": removed")


def test_what_a_killed_worker_left_inside_its_target_is_removed_without_force(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    killed(start, out / ".." / "out" / "deep")
    (out / ".deep.packcast-t0").rename(out / ".packcast-t0")
    sink = copy(out)
    assert tree(out) == CONTENT
    assert sink.notes[0].endswith(": removed")


def test_a_frozen_workers_partial_directory_is_left_alone_and_named(
    tmp_path: Path, start: Start
) -> None:
    worker = start(tmp_path / "out", "t0")
    worker.send_signal(signal.SIGSTOP)
    assert states(tmp_path / "out") == ["used"]
    (found,) = partial.partials_of(str(tmp_path / "out"))
    assert not partial.remove_if_unused(found)
    sink = copy(tmp_path / "out")
    assert f"is in use by pid {worker.pid} on " in sink.notes[0]
    assert tree(tmp_path / ".out.packcast-t0").keys() == {*CONTENT, RECORD}


def test_two_copies_into_one_directory_that_stays_do_not_mix(tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    out.mkdir()
    worker = start(out / "deep", "t0")
    (out / ".deep.packcast-t0").rename(out / ".packcast-t0")
    with pytest.raises(DestinationError, match=f"is in use by pid {worker.pid}"):
        prepared(out, force=True)
    assert tree(out / ".packcast-t0").keys() == {*CONTENT, RECORD}


def test_where_locks_prove_nothing_a_process_of_this_boot_must_be_gone(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "is_local", lambda fd: False)
    killed(start, tmp_path / "out")
    assert states(tmp_path / "out") == ["unused"]
    rewrite_record(tmp_path / ".out.packcast-t0", pid=os.getpid())  # another process by its start
    assert states(tmp_path / "out") == ["unused"]
    rewrite_record(
        tmp_path / ".out.packcast-t0", pid=os.getpid(), started=record._start_of(os.getpid())
    )
    assert states(tmp_path / "out") == ["unknown"]


@pytest.mark.parametrize(
    "other", [{"boot_id": "another host's"}, {"pid_namespace": "pid:[1]"}, {"boot_id": None}]
)
def test_on_a_shared_file_system_another_hosts_partial_directory_is_only_named(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, other: dict[str, object]
) -> None:
    monkeypatch.setattr(record, "is_local", lambda fd: False)
    pid = killed(start, tmp_path / "out")
    rewrite_record(tmp_path / ".out.packcast-t0", host="far", **other)
    sink = copy(tmp_path / "out")
    assert names_in(tmp_path) == [".out.packcast-t0", "out"]
    assert f"is of pid {pid} on far: if that transfer is over, remove it" in sink.notes[0]


def test_on_a_local_file_system_the_lock_proves_it_after_a_reboot_too(
    tmp_path: Path, start: Start
) -> None:
    killed(start, tmp_path / "out")
    rewrite_record(tmp_path / ".out.packcast-t0", boot_id="before", pid=os.getpid())
    assert states(tmp_path / "out") == ["unused"]


@pytest.mark.parametrize("record", ["", "{", '{"version": 2}', '{"version": 1}', "[]"])
def test_without_a_readable_record_nothing_is_removed(tmp_path: Path, record: str) -> None:
    write_tree(tmp_path / ".out.packcast-t0", {"a": b"1", RECORD: record.encode()})
    sink = copy(tmp_path / "out")
    assert tree(tmp_path / ".out.packcast-t0") == {"a": b"1", RECORD: record.encode()}
    assert "has no record of who made it" in sink.notes[0]


def test_a_record_that_could_not_be_locked_proves_nothing(tmp_path: Path, start: Start) -> None:
    killed(start, tmp_path / "out")
    rewrite_record(tmp_path / ".out.packcast-t0", locked=False)
    assert states(tmp_path / "out") == ["unknown"]


def test_a_complete_copy_that_was_kept_is_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = finished(tmp_path / "out", transfer_id="t0")
    write_tree(tmp_path / "out", {"mine": b""})
    with pytest.raises(DestinationError, match="exists and is not empty"):
        sink.publish()
    assert tree(tmp_path / ".out.packcast-t0") == CONTENT  # without a record
    assert states(tmp_path / "out") == ["unknown"]


def test_a_removal_that_is_cut_off_can_be_gone_on_with(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(start, tmp_path / "out")
    (found,) = partial.partials_of(str(tmp_path / "out"))
    real, removed = os.unlink, []

    def unlink(name: str, **options: int) -> None:
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(name)
        real(name, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            partial.remove_if_unused(found)
    assert len(removed) == 2
    assert RECORD in names_in(tmp_path / ".out.packcast-t0")
    assert partial.remove_if_unused(found)
    assert names_in(tmp_path) == []


def test_only_directories_named_as_ours_are_found(tmp_path: Path) -> None:
    for name in (".a.packcast-1f", ".packcast-2e", ".b.c.packcast-3", ".packcast", "packcast-4"):
        (tmp_path / name).mkdir()
    (tmp_path / ".f.packcast-5").write_bytes(b"a file")
    (tmp_path / ".l.packcast-6").symlink_to(tmp_path / ".packcast")
    found = [os.path.basename(each.path) for each in partial.partials_in(str(tmp_path))]
    assert found == [".a.packcast-1f", ".b.c.packcast-3", ".packcast-2e"]
    assert [Path(each.path).name for each in partial.partials_of(str(tmp_path / "c"))] == []
    long = "x" * 250
    (tmp_path / partial.name_beside(long, "7d")).mkdir()
    assert len(partial.partials_of(str(tmp_path / long))) == 1


def test_several_ranks_that_find_one_leftover_remove_it_once(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(start, tmp_path / "out")
    removing = partial.remove_partial

    def slowly(holder_fd: int, name: str) -> None:
        time.sleep(0.3)
        removing(holder_fd, name)

    monkeypatch.setattr(partial, "remove_partial", slowly)
    sinks = [sink_for(tmp_path / "out", transfer_id="t1") for _ in range(4)]
    in_threads(lambda sink: sink.prepare(), sinks)
    notes = [note for sink in sinks for note in sink.notes]
    assert len(notes) >= 1
    assert all(note.endswith(": removed") for note in notes), notes
    for sink in sinks:
        sink.abort()
    assert names_in(tmp_path) == []
