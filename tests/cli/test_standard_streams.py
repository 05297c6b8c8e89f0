"""Standard streams that are closed, full, ASCII or non-blocking: the command does its work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import PACKCAST, Commands, Ended, clean_environment
from tests.helpers.forge import REPOSITORY

NO_TRACE = re.compile(r"Traceback|Exception ignored|OSError|Errno|a bug")


def in_shell(*argv: str | Path, redirect: str, **environ: str) -> Ended:
    """A command of packcast whose streams a shell has prepared; it imports no torch."""
    line = f"exec {shlex.join([*PACKCAST, *map(str, argv)])} {redirect}"
    done = subprocess.run(
        ["/bin/bash", "-c", line],
        cwd=REPOSITORY,
        env=clean_environment() | environ,
        capture_output=True,
        timeout=60,
    )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkpoint whose one tensor has a name that is not ASCII."""
    header = '{"gewicht_\u00e4\u6a21": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}'
    raw = header.encode()
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"abcd")
    return path


def test_a_result_that_standard_output_cannot_take_is_an_error(tiny: Path) -> None:
    for argv in (["inspect", tiny], ["inspect", tiny, "--json", "-"], ["--version"], ["--help"]):
        ended = in_shell(*argv, redirect=">/dev/full")
        assert ended.returncode == 7, ended
        said = "packcast: error: cannot write to standard output: No space left on device\n"
        assert ended.stderr == said
    for argv in (["inspect", tiny, "--json", "-"], ["--help"]):
        ended = in_shell(*argv, redirect=">&-")
        assert ended.returncode == 7
        assert ended.stderr == "packcast: error: cannot write to standard output: it is closed\n"


def test_a_reader_who_has_seen_enough_is_no_error(tiny: Path) -> None:
    ended = in_shell("inspect", tiny, redirect="| true; exit ${PIPESTATUS[0]}")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-", "2>&- <&-", "2>/dev/full <&- >&-"])
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(redirect: str) -> None:
    ended = in_shell("inspect", "/nowhere", redirect=redirect)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "", "")


@pytest.mark.parametrize("environ", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0"}])
def test_what_a_stream_cannot_spell_is_written_as_escapes(
    tiny: Path, environ: dict[str, str]
) -> None:
    ended = in_shell("inspect", tiny, "--tensors", redirect="", LC_ALL="POSIX", **environ)
    assert ended.returncode == 0, ended
    assert "gewicht_" in ended.stdout
    ended = in_shell("inspect", "/\u6a21", redirect="", LC_ALL="POSIX", **environ)
    assert ended.returncode == 3
    assert "packcast: error: /" in ended.stderr
    assert not NO_TRACE.search(ended.stderr)


def test_nothing_is_written_into_files_that_got_a_closed_streams_number(tmp_path: Path) -> None:
    program = (
        "from packcast.cli.standard_streams import secure_streams; secure_streams();"
        " import os, sys;"
        " file = open(sys.argv[1], 'wb', buffering=0); assert file.fileno() > 2;"
        " os.write(2, b'a library complains'); print('talk', file=sys.stderr)"
    )
    command = shlex.join([sys.executable, "-c", program, str(tmp_path / "shard")])
    done = subprocess.run(
        ["/bin/bash", "-c", f"{command} <&- >&- 2>&-"], cwd=REPOSITORY, timeout=60
    )
    assert done.returncode == 0
    assert (tmp_path / "shard").read_bytes() == b""


def test_a_pipe_that_is_non_blocking_gets_everything_in_the_end() -> None:
    program = (
        "from packcast.cli.standard_streams import secure_streams; import os, sys;"
        " os.set_blocking(1, False); secure_streams(); print('x' * 1_000_000);"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60
    )
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 1_000_001, b"")


@pytest.mark.parametrize(
    ("full", "code"),
    [
        (None, 7),  # all are closed, and the JSON was asked for
        ([2], 0),
        ([1, 2], 7),
    ],
)
def test_a_transfer_goes_on_whatever_its_streams_are(
    commands: Commands, tiny: Path, tmp_path: Path, full: list[int] | None, code: int
) -> None:
    send = ["send", str(tiny), "--nproc", "2", "--out", str(tmp_path / "out"), "--json", "-"]
    if full is None:  # as Python itself finds them when it starts
        line = f"exec {shlex.join([*PACKCAST, *send])} >&- 2>&- <&-"
        ended = commands.run(["/bin/bash", "-c", line])
    else:
        fill = f"import os; [os.dup2(os.open('/dev/full', os.O_WRONLY), n) for n in {full}]"
        ended = commands.packcast(*send, before=fill).wait()
    assert ended.returncode == code, ended
    assert not NO_TRACE.search(ended.stderr)
    assert (tmp_path / "out" / tiny.name).read_bytes() == tiny.read_bytes()
    assert os.listdir(tmp_path / "out") == [tiny.name]
