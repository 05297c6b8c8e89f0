"""Whole transfers through the library with every rank a thread of this process: no launch to pay.

Real control channel, real gloo. What each rank's call returned or raised is its outcome.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from packcast import View, send_checkpoint
from packcast.report import Report
from packcast.units import MIB
from tests.helpers.commands import free_port

TIMEOUT_S = 60.0
TOKEN = "between us"

Address = tuple[str, int]
Receiver = Callable[[Address], Report]
Outcome = Report | BaseException


def transfer(
    checkpoint: Path,
    *receivers: Receiver,
    buffer_size: int | None = MIB,
    num_buffers: int = 2,
    view: View | None = None,
    max_rate: float | str | None = None,
) -> list[Outcome]:
    """Send it to the receivers, each called with the sender's address; the sender's comes first."""
    address = "127.0.0.1", free_port()

    def send() -> Report:
        return send_checkpoint(
            checkpoint,
            workers=len(receivers),
            listen=address,
            token=TOKEN,
            buffer_size=buffer_size,
            num_buffers=num_buffers,
            view=view,
            max_rate=max_rate,
        )

    calls = [send, *(lambda receiver=receiver: receiver(address) for receiver in receivers)]
    outcomes: dict[int, Outcome] = {}

    def run(rank: int) -> None:
        try:
            outcomes[rank] = calls[rank]()
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(outcomes) == len(calls), f"a rank hangs; the others: {outcomes}"
    return [outcomes[rank] for rank in range(len(calls))]


def succeeded(outcomes: list[Outcome]) -> list[Report]:
    """The reports of ranks that all returned one."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Report)]


def failed(outcomes: list[Outcome]) -> list[BaseException]:
    """The errors of ranks that all raised one."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(errors) == len(outcomes), outcomes
    return errors
