"""What the kernel says of the host's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from packcast.io import memory


def test_what_is_available_is_told_in_bytes_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    lines = ["MemTotal:       131072 kB", "MemAvailable:     4097 kB", "Buffers:  1 kB"]
    (tmp_path / "meminfo").write_text("\n".join(lines))
    assert memory.available_nbytes() == 4097 * 1024
    (tmp_path / "meminfo").write_text("\n".join([lines[0], lines[2]]))  # a kernel before 3.14
    assert memory.available_nbytes() is None
    (tmp_path / "meminfo").unlink()
    assert memory.available_nbytes() is None
    monkeypatch.undo()
    assert 0 < (memory.available_nbytes() or 0) < total
