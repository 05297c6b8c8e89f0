"""How others' loaders are called, by what stands in for them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from packcast.bench.loaders import by_fastsafetensors, by_instanttensor

CPU = torch.device("cpu")
PATHS = [Path("b.safetensors"), Path("a.safetensors")]
GROUP: Any = object()


class Policy(Enum):
    BUFFERED = 1


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the loaders are given, and in which environment they are while they load."""
    given: dict[str, Any] = {}

    class SafeOpen:
        def __init__(self, *args: Any, **named: Any) -> None:
            given.update(named, args=args)

        def __enter__(self) -> SafeOpen:
            return self

        def __exit__(self, *_: object) -> None:
            given["closed"] = True

        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield "w", torch.ones(1)

    class ParallelLoader:
        def __init__(self, *args: Any, **named: Any) -> None:
            given.update(named, args=args)

        def iterate_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
            given["odirect"] = os.environ.get("FASTSAFETENSORS_ODIRECT")
            yield "w", torch.ones(1)

        def close(self) -> None:
            given["closed"] = True

    modules = {
        "instanttensor": SimpleNamespace(safe_open=SafeOpen, BackendPolicy=Policy),
        "fastsafetensors": SimpleNamespace(ParallelLoader=ParallelLoader),
    }
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    return given


@pytest.mark.parametrize(
    ("paged", "told", "backend"),
    [(True, None, Policy.BUFFERED), (False, None, None), (True, "AIO", None)],
)
def test_instanttensor_reads_from_the_page_cache_where_the_files_are_in_it(
    called: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    paged: bool,
    told: str | None,
    backend: Policy | None,
) -> None:
    if told is not None:
        monkeypatch.setenv("INSTANTTENSOR_BACKEND", told)
    assert [name for name, _ in by_instanttensor(PATHS, CPU, GROUP, paged=paged)] == ["w"]
    assert called["args"] == (["b.safetensors", "a.safetensors"],)
    assert called["backend"] is backend
    assert (called["device"], called["process_group"], called["copy"]) == (CPU, GROUP, True)
    assert called["closed"]


@pytest.mark.parametrize(
    ("paged", "told", "odirect"), [(True, None, "0"), (False, None, None), (True, "1", "1")]
)
def test_fastsafetensors_reads_from_the_page_cache_where_the_files_are_in_it(
    called: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    paged: bool,
    told: str | None,
    odirect: str | None,
) -> None:
    if told is not None:
        monkeypatch.setenv("FASTSAFETENSORS_ODIRECT", told)
    assert [name for name, _ in by_fastsafetensors(PATHS, CPU, GROUP, paged=paged)] == ["w"]
    assert called["args"] == (GROUP, ["b.safetensors", "a.safetensors"])
    assert called["device"] == "cpu"
    assert called["odirect"] == odirect
    assert os.environ.get("FASTSAFETENSORS_ODIRECT") == told
    assert called["closed"]


def test_the_stand_ins_fail_as_the_real_ones_do_where_there_is_no_default_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_ins")
    own: Any = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        next(by_instanttensor(PATHS, CPU, own, paged=False))
    with pytest.raises(Exception, match="pg must be an instance of"):
        next(by_fastsafetensors(PATHS, CPU, own, paged=False))
