"""What the README shows runs as it stands there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY, TORCHRUN, Commands, wait_all

README = (REPOSITORY / "README.md").read_text()
REPLAY, COMPAT = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
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
def commands(tmp_path: Path) -> Iterator[Commands]:
    with Commands(tmp_path) as started:
        yield started


def test_two_workers_compute_exactly_what_the_trainer_does_after_each_of_three_rounds(
    commands: Commands, tmp_path: Path
) -> None:
    script = tmp_path / "example.py"
    script.write_text(REPLAY)
    ended = commands.run([*TORCHRUN, "--standalone", "--nproc-per-node", "3", script])
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
    script = tmp_path / "example.py"
    script.write_text(program)
    ends = wait_all(commands.start_program(3, script))
    assert [end.returncode for end in ends] == [0, 0, 0], [end.stderr for end in ends]
    said = "".join(end.stdout for end in ends)
    outputs = dict(re.findall(r"^rank (\d): (.+)$", said, re.MULTILINE))
    assert sorted(outputs) == ["0", "1", "2"], said
    assert len(set(outputs.values())) == 1, said


@pytest.mark.parametrize("block", [REPLAY, COMPAT], ids=["replay", "compat"])
def test_examples_use_public_names_only(block: str) -> None:
    import packcast

    names = {
        alias.name
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module == "packcast"
        for alias in node.names
    }
    assert names
    assert names <= set(packcast.__all__)
    assert "from packcast." not in block
