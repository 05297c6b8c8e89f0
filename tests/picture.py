"""The README's picture: the screen of a real transfer to a slow and two fast workers, and its end.

`make picture` writes it. It shows what the program wrote to its terminal, without most frames.
"""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.helpers.checkpoints import sharded

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / ".github" / "run.svg"
WIDTH, HEIGHT = 80, 24
LIMIT_S = 180.0
LOCAL = "/local"  # stands for the temporary folder in which the copies are
COMMAND = "packcast send model --out '/local/copy-{rank}' --nproc 4 --buffer-size 4MiB"
SLOW_RANK, SLOW_DISK = 2, 8_000_000
# Python imports this at its start, in every rank.
SLOW = f"""import os
if os.environ.get("RANK") == "{SLOW_RANK}":
    import tests.helpers.slow_disk
"""

_PIECE = re.compile(r"\n|\x1b\[[?\d;]*[A-Za-z]|[^\n\x1b]+")
_SHARE = re.compile(r"(\d+)% ")


def screens(output: str) -> tuple[list[str], list[str]]:
    """The lines of the last frame, up to half of the way, in which a rank is waited for; those that
    are there at the end. Of a terminal this knows what rich's live display needs: whole lines are
    erased, then written."""
    lines, row, at_half = [""], 0, [""]
    for piece in _PIECE.findall(output.replace("\r", "")):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece[0] != "\x1b" or piece[-1] == "m":
            lines[row] += piece
        elif piece[-1] == "A":
            row -= int(piece[2:-1])
        elif piece[-1] == "K":
            lines[row] = ""
        if "waiting on rank" in piece:
            share = _SHARE.search(Text.from_ansi("\n".join(lines)).plain)
            at_half = list(lines) if share and int(share[1]) <= 50 else at_half
    return at_half, [line for line in lines if line]


def run(folder: Path) -> str:
    """What a transfer writes to a terminal of its own."""
    sharded(folder / "model", 4, 40 << 20)
    (folder / "sitecustomize.py").write_text(SLOW)
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PACKCAST_POOL": "python"}
    environment |= {"PYTHONPATH": f"{folder}:{ROOT}", "SLOW_DISK": str(SLOW_DISK)}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (HEIGHT, WIDTH))
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(COMMAND.replace(LOCAL, str(folder)))],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output, deadline = b"", time.monotonic() + LIMIT_S
    try:
        with suppress(OSError):  # the terminal's last writer has gone
            while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                output += os.read(ours, 1 << 16)
        if process.wait(max(0.1, deadline - time.monotonic())):
            raise SystemExit(output.decode())
    finally:
        process.kill()
        os.close(ours)
    return output.decode()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        at_half, end = screens(run(Path(folder)).replace(folder, LOCAL))
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for line in [f"$ {COMMAND}", *at_half, "", *end[end.index(at_half[1]) + 1 :]]:
        console.print(Text.from_ansi(line), no_wrap=True)
    svg = console.export_svg(title="packcast", unique_id="run")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(re.sub(r"@font-face {.*?}\s*", "", svg, flags=re.DOTALL))  # from a CDN


if __name__ == "__main__":
    main()
