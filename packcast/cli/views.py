"""Which display a transfer has: bars, lines, or hardly anything."""

from __future__ import annotations

from packcast.cli.options import ProgressMode
from packcast.cli.progress import Display, PlainView, SilentView
from packcast.cli.terminal import can_draw
from packcast.launch.launchers import Launch
from packcast.settings import Settings


def make_view(
    mode: ProgressMode, settings: Settings, launch: Launch, *, quiet: bool = False
) -> Display:
    """The display that `--progress` asks for, on this terminal or file."""
    if quiet or mode == "none":
        return SilentView(settings, launch, quiet=quiet)
    if mode != "plain" and can_draw():  # bars need a terminal, whatever was asked for
        from packcast.cli.richview import RichView  # 60 ms that a log file does not need

        return RichView(settings, launch)
    return PlainView(settings, launch)
