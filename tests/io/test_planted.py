"""What somebody put where a partial directory is to go: never used, never followed, and named."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from packcast.errors import DestinationError
from packcast.io.sinks import record
from packcast.io.sinks.ownership import RECORD
from tests.io.sinks import filled, names_in, prepared

PARTIAL = ".out.packcast-t1"


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_RECORD_LIMIT_S", 0.2)


@pytest.mark.parametrize("planted", ["folder", "file", "link", "fifo", "record", "dead record"])
def test_what_is_planted_under_a_transfers_id_is_an_error(tmp_path: Path, planted: str) -> None:
    path, elsewhere = tmp_path / PARTIAL, tmp_path / "elsewhere"
    elsewhere.mkdir()
    if planted == "file":
        path.write_bytes(b"x")
    elif planted == "link":
        path.symlink_to(elsewhere)
    elif planted == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    if planted == "record":
        (path / RECORD).write_text("{}")
    if planted == "dead record":
        os.close(record.claim(os.open(path, os.O_RDONLY)))
    with pytest.raises(DestinationError, match="already exists") as caught:
        prepared(tmp_path / "out")
    assert caught.value.exit_code == 7
    assert str(path) in caught.value.message
    assert names_in(tmp_path) == [PARTIAL, "elsewhere"]
    assert names_in(elsewhere) == []


def test_a_rank_that_has_made_its_directory_just_now_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_RECORD_LIMIT_S", 20.0)
    (tmp_path / PARTIAL).mkdir()
    fd = os.open(tmp_path / PARTIAL, os.O_RDONLY)

    def late() -> None:
        time.sleep(0.2)
        record.claim(fd)

    other = threading.Thread(target=late)
    other.start()
    sink = prepared(tmp_path / "out")
    other.join()
    assert not sink.wrote


def test_a_link_that_takes_the_holders_place_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, elsewhere = tmp_path / "holder", tmp_path / "elsewhere"
    holder.mkdir()
    elsewhere.mkdir()

    def planted(*_: object, **__: object) -> bool:
        holder.rmdir()
        holder.symlink_to(elsewhere)
        return False

    monkeypatch.setattr("packcast.io.sinks.write.check_replaceable", planted)
    with pytest.raises(DestinationError):
        prepared(holder / "out")
    assert names_in(elsewhere) == []


def test_a_link_that_takes_a_folders_place_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    sink = filled(tmp_path / "out")
    nested = tmp_path / PARTIAL / "nested"
    nested.rename(tmp_path / "moved")
    nested.symlink_to(elsewhere)
    with pytest.raises(DestinationError):
        sink.finish()
    assert names_in(elsewhere) == []
