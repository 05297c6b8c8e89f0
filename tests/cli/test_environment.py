"""What the environment says to a command: options, launchers, and what only looks like either."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from packcast.cli.app import run
from packcast.launch.launchers import ALONE
from packcast.launch.validation import launch_of
from tests.cli.conftest import FakeTransfer

Capture = pytest.CaptureFixture[str]
RECV = ["recv", "h:1", "--discard"]

pytestmark = pytest.mark.usefixtures("beside_checkpoints")


@pytest.mark.parametrize("link", ["tcp://10.0.0.1:29400", "udp://[fd00::1]:53"])
def test_what_kubernetes_says_of_a_service_called_packcast_is_no_option(
    transfer: FakeTransfer, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    monkeypatch.setenv("PACKCAST_PORT", link)
    monkeypatch.setenv("PACKCAST_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("PACKCAST_PORT_29400_TCP", link)
    assert run(RECV) == 0
    assert [settings.port for settings in transfer.settings] == [None]


def test_a_port_of_the_environment_is_still_read(
    transfer: FakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("JOB_ID", 1), ("STEP_ID", 0), ("PROCID", 0), ("STEP_NUM_TASKS", 2)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PACKCAST_PORT", "29417")
    assert run(["send", "c"]) == 0
    assert [settings.port for settings in transfer.settings] == [29417]


@pytest.mark.parametrize(
    ("name", "value", "argv"),
    [
        ("PACKCAST_PORT", "29400/tcp", RECV),  # the parser's own errors
        ("PACKCAST_FORCE", "perhaps", RECV),
        ("PACKCAST_BACKEND", "mpi", ["send", "c"]),
        ("PACKCAST_NPROC", "1", ["send", "c"]),
        ("PACKCAST_JOIN_TIMEOUT", "soon", RECV),  # and ours
        ("PACKCAST_STAGING", "lots", ["send", "c"]),
        ("PACKCAST_LISTEN", "node..1:5", ["send", "c", "--workers", "1"]),
        ("PACKCAST_OUT", "d", RECV),
    ],
)
def test_an_error_about_a_value_names_the_variable_that_it_comes_from(
    transfer: FakeTransfer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    name: str,
    value: str,
    argv: list[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert run(argv) == 2
    option = "--" + name.removeprefix("PACKCAST_").lower().replace("_", "-")
    said = capsys.readouterr().err
    assert f"{option} (from {name})" in said.replace("'", "")
    assert transfer.settings == []


def test_an_error_about_what_was_typed_names_no_variable(
    transfer: FakeTransfer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("PACKCAST_STAGING", "100MiB")
    assert run(["send", "c", "--staging=lots"]) == 2
    assert "PACKCAST_STAGING" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["recv", "h:1", "--discard", "--rank", "2"],
        ["send", "c", "--workers", "2", "--listen", "h:1"],
    ],
)
@pytest.mark.parametrize("has_master", [True, False])
def test_who_says_who_takes_part_is_in_no_launch(
    transfer: FakeTransfer,
    torchrun: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    has_master: bool,
) -> None:
    torchrun(1)
    if not has_master:  # as of a rank in a group that is not torch.distributed's
        monkeypatch.delenv("MASTER_ADDR")
    assert run(argv) == 0
    assert [settings.by_address for settings in transfer.settings] == [True]


def test_its_place_on_the_host_stays_what_the_launcher_says(
    torchrun: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun(3)
    launch = launch_of(os.environ, by_address=True)
    assert (launch.kind, launch.rank, launch.world_size) == ("none", 0, 1)
    assert (launch.local_rank, launch.local_world_size) == (3, 4)
    assert launch_of(os.environ, by_address=False).rank == 3
    monkeypatch.delenv("MASTER_PORT")
    assert launch_of(os.environ, by_address=True) == ALONE


@pytest.mark.parametrize("host", ["node..1", "a" * 64 + ".svc", "a b", "[::g]", "//node1"])
def test_a_name_that_no_host_can_have_is_a_usage_error(
    transfer: FakeTransfer, capsys: Capture, host: str
) -> None:
    assert run(["recv", f"{host}:29400", "--discard"]) == 2
    assert run(["send", "c", "--workers", "1", "--listen", f"{host}:29400"]) == 2
    said = capsys.readouterr().err
    assert said.count("is not a host name or address") == 2
    assert transfer.settings == []
