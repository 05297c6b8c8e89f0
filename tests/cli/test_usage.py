"""Claims about mistakes on the command line: each is said in plain words, none is ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import packcast
from packcast.cli.app import run

from .conftest import FakeTransfer

Capture = pytest.CaptureFixture[str]


def test_a_path_that_no_shell_has_expanded_is_expanded(
    checkpoint: Path, transfer: FakeTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["recv", "h:1", "--out", "~/copy-{rank}", "--json", "~/r.json"]) == 0
    assert transfer.settings[0].target == f"{tmp_path}/copy-{{rank}}"
    assert (tmp_path / "r.json").exists()
    assert run(["inspect", "~/ckpt"]) == 0
    monkeypatch.setenv("PACKCAST_OUT", "~/other")
    assert run(["recv", "h:1"]) == 0
    assert transfer.settings[1].target == f"{tmp_path}/other"


def test_alone_it_shows_help(capsys: Capture) -> None:
    assert run([]) == 0
    out = capsys.readouterr().out
    assert "Usage: packcast" in out
    assert "doctor" in out


def test_flags_do_not_seem_to_want_a_value(capsys: Capture) -> None:
    for command in ("send", "recv", "verify", "inspect", "clean", "doctor"):
        run([command, "--help"])
        flags = [line for line in capsys.readouterr().out.splitlines() if "<bool>" in line]
        assert all("--help" in line for line in flags), flags


def test_the_packages_public_names_are_listed() -> None:
    assert set(packcast.__all__) <= set(dir(packcast))


@pytest.mark.parametrize(
    ("shell", "environ", "answer"),
    [
        ("bash", {"COMP_WORDS": "packcast ver", "COMP_CWORD": "1"}, "verify"),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "packcast send --ver"}, "--verify"),
        (
            "fish",
            {"_TYPER_COMPLETE_ARGS": "packcast doc", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
            "doctor",
        ),
    ],
)
def test_shells_complete(shell: str, environ: dict[str, str], answer: str) -> None:
    packcast = Path(sys.executable).with_name("packcast")
    wanted = {"_PACKCAST_COMPLETE": f"complete_{shell}", **environ}
    ended = subprocess.run([packcast], env=os.environ | wanted, capture_output=True, check=False)
    assert answer in ended.stdout.decode()


def test_an_interrupt_while_it_starts_shows_no_traceback() -> None:
    # Reached as soon as Python itself is up: a module of that name is imported by packcast's first
    # line, and interrupts its own process there.
    code = (
        "import os, runpy, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == sys.argv[1]: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.argv[2:] = []\n"
        "module = sys.argv[1]\n"
        "runpy.run_module('packcast', run_name='__main__', alter_sys=False)\n"
    )
    for module in ("packcast.errors", "packcast.cli.standard_streams", "typer", "packcast.cli.app"):
        ended = subprocess.run(
            [sys.executable, "-c", code, module], capture_output=True, timeout=60
        )
        assert ended.returncode in (-signal.SIGINT, 130), (module, ended)
        assert b"Traceback" not in ended.stderr
