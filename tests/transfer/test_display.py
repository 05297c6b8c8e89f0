"""Claims about what a sender's view is told of its workers, over real processes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.helpers.commands import Commands, free_port, rank_environment

WATCHING_SENDER = """
import sys, threading, time
from packcast import View, send_checkpoint
from packcast.cli.waiting import culprit_of

class Watching(View):
    def started(self, start, progress):
        def watch():
            while True:
                print(culprit_of(progress()), sorted(start.hosts), file=sys.stderr, flush=True)
                time.sleep(0.1)
        threading.Thread(target=watch, daemon=True).start()

send_checkpoint(sys.argv[1], buffer_size=1 << 20, num_buffers=2, staging=8 << 20, view=Watching())
"""


def test_the_sender_names_the_worker_whose_disk_is_slow(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    port = free_port()
    disk = commands.held_disk(after=4 << 20)
    program = tmp_path / "sender.py"
    program.write_text(WATCHING_SENDER)
    sender = commands.start_warm([sys.executable, program, large], rank_environment(0, 3, port))
    others = [
        commands.packcast("recv", "--discard", environment=rank_environment(1, 3, port)),
        commands.packcast(
            "recv", "--verify", large, environment=rank_environment(2, 3, port), disk=disk
        ),
    ]
    found = sender.read_until(re.compile(r"^\(2, 'verify'\) (.*)$", re.MULTILINE))
    assert found[1] == "[0, 1, 2]"
    disk.release()
    assert [it.wait().returncode for it in (sender, *others)] == [0, 0, 0]
