"""Hundreds of light workers against the real server; for thousands there is simulate.py."""

from __future__ import annotations

import resource
import subprocess
import sys

from tests.control.simulate import simulate


def test_a_large_group_joins_gets_an_offer_and_hears_of_a_death_while_strangers_knock() -> None:
    figures = simulate(300, num_strangers=700, watch_s=0.2)
    assert figures.told == 299
    assert figures.tries >= 300
    assert len([line for line in figures.log if line.startswith("dropped ")]) <= 1


def test_the_server_may_have_as_many_connections_as_the_system_allows() -> None:
    code = (
        "import resource\n"
        "from packcast.control.acceptor import raise_descriptor_limit\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))\n"
        "raise_descriptor_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(said.stdout) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
