"""The options of the commands that look at this machine alone; see `cli/options.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from packcast.cli.options import DESTINATION, LAUNCH, OUTPUT, SELECTION, flag, option

Directories = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR",
        help="Copies. The first is what the others are compared with, if there are several.",
        show_default=False,
    ),
]

Against = Annotated[
    str | None,
    option(
        "--against",
        metavar="FILE",
        panel=SELECTION,
        help="A manifest to compare with. \\[default: DIR.xxh128 or DIR.sha256, for one DIR]",
    ),
]

Folder = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="A directory that copies were written into, or the one that holds it.",
        show_default=False,
    ),
]

Folders = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[DIR]",
        help="Where copies are to be written. [default: the current directory]",
        show_default=False,
    ),
]

Reach = Annotated[
    str | None,
    option(
        "--reach",
        metavar="HOST:PORT",
        panel=LAUNCH,
        help="Whether this host finds and reaches where the sender is to listen.",
    ),
]

NoTest = Annotated[
    bool,
    flag(
        "--no-test",
        panel=OUTPUT,
        help="Do not send anything.",
    ),
]

Yes = Annotated[
    bool,
    flag(
        "--yes",
        panel=DESTINATION,
        help="Remove those that nobody uses any more.",
    ),
]

InspectJson = Annotated[
    str | None,
    option(
        "--json",
        metavar="FILE|-",
        panel=OUTPUT,
        help="Write the listing as JSON, instead of the table.",
    ),
]

Tensors = Annotated[
    bool,
    flag(
        "--tensors",
        panel=OUTPUT,
        help="List every tensor.",
    ),
]
