"""The README's table of all options, made from the commands themselves.

`python -m tests.reference` writes it into README.md, between its two marks.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from packcast.cli.app import app
from tests.helpers.commands import REPOSITORY

BEGIN = "<!-- begin of the options: made by `make reference` -->\n"
END = "<!-- end of the options -->\n"


@dataclass(slots=True)
class Row:
    """An option of one or more commands that have the same words for it."""

    panel: str
    names: str
    default: str
    meaning: str
    commands: list[str] = field(default_factory=list)


def options() -> list[Row]:
    """Every option of every command, panel by panel, in the order of the help texts."""
    rows: dict[tuple[str, str, str, str], Row] = {}
    panels: list[str] = []
    for command in app.registered_commands:
        call = command.callback
        assert call is not None
        hints = get_type_hints(call, include_extras=True)
        for name, parameter in inspect.signature(call).parameters.items():
            kind, *extras = get_args(hints[name]) or (hints[name],)
            option = next((extra for extra in extras if isinstance(extra, OptionInfo)), None)
            if option is None:
                continue
            panel = option.rich_help_panel or "Options"
            if panel not in panels:
                panels.append(panel)
            row = Row(
                panel, _names(option, kind), _default(option, parameter.default), _meaning(option)
            )
            key = (row.panel, row.names, row.default, row.meaning)
            rows.setdefault(key, row).commands.append(command.name or call.__name__)
    return sorted(rows.values(), key=lambda row: panels.index(row.panel))


def reference() -> str:
    """The tables, one for each panel, as Markdown."""
    lines: list[str] = []
    panel = ""
    for row in options():
        if row.panel != panel:
            panel = row.panel
            lines += ["", f"**{panel}**", "", "| option | commands | default | meaning |"]
            lines += ["|---|---|---|---|"]
        cells = (row.names, ", ".join(row.commands), row.default, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines[1:]) + "\n"


def with_reference(readme: str) -> str:
    """The README's text with the tables as they should be."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


def _names(option: OptionInfo, kind: Any) -> str:
    value = "" if kind is bool else f" {option.metavar or _choices(kind)}"
    # In an annotation the first name is where a default would be.
    names = sorted((option.default, *(option.param_decls or ())), key=len, reverse=True)
    return ", ".join(f"`{name}{value}`" for name in names)


def _choices(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    raise AssertionError(f"an option of {kind} needs a metavar")


def _default(option: OptionInfo, default: object) -> str:
    told = re.search(r"\\?\[default: (.*?)\]", option.help or "")
    if told:
        return told[1]
    return "" if default in (None, False) else f"{default}"


def _meaning(option: OptionInfo) -> str:
    text = re.sub(r"\s*\\?\[default: .*?\]", "", option.help or "")
    return text.replace("\\[", "[").replace("\n", " ").strip()


if __name__ == "__main__":
    path = REPOSITORY / "README.md"
    path.write_text(with_reference(path.read_text()))
