"""Claims about kernels that do not work on a GPU: plain operations are used, and it is said why."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import pytest
import torch

from packcast.packed import selftested
from packcast.packed.selftested import self_tested

GPU = torch.device("cuda", 0)
SAID = "packcast: no GPU kernels, so sums and small tensors take many times as long: "


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device is needed for what is claimed here, and nothing was said before."""
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(selftested, "faults", [])


def cannot(error: Exception) -> Callable[[], str]:
    def load() -> str:
        raise error

    return load


def test_a_kernel_that_works_twice_is_used_and_nothing_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries: list[str] = []

    def is_right(kernel: str, _device: torch.device) -> bool:
        tries.append(kernel)
        return True

    assert self_tested(GPU, lambda: "kernel", is_right) == "kernel"
    assert tries == ["kernel", "kernel"]
    assert caplog.messages == selftested.faults == []


@pytest.mark.parametrize("answers", [[False], [True, False]])
def test_one_that_fails_its_self_test_is_not_used(
    answers: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    assert self_tested(GPU, lambda: "kernel", lambda *_: answers.pop(0)) is None
    assert caplog.messages == [f"{SAID}they fail their self-test"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file", "gcc -O2"), "[Errno 2] No such file: 'gcc -O2'"),
        (ModuleNotFoundError("No module named 'triton'"), "No module named 'triton'"),
        (RuntimeError("first line\nmore"), "first line"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_why_it_cannot_be_compiled_is_logged_once(
    error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # two kernels, or two devices
        assert self_tested(GPU, cannot(error), lambda *_: True) is None
    assert caplog.messages == [SAID + reason]
    assert selftested.faults == [reason]
    assert caplog.records[0].levelno == logging.WARNING


def test_on_a_cpu_there_is_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    assert self_tested(torch.device("cpu"), cannot(RuntimeError()), lambda *_: True) is None
    assert caplog.messages == []
