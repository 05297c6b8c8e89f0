"""Claims about what a sender's view is told of its workers, over real processes."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from packcast.io.manifest import read_manifest
from tests.documents import AnyResult, Transferred
from tests.helpers.commands import Commands, free_port, rank_environment

WATCHING_SENDER = """
import sys, threading, time
from packcast import View, send_checkpoint
from packcast.cli.bottleneck import culprit_of

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


def test_every_ranks_json_is_as_the_schema_says(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(large, tmp_path / "copy")
    (copy / "config.json").write_text("[]")
    (copy / "extra.json").write_text("{}")
    json = ("--json", tmp_path / "{rank}.json")
    ends = [
        rank.wait()
        for rank in commands.start_ranks(
            ("send", large, *json),
            ("recv", "--out", tmp_path / "out", "--manifest", tmp_path / "out.sha256", *json),
            ("recv", "--verify", copy, "--report", tmp_path / "report-{rank}", *json),
        )
    ]
    assert [end.returncode for end in ends] == [6, 0, 6], ends
    results = [
        AnyResult.model_validate_json((tmp_path / f"{rank}.json").read_text()).root
        for rank in range(3)
    ]
    sent, written, compared = results
    assert isinstance(sent, Transferred)
    assert isinstance(written, Transferred)
    assert isinstance(compared, Transferred)
    assert sent.checkpoint.path == str(large)
    assert sent.workers["2"].differing == ["config.json"]
    assert written.workers["1"].manifest == str(tmp_path / "out.sha256")
    assert compared.comparison is not None
    assert compared.comparison.extra == ["extra.json"]
    assert "*\tconfig.json\n" in (tmp_path / "report-2").read_text()
    assert read_manifest(tmp_path / "out.sha256")[0] == "xxh128"
    assert "rank 2: " in ends[2].stderr
    assert ends[2].stderr.count("extra.json, not compared") == 1
