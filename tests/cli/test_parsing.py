"""Claims about reading the command line's values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from packcast.cli import parsing as given
from packcast.errors import UsageError
from packcast.launch.launchers import Launch
from packcast.settings import Settings

NOBODY = Launch("none", rank=0, world_size=1, local_rank=0, local_world_size=1)
TORCHRUN = Launch("torchrun", rank=1, world_size=4, local_rank=1, local_world_size=4)
SEND = Settings(command="send", checkpoint=Path("c"))
RECV = Settings(command="recv")


def test_a_range_of_ports_includes_both_ends() -> None:
    assert given.port_range("29400-29401") == range(29400, 29402)
    assert given.port_range(None) is None


@pytest.mark.parametrize("text", ["29400", "29400-", "a-b", "29400-29400", "5-4", "0-9", "1-65536"])
def test_a_range_of_ports_that_is_none_is_reported(text: str) -> None:
    with pytest.raises(UsageError, match=f"--port-range: .*{text}.* is not"):
        given.port_range(text)


@pytest.mark.parametrize(
    "text", ["node1", ":29400", "node1:", "node1:http", "h:70000", "::1:29400", "[h]:29400"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--listen"):
        given.address("--listen", text)


def test_a_listener_may_take_any_free_port_which_nobody_could_reach() -> None:
    assert given.address("--listen", "10.0.0.1:0") == ("10.0.0.1", 0)
    assert given.address("--listen", "[::1]:29400") == ("::1", 29400)
    with pytest.raises(UsageError, match="--reach: port 0"):
        given.address_to_reach("--reach", "10.0.0.1:0")


@pytest.mark.parametrize("text", ["gpu", "tpu", "cuda:", "cuda:x", "cuda0", "cpu "])
def test_a_device_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        given.device(text)


def test_the_token_file_wins_over_the_variable(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(" of the file \n")
    assert given.token(str(file), {"PACKCAST_TOKEN": "of the variable"}) == b"of the file"
    assert given.token(None, {"PACKCAST_TOKEN": "of the variable"}) == b"of the variable"
    assert given.token(None, {}) is None
    assert given.token(None, {"PACKCAST_TOKEN": ""}) is None


def test_a_token_that_can_be_guessed_is_warned_about(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    for length, code in ((1, 0), (15, 0), (16, None), (4096, None), (4097, 2)):
        warnings: list[str] = []
        file.write_text("x" * length)
        for path, environ in ((str(file), {}), (None, {"PACKCAST_TOKEN": "x" * length})):
            if code == 2:
                with pytest.raises(UsageError, match="must have 1 to 4096 bytes"):
                    given.token(path, environ, warnings.append)
            else:
                assert given.token(path, environ, warnings.append) == b"x" * length
        assert len(warnings) == (2 if code == 0 else 0)


def test_a_token_file_that_all_may_read_is_warned_about(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("x" * 32)
    for mode, count in ((0o644, 1), (0o604, 1), (0o640, 0), (0o600, 0)):
        warnings: list[str] = []
        file.chmod(mode)
        given.token(str(file), {}, warnings.append)
        assert len(warnings) == count
        assert all("every user of this host can read" in warning for warning in warnings)


def test_a_send_to_nobody_names_the_ways_to_launch() -> None:
    with pytest.raises(UsageError, match="no workers to send to") as caught:
        given.check_send(SEND, NOBODY, nproc=None)
    for way in ("--nproc", "--workers", "torchrun", "srun", "mpirun"):
        assert way in str(caught.value.hint)


def test_who_takes_part_is_said_once() -> None:
    given.check_send(SEND, TORCHRUN, nproc=None)
    given.check_send(replace(SEND, workers=2, address=("h", 0)), NOBODY, nproc=None)
    given.check_send(SEND, NOBODY, nproc=3)
    for settings, launch, nproc in (
        (replace(SEND, workers=2), TORCHRUN, None),
        (SEND, TORCHRUN, 3),
        (replace(SEND, workers=2), NOBODY, 3),
        (replace(SEND, address=("h", 1)), TORCHRUN, None),
        (replace(SEND, workers=2), NOBODY, None),
        (replace(SEND, port=5, workers=1, address=("h", 1)), NOBODY, None),
    ):
        with pytest.raises(UsageError):
            given.check_send(settings, launch, nproc=nproc)


def test_recv_needs_an_address_exactly_without_a_launcher() -> None:
    here = replace(RECV, address=("h", 1))
    given.check_recv(here, NOBODY, json="r.json")
    given.check_recv(RECV, TORCHRUN, json="r-{rank}.json")
    for settings, launch in (
        (RECV, NOBODY),
        (replace(RECV, rank=2), TORCHRUN),
        (replace(RECV, address=("h", 0)), NOBODY),
    ):
        with pytest.raises(UsageError):
            given.check_recv(settings, launch, json=None)
    with pytest.raises(UsageError, match="--json: all ranks would write the same file"):
        given.check_recv(RECV, TORCHRUN, json="r.json")


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["send", "c", "--nproc", "3", "-q"], ["send", "c", "-q"]),
        (["send", "--nproc=3", "c"], ["send", "c"]),
        (["send", "--", "--nproc"], ["send", "--", "--nproc"]),
    ],
)
def test_the_ranks_of_nproc_get_the_same_command_without_it(
    argv: list[str], kept: list[str]
) -> None:
    assert given.without_nproc(argv) == kept
