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
    settings = given.settings("send", {"port_range": "29400-29401"})
    assert settings.port_range == range(29400, 29402)


@pytest.mark.parametrize("text", ["29400", "29400-", "a-b", "29400-29400", "5-4", "0-9", "1-65536"])
def test_a_range_of_ports_that_is_none_is_reported(text: str) -> None:
    with pytest.raises(UsageError, match=f"--port-range: .*{text}.* is not"):
        given.settings("send", {"port_range": text})


@pytest.mark.parametrize(
    "text", ["node1", ":29400", "node1:", "node1:http", "h:70000", "::1:29400", "[h_]..:29400"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--listen"):
        given.settings("send", {"listen": text})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--device", value) for value in ("gpu", "tpu", "cuda:", "cuda:x", "cuda0", "cpu ")),
        *(("--readers", value) for value in ("0", "-1", "1.5", "every")),
        *(("--staging", value) for value in ("64MB", "1023KiB", "-5", "0")),
        *(("--join-timeout", value) for value in ("0", "-1s", "5 years")),
        *(("--max-rate", value) for value in ("0GB/s", "5GiB", "fast")),
        *(("--workers", value) for value in (0, -1)),
        *(("--rank", value) for value in (0, -1)),
        *(("--port", value) for value in (0, 65536)),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_a_next_step(option: str, value: object) -> None:
    name = option.removeprefix("--").replace("-", "_")
    with pytest.raises(UsageError, match=f"^{option}: ") as caught:
        given.settings("send", {name: value})
    assert caught.value.hint


def test_the_settings_of_a_text_are_those_of_the_number() -> None:
    texts = {"buffer_size": "16MiB", "staging": "1GiB", "join_timeout": "5min", "readers": "all"}
    assert given.settings("send", texts) == Settings(
        command="send", buffer_size=16 << 20, staging=1 << 30, join_timeout_s=300.0, readers=None
    )


def test_the_token_file_wins_over_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(" of the file \n")
    monkeypatch.setenv("PACKCAST_TOKEN", "of the variable")
    assert given.token(str(file)) == b"of the file"
    assert given.token(None) == b"of the variable"
    monkeypatch.setenv("PACKCAST_TOKEN", "")
    assert given.token(None) is None
    monkeypatch.delenv("PACKCAST_TOKEN")
    assert given.token(None) is None


def test_a_token_that_can_be_guessed_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    for length, code in ((1, 0), (15, 0), (16, None), (4096, None), (4097, 2)):
        warnings: list[str] = []
        file.write_text("x" * length)
        monkeypatch.setenv("PACKCAST_TOKEN", "x" * length)
        for path in (str(file), None):
            if code == 2:
                with pytest.raises(UsageError, match="must have 1 to 4096 bytes"):
                    given.token(path, warnings.append)
            else:
                assert given.token(path, warnings.append) == b"x" * length
        assert len(warnings) == (2 if code == 0 else 0)


def test_a_token_file_that_all_may_read_is_warned_about(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("x" * 32)
    for mode, count in ((0o644, 1), (0o604, 1), (0o640, 0), (0o600, 0)):
        warnings: list[str] = []
        file.chmod(mode)
        given.token(str(file), warnings.append)
        assert len(warnings) == count
        assert all("every user of this host can read" in warning for warning in warnings)


def test_a_send_without_workers_names_the_ways_to_launch() -> None:
    with pytest.raises(UsageError, match="no workers to send to") as caught:
        given.check_send(SEND, NOBODY, nproc=None)
    for way in ("--nproc", "--workers", "torchrun", "srun", "mpirun"):
        assert way in str(caught.value.hint)


def test_the_ranks_are_chosen_once() -> None:
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
