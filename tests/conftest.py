"""What holds for every test, whoever started them, and the processes that many of them start."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest

from tests.helpers.commands import Commands

_STARTS_PROCESSES = frozenset({"commands", "bench", "forge", "launch"})

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _heard_signals() -> Iterator[None]:
    """A shell without job control starts what it leaves in the background with SIGINT ignored, and
    nohup whatever it starts with SIGHUP.

    The tests' processes would inherit that, and Python raises no KeyboardInterrupt then.
    """
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in heard if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, heard[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(params=["auto", "gloo"])
def kind_of_hops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hops of a chain through memory, where the kernel allows it, and as between hosts."""
    monkeypatch.setenv("PACKCAST_HOPS", request.param)
    return str(request.param)


@pytest.fixture
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Processes of packcast; none of them outlives the test."""
    with Commands(tmp_path_factory.mktemp("commands")) as started:
        yield started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start processes come first: short ones fill the gaps at the end of a run."""
    items.sort(key=lambda item: _STARTS_PROCESSES.isdisjoint(getattr(item, "fixturenames", ())))
