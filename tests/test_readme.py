"""What the README shows runs as it stands there, and what it names is there.

Its tables are checked against the program: options, defaults, codes, fields of the result.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import packcast
from packcast.cli import bench as bench_command
from packcast.cli.app import app
from packcast.cli.app import run as run_command_line
from packcast.cli.result import report_document, to_json
from packcast.errors import PackcastError
from packcast.report import Report
from tests.helpers.checkpoints import same_tree, sharded
from tests.helpers.commands import (
    REPOSITORY,
    TORCHRUN,
    Command,
    Commands,
    free_port,
    wait_all,
)
from tests.reference import with_reference

README = (REPOSITORY / "README.md").read_text()
WHOLE, REPLAY, COMPAT = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
SHOWN = re.findall(r"^    (.*)$", PROSE, re.MULTILINE)  # what one would type, or read
OTHERS_OPTIONS = {  # torchrun's, mypy's, and those that every command has
    "--no-python",
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--master-port",
    "--strict",
    "--help",
    "--version",
    "--install-completion",
}
COMPAT_FRAME = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank, group = dist.get_rank(), dist.group.WORLD
torch.manual_seed(rank)
model = torch.nn.Linear(8, 4)

def load_weights(received):
    model.load_state_dict(dict(received), strict=False)

{body}
print(f"rank {{rank}}: {{model(torch.ones(8)).tolist()}}\\n", end="", flush=True)
del group  # or gloo's threads live on, and meet the end of the interpreter: torch aborts then
dist.destroy_process_group()
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return sharded(tmp_path / "model", 2, 300_000)


def run_three(program: str, commands: Commands, folder: Path, *argv: Path) -> str:
    """What three ranks of the program have said together."""
    script = folder / "example.py"
    script.write_text(program)
    ends = wait_all(commands.start_program(3, script, *argv))
    assert [end.returncode for end in ends] == [0, 0, 0], [end.stderr for end in ends]
    return "".join(end.stdout for end in ends)


def test_two_workers_compute_exactly_what_the_trainer_does_after_each_of_three_rounds(
    commands: Commands, tmp_path: Path
) -> None:
    script = tmp_path / "example.py"
    script.write_text(REPLAY)
    launched = commands.start_warm([*TORCHRUN, "--standalone", "--nproc-per-node", "3", script])
    ended = launched.wait()
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    lines = re.findall(r"^step (\d) rank (\d): (.+)$", said, re.MULTILINE)
    outputs = {(int(step), int(rank)): output for step, rank, output in lines}
    assert sorted(outputs) == [(step, rank) for step in range(3) for rank in range(3)], said
    rounds = [{outputs[step, rank] for rank in range(3)} for step in range(3)]
    assert [len(each) for each in rounds] == [1, 1, 1], said
    assert len(set.union(*rounds)) == 3, "nothing was learned"


def test_the_two_functions_work_as_shown(commands: Commands, tmp_path: Path) -> None:
    imports, *parts = re.split(r"^# on .*\n", COMPAT, flags=re.MULTILINE)
    trainer, worker = (re.sub("^", "    ", part, flags=re.MULTILINE) for part in parts)
    program = COMPAT_FRAME.format(body=f"{imports}\nif rank == 0:\n{trainer}\nelse:\n{worker}")
    said = run_three(program, commands, tmp_path)
    outputs = dict(re.findall(r"^rank (\d): (.+)$", said, re.MULTILINE))
    assert sorted(outputs) == ["0", "1", "2"], said
    assert len(set(outputs.values())) == 1, said


def test_a_checkpoint_is_received_as_tensors_by_two_workers(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    said = run_three(WHOLE, commands, tmp_path, checkpoint)
    assert re.search(r"^sent 6 tensors at \d+\.\d+ GB/s$", said, re.MULTILINE), said
    assert said.count("received 6 tensors\n") == 2, said


def test_library_and_commands_meet_as_shown(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    """Each of the two calls of the prose with both at its other end."""
    send, receive = re.findall(r"`((?:send|receive)_checkpoint\([^`]+\))`", PROSE)
    out, token = tmp_path / "copy", {"PACKCAST_TOKEN": "7b1f09c4d2a85e36"}

    def call(text: str, port: int) -> Command:
        here = text.replace('("node1", 29400)', f'("127.0.0.1", {port})')
        assert here != text
        here = here.replace("CKPT", repr(str(checkpoint)))
        here = here.replace("into=model.state_dict()", "on_tensor=lambda name, tensor: print(name)")
        return commands.start_warm([sys.executable, "-c", f"from packcast import *\n{here}"])

    first, second = free_port(), free_port()
    there = [
        call(send, first),
        call(receive, first),
        commands.packcast("recv", f"127.0.0.1:{first}", "--out", out, environment=token),
        commands.packcast(
            *("send", checkpoint, "--workers", "1", "--listen", f"127.0.0.1:{second}"),
            environment=token,
        ),
        call(receive, second),
    ]
    ends = wait_all(there)
    assert [end.returncode for end in ends] == [0] * 5, [end.stderr for end in ends]
    same_tree(checkpoint, out)
    names = sorted(f"layer.{i}.{k}" for i in (1, 2) for k in range(3))
    assert sorted(ends[1].stdout.split()) == sorted(ends[4].stdout.split()) == names


@pytest.mark.parametrize(
    "block", [WHOLE, REPLAY, COMPAT], ids=["whole checkpoints", "replay", "compat"]
)
def test_examples_use_public_names_only(block: str) -> None:
    names = {
        alias.name
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module == "packcast"
        for alias in node.names
    }
    assert names
    assert names <= set(packcast.__all__)
    assert "from packcast." not in block


def parameters(command: str) -> list[Any]:
    """A command's options and arguments, as the parser has them."""
    return list(typer.main.get_command(app).commands[command].params)


