"""A whole transfer on one rank: join, then send or receive.

Imports torch late: a sender without a launcher says what to run on the workers before that, since
torch takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packcast.control.server import ControlServer
from packcast.errors import PackcastError, TransferError
from packcast.launch.exit import ExitHandler
from packcast.report import Report
from packcast.settings import Settings
from packcast.transfer.session import open_session
from packcast.view import View

if TYPE_CHECKING:
    from packcast.transfer.ends import MakeDestination


def run(
    settings: Settings,
    view: View,
    exit_handler: ExitHandler,
    *,
    call: int = 0,
    make_destination: MakeDestination | None = None,
) -> Report:
    """Take part in one transfer, as `packcast send` or `packcast recv` does. Every rank calls it.

    Returns this rank's report, whose exit code is 6 if a comparison found a difference. Raises
    PackcastError after notifying the other ranks. A failure of another rank, a lost rank or a
    stall goes to `exit_handler` on another thread, since a collective may hang. `call` counts the
    transfers of one launch, the same on all ranks. A worker with `make_destination` receives
    tensors.
    """

    def load() -> None:
        import packcast.transfer.transfer  # noqa: F401

        view.phase("join")

    session = open_session(settings, view, exit_handler, call=call, load=load)
    from packcast.transfer.transfer import receive, send

    channel = session.channel
    exit_handler.on_leave(
        lambda: channel.fail(exit_handler.error or TransferError("it disconnected"))
    )
    try:
        if isinstance(channel, ControlServer):
            return send(session, channel)
        return receive(session, channel, make_destination)
    except PackcastError as error:
        channel.fail(error)
        raise
    finally:
        session.leave()
