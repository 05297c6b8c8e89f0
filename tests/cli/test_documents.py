"""Claims about the JSON results: each is what the schema in the package says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from pydantic import ValidationError

from packcast.cli.app import run
from packcast.comparison import ComparedFile, Comparison
from packcast.errors import TransferError
from packcast.report import Report
from packcast.settings import Settings
from packcast.view import View
from tests.documents import AnyResult, schema

from .conftest import FakeTransfer
from .test_summary import FULL


def kind_of(path: Path) -> str:
    """The model that the result is of."""
    return type(AnyResult.model_validate_json(path.read_text()).root).__name__


def test_the_schema_in_the_package_is_the_models() -> None:
    text = resources.files("packcast").joinpath("result.schema.json").read_text()
    assert json.loads(text) == schema(), "python -m tests.documents makes it"


@pytest.mark.parametrize(
    ("argv", "kind", "code"),
    [
        (["inspect", "{ckpt}"], "Inspected", 0),
        (["inspect", "{ckpt}", "--tensors"], "Inspected", 0),
        (["send", "{ckpt}", "--dry-run", "--out", "{ckpt}/../new"], "WouldSend", 0),
        (["verify", "{ckpt}", "{ckpt}"], "Verified", 0),
        (["verify", "{ckpt}", "{other}"], "Verified", 6),
        (["verify", "{ckpt}", "--manifest", "{ckpt}.xxh128"], "Verified", 0),
        (["clean", "{ckpt}"], "Cleaned", 0),
        (["doctor", "{ckpt}", "--no-test"], "Examined", 0),
        (["inspect", "{ckpt}/none"], "Failed", 3),
        (["recv", "{nonsense}", "--discard"], "Failed", 2),
    ],
    ids=str,
)
def test_every_commands_result_is_as_the_schema_says(
    argv: list[str], kind: str, code: int, checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "config.json").unlink()
    (other / "model.safetensors").write_bytes(b"damaged")
    names = {"{ckpt}": str(checkpoint), "{other}": str(other)}
    for name, path in names.items():
        argv = [word.replace(name, path) for word in argv]
    assert run([*argv, "-q", "--json", str(tmp_path / "r.json")]) == code
    assert kind_of(tmp_path / "r.json") == kind


@pytest.mark.parametrize("fails", [False, True])
def test_the_result_of_a_transfer_is_as_the_schema_says(
    fails: bool, checkpoint: Path, transfer: FakeTransfer, tmp_path: Path
) -> None:
    compared = Comparison("/c", "it", (ComparedFile("a", "*", (("t", "*"),), 3, "differs"),))

    def does(settings: Settings, view: View) -> Report:
        if fails:
            raise TransferError("lost")
        return replace(FULL, comparison=compared, pool="native")

    transfer.does = does
    argv = ["send", str(checkpoint), "--workers", "1", "--listen", "h:1"]
    try:
        code = run([*argv, "--json", str(tmp_path / "r.json")])
    except SystemExit as left:
        code = int(str(left.code))
    assert code == (5 if fails else 0)
    assert kind_of(tmp_path / "r.json") == "Transferred"


def test_what_is_not_in_the_schema_is_refused() -> None:
    with pytest.raises(ValidationError):
        AnyResult.model_validate({"schema": 1, "version": "0", "ok": True, "surprise": 1})