def options() -> dict[str, Any]:
    """By name, of all commands; where two have one of a name, the last one's."""
    return {
        name: parameter
        for command in ("bench", "clean", "doctor", "inspect", "verify", "recv", "send")
        for parameter in parameters(command)
        for name in parameter.opts
        if name.startswith("--")
    }


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def test_every_option_that_is_named_is_there() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PROSE))
    assert len(named) > 40
    assert named - OTHERS_OPTIONS <= set(options())


def test_the_table_of_options_is_made_from_the_commands() -> None:
    assert with_reference(README) == README, "run `make reference`"


def test_every_option_reads_its_variable() -> None:
    for name, parameter in options().items():
        variable = "PACKCAST_" + parameter.opts[0].removeprefix("--").replace("-", "_").upper()
        assert parameter.envvar == variable, name


def shown_commands() -> list[str]:
    lines = [re.sub(r"\s+#.*", "", line) for line in SHOWN]
    return [line for line in lines if re.search(r"(^|srun |^torchrun .* )packcast ", line)]


def test_the_command_lines_are_found() -> None:
    assert len(shown_commands()) >= 10


@pytest.mark.parametrize("line", shown_commands())
def test_command_lines_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PACKCAST_")]:
        monkeypatch.delenv(name)
    words = shlex.split(line)
    command, *arguments = words[words.index("packcast") + 1 :]
    parser = typer.main.get_command(app).commands[command]
    assert parser.make_context(command, arguments).params


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "ranks"), [("bench", [2, 2, 3, 4]), ("bench-gpu", [2] * 6), ("bench-disk", [2] * 2)]
)
def test_the_benches_of_the_makefile_are_valid(
    target: str, ranks: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All but measuring: they are read and checked up to the start of the ranks."""
    argv = ["make", "-n", "-o", ".venv/.ready", "-C", str(REPOSITORY), target]
    kept = ("PATH", "HOME", "LANG")  # a make that runs these tests has flags for its own children
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    said = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\S*/packcast (bench .*)$", said, re.MULTILINE)
    started: list[int] = []
    monkeypatch.setattr(bench_command, "start_ranks", lambda _, n: started.append(n) or 0)
    monkeypatch.setattr(bench_command.read, "pin_defaults", lambda *_: None)
    monkeypatch.setattr(bench_command, "_plotter", lambda text: None)  # wants matplotlib
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".bench").mkdir()
    written = [re.findall(r"\.bench/\S+", line) for line in lines]
    assert len({name for names in written for name in names}) == 3 * len(
        ranks
    )  # none is written twice
    assert [run_command_line(shlex.split(line)) for line in lines] == [0] * len(ranks)
    assert started == ranks


def test_the_exit_codes_are_those_of_the_errors() -> None:
    listed = {int(code) for code in re.findall(r"\d+", " ".join(codes_column()))}
    errors = [getattr(packcast, name) for name in packcast.__all__]
    raised = {
        error.exit_code
        for error in errors
        if isinstance(error, type) and issubclass(error, PackcastError)
    }
    assert listed == raised | {0, 129, 130, 143}


def codes_column() -> list[str]:
    return re.findall(r"^\| ([\d, ]+) \|", section("Exit codes"), re.MULTILINE)


def test_the_result_has_the_fields_shown() -> None:
    block = re.findall(r"^    (.*)$", section("JSON result"), re.MULTILINE)
    shown = json.loads("\n".join(block))
    document = json.loads(to_json(report_document(Report(command="send"))))
    assert set(shown) == set(document)
    for name in ("checkpoint", "group", "buffers"):
        assert set(shown[name]) == set(document[name])


def test_the_ways_to_receive_are_arguments() -> None:
    named = re.findall(r"^\| `(\w+)=", section("From Python"), re.MULTILINE)
    known = inspect.signature(packcast.receive_checkpoint).parameters
    assert named == ["out", "verify", "into", "on_tensor", "discard"]
    assert set(named) <= set(known)
