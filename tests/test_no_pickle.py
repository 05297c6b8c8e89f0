"""Nothing that is received or read is ever made into code: no pickle, no eval, on no path."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkpoints import same_tree, sharded
from tests.helpers.commands import Commands, wait_all

PACKAGE = Path(__file__).parent.parent / "packcast"
MODULES = frozenset(
    {
        "pickle",
        "_pickle",
        "cPickle",
        "pickletools",
        "marshal",
        "shelve",
        "dbm",
        "dill",
        "cloudpickle",
        "joblib",
        "copyreg",
        "code",
        "multiprocessing",
        "torch.multiprocessing",
        "torch.distributed.rpc",
        "torch.package",
        "yaml",
    }
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
# Methods and functions of any module; torch's collectives of objects pickle them.
ATTRIBUTES = frozenset(
    {
        "broadcast_object_list",
        "all_gather_object",
        "gather_object",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
        "Unpickler",
        "load_module",
        "exec_module",
        "run_path",
        "run_module",
        "literal_eval",
        "start_processes",
    }
)
OF_TORCH = frozenset({"load", "save"})


def faults(tree: ast.AST) -> Iterator[str]:
    """What stands in a module that must not, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            for name in names:
                if any(name == bad or name.startswith(f"{bad}.") for bad in MODULES):
                    yield f"line {node.lineno}: import {name}"
                if name.rpartition(".")[2] in ATTRIBUTES or name in ("torch.load", "torch.save"):
                    yield f"line {node.lineno}: import {name}"
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            yield f"line {node.lineno}: {node.id}"
        elif isinstance(node, ast.Attribute):
            is_torchs = isinstance(node.value, ast.Name) and node.value.id == "torch"
            if node.attr in ATTRIBUTES or (is_torchs and node.attr in OF_TORCH):
                yield f"line {node.lineno}: .{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            yield f"line {node.value.lineno}: {node.arg}"
        elif isinstance(node, ast.Constant) and node.value in MODULES - {"code"}:
            yield f"line {node.lineno}: {node.value!r}, perhaps for an import"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.multiprocessing as mp",
        "from torch import load",
        "torch.load(path)",
        "dist.broadcast_object_list(objects)",
        "from torch.distributed import all_gather_object",
        "eval(text)",
        "f = exec",
        "importlib.import_module('pickle')",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_test_sees(source: str) -> None:
    assert list(faults(ast.parse(source)))


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}, {fault}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for fault in faults(ast.parse(path.read_text()))
    ]
    assert found == []


RANK = """
import _pickle
import pickle
import sys
import torch
import torch.distributed as dist

def refused(*_, **__):
    raise SystemExit("unpickled")

for module in (pickle, _pickle):
    module.load = module.loads = module.Unpickler = refused
pickle._load = pickle._loads = pickle._Unpickler = refused
torch.load = torch.serialization.load = dist.distributed_c10d._unpickler = refused
for name in ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"):
    setattr(dist, name, refused)
    setattr(dist.distributed_c10d, name, refused)
try:
    pickle.loads(b"N.")
except SystemExit:
    pass
else:
    raise AssertionError("it is not patched")

from packcast.cli.app import run

sys.exit(run(sys.argv[1:]))
"""


def test_a_whole_transfer_completes_where_unpickling_is_an_error(
    commands: Commands, tmp_path: Path
) -> None:
    checkpoint = sharded(tmp_path / "model", 3, 2_000_000)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    out = str(tmp_path / "out-{rank}")
    argv = [script, "send", checkpoint, "--out", out, "--readers", "2", "--backend", "gloo"]
    for ended in wait_all(commands.start_program(3, *argv)):
        assert ended.returncode == 0, ended.stderr
        assert "unpickled" not in ended.stderr
    for rank in (1, 2):
        same_tree(checkpoint, tmp_path / f"out-{rank}")
