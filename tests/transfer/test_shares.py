"""Ranks of one host that name one --out: they write it together, and it is whole or gone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from packcast.control.frames import ProtocolError
from packcast.control.messages import decode
from packcast.io.sinks.ownership import RECORD
from packcast.io.sinks.sharing import ALONE
from packcast.packed.plan import TURN
from packcast.transfer.protocol import Prepared, WritingShare
from packcast.transfer.shares import owners_of, shares_of
from tests.helpers.checkpoints import same_tree
from tests.helpers.commands import (
    Command,
    Commands,
    eventually,
    free_port,
    rank_environment,
    wait_all,
)
from tests.transfer.offers import member

SMALL_RING = ("--buffer-size", "1MiB", "--num-buffers", "2")


ONE, OTHER = "1" * 32, "a" * 32


def prepared(
    copy_id: str | None, directory: tuple[int, int] | None = (1, 1 << 63), *, owns: bool = False
) -> Prepared:
    return Prepared(copy_id=copy_id, directory=directory, owns=owns)


def test_who_shares_sees_the_owners_directory_on_the_owners_host() -> None:
    infos = [member(rank, host="b" if rank >= 5 else "a") for rank in range(10)]
    said = {
        1: prepared(ONE),
        2: prepared(OTHER, (2, 7), owns=True),
        3: prepared(ONE, owns=True),
        4: prepared(ONE, None),
        5: prepared(ONE),
        6: prepared(ONE),
        7: prepared(OTHER, (2, 7)),
        8: prepared(None, None),
        9: prepared("b" * 32),
    }
    found = {rank: (it.index, it.count) for rank, it in shares_of(infos, said).items()}
    assert found == {1: (1, 2), 3: (0, 2)} | dict.fromkeys((2, 4, 5, 6, 7, 8, 9), (0, 1))
    assert owners_of(said) == {1: 3, 4: 3, 5: 3, 6: 3, 7: 2}


@pytest.mark.parametrize("ids", [(ONE, OTHER), (ONE, ONE)])
def test_two_owners_do_not_share_whatever_their_hosts_and_directories_are_called(
    ids: tuple[str, str],
) -> None:
    """Clones of a machine have one boot id, and their disks' inodes the same numbers: each would
    publish half a copy."""
    infos = [member(rank, host="a") for rank in range(5)]
    said = {
        1: prepared(ids[0], owns=True),
        2: prepared(ids[1], owns=True),
    }
    assert set(shares_of(infos, said).values()) == {ALONE}


def test_who_has_another_directory_of_the_same_numbers_gets_no_share_of_it() -> None:
    infos = [member(rank, host="a") for rank in range(5)]
    said = {1: prepared(ONE, owns=True), 2: prepared(OTHER), 3: prepared(ONE, (3, 1))}
    assert set(shares_of(infos, said).values()) == {ALONE}


def test_a_share_that_there_is_not_is_refused() -> None:
    assert decode(WritingShare.kind, b'{"index": 1, "count": 2}')
    with pytest.raises(ProtocolError, match="there is no share 2 of 2"):
        decode(WritingShare.kind, b'{"index": 2, "count": 2}')


def test_ranks_of_one_host_write_one_directory_together(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    recv = ("recv", "--out", tmp_path / "out", "--json", tmp_path / "{rank}.json")
    ends = commands.run_ranks(
        ("send", large, *SMALL_RING, "--json", report),
        *[recv] * 3,
        ("recv", "--out", tmp_path / "own"),
    )
    assert [end.returncode for end in ends] == [0] * 5, [end.stderr for end in ends]
    same_tree(large, tmp_path / "out")
    same_tree(large, tmp_path / "own")
    workers = json.loads(report.read_text())["workers"]
    assert [workers[rank]["sharing"] for rank in "1234"] == [3, 3, 3, 1]
    assert [workers[rank]["wrote"] for rank in "123"].count(True) == 1
    assert [workers[rank]["published"] for rank in "123"].count(True) == 1
    assert f"written to {tmp_path}/out, a share of it" in ends[0].stderr
    assert not list(tmp_path.glob(".*"))


@pytest.mark.chaos
@pytest.mark.parametrize("killed", ["owner", "helper"])
def test_when_one_of_them_is_killed_nothing_is_published_and_nothing_left(
    commands: Commands, large: Path, tmp_path: Path, killed: str
) -> None:
    disk = commands.held_disk()
    recv = ("recv", "--out", tmp_path / "out")
    ranks = commands.start_ranks(
        ("send", large, *SMALL_RING), recv, recv, ("recv", "--discard"), disks={0: disk}
    )
    commands.await_reached(disk)
    (partial,) = tmp_path.glob(".out.packcast-*")
    owner = json.loads((partial / RECORD).read_text())["pid"]
    pair = {rank.pid == owner: rank for rank in ranks[1:3]}
    victim = pair[killed == "owner"]
    victim.kill()
    others = [rank for rank in ranks if rank is not victim]
    ends = wait_all(others, 20)
    assert [end.returncode for end in ends] == [5, 5, 5]
    assert all(f"lost rank {ranks.index(victim)} (" in end.sentence for end in ends)
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*out*"))


def test_what_one_of_them_cannot_write_ends_all(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    """Its files may not be so large: whether it is to make them or to write into them."""
    port = free_port()
    recv = ["recv", "--out", tmp_path / "out"]
    limited = f"from resource import *; setrlimit(RLIMIT_FSIZE, ({2 * TURN}, {2 * TURN}))"
    ranks = [
        commands.packcast("send", large, *SMALL_RING, environment=rank_environment(0, 3, port)),
        commands.packcast(*recv, environment=rank_environment(1, 3, port)),
        commands.packcast(*recv, environment=rank_environment(2, 3, port), before=limited),
    ]
    ends = wait_all(ranks, 60)
    assert [end.returncode for end in ends] == [7, 7, 7], [end.stderr for end in ends]
    assert all("larger than the file system or a limit allows" in end.sentence for end in ends), [
        end.stderr for end in ends
    ]
    assert not os.listdir(tmp_path)


def having_open(folder: Path, ranks: Sequence[Command]) -> list[Command]:
    return [
        rank
        for rank in ranks
        if str(folder) in map(os.path.realpath, Path(f"/proc/{rank.pid}/fd").iterdir())
    ]


@pytest.mark.chaos
@pytest.mark.parametrize("is_killed", [False, True])
def test_if_the_owner_does_not_publish_no_rank_reports_a_copy(
    commands: Commands, large: Path, tmp_path: Path, is_killed: bool
) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    disk = commands.held_disk(None)
    recv = ("recv", "--out", out)
    ranks = commands.start_ranks(
        ("send", large, *SMALL_RING, "--json", report),
        recv,
        recv,
        ("recv", "--out", tmp_path / "own"),
        disks={1: disk, 2: disk},
    )
    commands.await_reached(disk)
    (partial,) = tmp_path.glob(".out.packcast-*")
    assert not (partial / RECORD).exists()  # it is complete
    eventually(lambda: len(having_open(partial, ranks[1:3])) == 1, "the helper's end")
    (owner,) = having_open(partial, ranks[1:3])
    if is_killed:
        owner.kill()
    else:
        out.mkdir()
        (out / "notes.txt").touch()
    disk.release()
    rest = [rank for rank in ranks if rank is not owner]
    code = 5 if is_killed else 7
    ends = wait_all(rest, 20)
    assert [end.returncode for end in ends] == [code, code, 0], [end.stderr for end in ends]
    what = f"lost rank {ranks.index(owner)} (" if is_killed else "exists and is not empty"
    assert all(what in end.sentence for end in ends[:2])
    told = {each["rank"]: each["ok"] for each in json.loads(report.read_text())["group"]["ranks"]}
    assert told == {0: True, 1: False, 2: False, 3: True}
    assert "complete on rank 3" in ends[0].sentence
    if is_killed:
        assert "`packcast clean`" in ends[0].error
        cleaned = commands.packcast("clean", tmp_path, "--yes").wait()
        assert f"Unless a transfer runs: rm -r {partial}\n" in cleaned.stdout
        again = commands.start_ranks(("send", large), recv)
        assert [end.returncode for end in wait_all(again)] == [0, 0]
        same_tree(large, out)


@pytest.mark.chaos
def test_without_the_sender_a_helper_says_that_it_does_not_know_of_a_copy(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    disk = commands.held_disk(None)
    recv = ("recv", "--out", out)
    ranks = commands.start_ranks(("send", large, *SMALL_RING), recv, recv, disks={1: disk, 2: disk})
    commands.await_reached(disk)
    ranks[0].kill()
    eventually(lambda: len(commands.alive()) == 1, "the helper's end")
    disk.release()
    ends = wait_all(ranks[1:], 20)
    assert [end.returncode for end in ends] == [0, 0], [end.stderr for end in ends]
    owner, helper = sorted(ends, key=lambda end: f"look whether {out} is there" in end.stderr)
    assert "after this rank had published" in owner.stderr
    assert "after this rank had published" not in helper.stderr
    assert f"look whether {out} is there" in helper.stderr
    same_tree(large, out)
