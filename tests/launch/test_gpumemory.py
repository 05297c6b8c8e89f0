"""Free memory of GPUs as NVML tells it, whose stand-in is built from tests/launch/nvml.c."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from packcast.launch import gpumemory
from packcast.launch.gpumemory import free_nbytes
from packcast.units import GIB
from tests.helpers.native import compiler


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    cc = compiler()
    if cc is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml.c")
    subprocess.run([cc, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    monkeypatch.setattr(gpumemory, "_LIBRARY", str(library))
    return ctypes.CDLL(str(library))


def test_each_gpu_is_found_by_its_uuid_as_torch_writes_it(nvml: ctypes.CDLL) -> None:
    found = free_nbytes(["bb", "aa", "cc", "other", "lost", "GPU-aa"])
    assert found == (20 * GIB, 10 * GIB, 30 * GIB, None, None, 10 * GIB)
    assert nvml.left_open() == 0


def test_memory_in_torchs_cache_counts_as_free(
    nvml: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: (7, 5)[index])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: (4, 5)[index])
    assert free_nbytes(["aa", "bb"]) == (10 * GIB + 3, 20 * GIB)


def test_without_a_driver_free_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpumemory, "_LIBRARY", "libthere-is-none.so.1")
    assert free_nbytes(["aa", "bb"]) == (None, None)
    monkeypatch.setattr(gpumemory, "_LIBRARY", "libc.so.6")  # another library
    assert free_nbytes(["aa"]) == (None,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_reports_the_same_free_memory() -> None:
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    (free,) = free_nbytes([uuid])
    assert free is not None
    by_cuda, total = torch.cuda.mem_get_info(0)
    assert abs(free - by_cuda) < max(GIB, total // 20)
