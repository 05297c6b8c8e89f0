"""Claims about `packcast doctor`: what it looks at, what it calls a problem, and its self-test."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from packcast.cli import doctor, selftest
from packcast.cli.app import run
from packcast.cli.doctor import Diagnosis, line_of
from packcast.errors import TransferError
from packcast.io import native
from packcast.packed import gather, selftested

Capture = pytest.CaptureFixture[str]


def states(findings: Iterator[Diagnosis]) -> dict[str, str]:
    return {found.topic: found.state for found in findings}


def test_without_its_self_test_it_imports_and_sends_nothing(
    tmp_path: Path, capsys: Capture
) -> None:
    assert run(["doctor", str(tmp_path), "--no-test", "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    for topic in ("versions", "I/O threads", "GPUs", "network", "open files", "pinned", "space"):
        assert f"  {topic} " in out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["ok"] is True
    assert "self-test" not in [it["topic"] for it in found["findings"]]


def test_why_io_threads_are_pythons_comes_with_what_would_change_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PACKCAST_POOL", "python")
    monkeypatch.setattr(native, "installed", lambda: native.Library)
    (asked_for,) = doctor.pool()
    assert "PACKCAST_POOL asks for them" in asked_for.text
    assert asked_for.fix == "unset PACKCAST_POOL"
    monkeypatch.setattr(native, "installed", lambda: "it was not compiled")
    (not_compiled,) = doctor.pool()
    assert "it was not compiled" in not_compiled.text
    assert "C compiler" in str(not_compiled.fix)


@pytest.mark.parametrize("works", [True, False])
def test_kernels_that_cannot_be_compiled_are_a_note_with_what_they_need(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gather, "move_on", lambda _device: works or None)
    monkeypatch.setattr(selftested, "faults", [] if works else ["no such file: 'gcc -O2'"])
    (found,) = doctor.kernels()
    assert found.state == ("ok" if works else "note")
    assert works or "no such file: 'gcc -O2'" in found.text
    assert works or "CC names one, without options" in str(found.fix)


def test_two_ranks_send_to_each_other_and_the_copy_is_compared(capsys: Capture) -> None:
    told, failure = selftest.self_test("gloo")
    assert failure is None
    assert told.startswith("two ranks over gloo: all bytes arrived, ")


def test_a_self_test_that_fails_is_a_problem_with_its_exit_code(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = TransferError("lost rank 1", hint="look at the cable")
    monkeypatch.setattr(doctor, "self_test", lambda backend: (f"{backend}: lost", lost))
    assert run(["doctor", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 5
    captured = capsys.readouterr()
    assert "BAD   self-test   gloo: lost\n" in captured.out
    assert "-> look at the cable" in captured.out
    assert captured.err == "packcast: error: lost rank 1\n"
    assert json.loads((tmp_path / "r.json").read_text())["error"] == "lost rank 1"


def test_a_self_test_without_its_bytes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKCAST_POOL", "nonsense")
    told, failure = selftest.self_test("gloo")
    assert failure is not None
    assert failure.exit_code == 2
    assert "PACKCAST_POOL" in told


def test_a_name_that_is_loopback_here_is_noted_with_an_address_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "addresses_here", lambda: ["10.0.0.1"])
    monkeypatch.setattr(doctor, "interface_of", lambda address: "eth7")
    loopback = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(doctor, "resolve", lambda *_: loopback)
    first, name = doctor.network()
    assert first.text.startswith("eth7 10.0.0.1, used unless")
    assert name.state == "note"
    assert str(name.fix).startswith("--listen 10.0.0.1:29400")


def test_what_cannot_be_reached_is_a_problem_and_a_closed_port_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert [it.state for it in doctor.reachable("127.0.0.1", port)] == ["ok", "ok"]
    assert [it.state for it in doctor.reachable("127.0.0.1", port)] == ["ok", "ok"]
    (unknown,) = doctor.reachable("no-such-host.invalid", 1)
    assert (unknown.state, "has no address" in unknown.text) == ("problem", True)


def test_a_silent_port_is_a_firewall(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr("socket.create_connection", silent)
    *_, found = doctor.reachable("127.0.0.1", 29400)
    assert (found.state, found.text) == ("problem", "127.0.0.1:29400: no answer in 5 s")
    assert "firewall" in str(found.fix)


def test_few_open_files_are_noted_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    found = next(doctor.limits())
    assert (found.state, found.fix) == ("note", "ulimit -n 4096")


def test_a_folder_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    assert states(doctor.space([tmp_path / "absent"])) == {"space": "problem"}
    assert states(doctor.space([tmp_path])) == {"space": "ok"}


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKCAST_TOKEN", "very secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    (found,) = doctor.variables()
    assert found.text == "NCCL_DEBUG=INFO PACKCAST_TOKEN=..."


def test_what_to_do_has_a_line_of_its_own_and_no_control_characters() -> None:
    text = line_of(Diagnosis("topic", "note", "odd\x1b[2J", "do it"))
    assert text == f"note  topic       odd\\x1b[2J\n{' ' * 18}-> do it"
