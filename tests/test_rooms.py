"""A room imports only from rooms below it, and those without torch import none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "packcast"
# From the ground up; names on one line may use each other in the order in which they stand.
ROOMS = (
    "comparison",
    "report",
    "errors",
    "units",
    "view",
    "settings",
    "checkpoint",
    "packed",
    "io",
    "control",
    "launch",
    "transfer",
    "bench",
    "cli",
)
# Modules that are no room of their own: the door, and the list of public names.
OUTSIDE = {"__init__", "__main__"}
NEVER_TORCH = ("checkpoint", "comparison")
TORCH_LATE = (
    "__init__",
    "__main__",
    "errors",
    "units",
    "view",
    "settings",
    "comparison",
    "report",
    "cli",
)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported anywhere below, relative imports excluded."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module
            if node.module == "packcast":
                yield from (f"packcast.{alias.name}" for alias in node.names)
            else:
                yield node.module


def at_import_time(tree: ast.Module) -> ast.Module:
    """The module without its functions' bodies and without `if TYPE_CHECKING`."""
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        kept.append(node)
    return ast.Module(kept, [])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    if room in OUTSIDE:
        return
    assert room in ROOMS, f"{room} has no place among the rooms"
    for module in imported(ast.parse(path.read_text())):
        package, _, rest = module.partition(".")
        if package != "packcast" or not rest:
            continue
        other = rest.split(".")[0]
        above = ROOMS.index(other) > ROOMS.index(room) if other in ROOMS else True
        assert other == room or not above, f"{room} imports {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_without_torch_do_not_import_it(path: Path) -> None:
    tree = ast.parse(path.read_text())
    room = room_of(path)
    if room in NEVER_TORCH:
        assert not torch_in(tree)
    elif room in TORCH_LATE:
        assert not torch_in(at_import_time(tree))


def torch_in(tree: ast.AST) -> list[str]:
    return [module for module in imported(tree) if module.split(".")[0] == "torch"]
