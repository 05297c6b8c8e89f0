"""Files written after a transfer: a manifest of the copy, a report per file and tensor.

The rank that has the copy writes them from what is on its disk. Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from packcast.cli.parsing import path
from packcast.errors import UsageError
from packcast.io.manifest import DigestKind, hash_files, refuse_inside, write_manifest
from packcast.launch.devices import host_name
from packcast.launch.launchers import Launch
from packcast.report import Report
from packcast.settings import Settings, check_template, fill_in, named


@dataclass(frozen=True, slots=True)
class Afterwards:
    """The files that the user asked for; {rank}, {local_rank} and {host} are not filled in yet."""

    manifest: str | None = None
    digest: DigestKind = "xxh128"
    report: str | None = None

    def check(self, settings: Settings, ranks_here: int) -> None:
        """Raise UsageError where this cannot be had; `ranks_here` of this host may write it."""
        if self.manifest is not None:
            named("--manifest", check_template, self.manifest)
            if settings.sink != "write" or settings.target is None:
                raise UsageError(
                    "--manifest needs --out",
                    hint="`packcast verify DIR --manifest FILE` makes one of what is there",
                )
            refuse_inside(path(self.manifest), path(settings.target))
        if self.report is not None:
            named("--report", check_template, self.report)
            if settings.sink != "verify":
                raise UsageError(
                    "--report needs --verify", hint="it lists what the comparison has found"
                )
            if ranks_here > 1 and "rank}" not in self.report:
                raise UsageError(
                    "--report: all ranks would write the same file", hint="put {rank} in its name"
                )

    def write(self, report: Report, launch: Launch) -> Report:
        """Write the files if this rank has the copy; raises PackcastError."""
        if report.rank is None:
            return report
        facts = report.workers.get(report.rank, {})
        if self.report is not None and report.comparison is not None:
            from packcast.cli.verify_copies import write_report

            write_report(self._place(self.report, report.rank, launch), [report.comparison])
        if self.manifest is None or not report.ok or report.is_sender or not facts.get("wrote"):
            return report
        root = Path(str(facts["target"]))
        manifest = self._place(self.manifest, report.rank, launch)
        hashes = hash_files(root, list(report.digests), self.digest, received=report.digests)
        write_manifest(manifest, root, hashes)
        mine = {**facts, "manifest": os.path.abspath(manifest)}
        return replace(report, workers={**report.workers, report.rank: mine})

    def _place(self, template: str, rank: int, launch: Launch) -> Path:
        return path(fill_in(template, rank=rank, local_rank=launch.local_rank, host=host_name()))
