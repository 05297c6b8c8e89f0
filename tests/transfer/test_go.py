"""GO is what the sender said, or a TransferError, never another error."""

from __future__ import annotations

from typing import Any

import pytest

from packcast.errors import TransferError
from packcast.transfer.go import Go
from tests.transfer.offers import JUNK

GOOD = Go("fe80::1%eth0", 29400, True)


@pytest.mark.parametrize("go", [GOOD, Go("node-1.example", 1, False), Go("127.0.0.1", 65535, True)])
def test_a_go_survives_the_wire(go: Go) -> None:
    message = go.to_json()
    assert message["kind"] == "GO"
    assert Go.from_json(message) == go


TEXTS = ["", "x y", "a\n", "\0", "9" * 256]
JUNK_BY_FIELD: dict[str, list[Any]] = {
    "host": [*JUNK.values(), *TEXTS, 7],
    "port": [*JUNK.values(), *TEXTS, "29400", 65536],
    "sums": [*(junk for name, junk in JUNK.items() if name != "true"), *TEXTS, 0, 1],
}


@pytest.mark.parametrize("field", sorted(JUNK_BY_FIELD))
def test_a_malformed_go_is_a_transfer_error_that_names_the_field(field: str) -> None:
    message = GOOD.to_json()
    without = {name: value for name, value in message.items() if name != field}
    for wrong in [without, *(message | {field: junk} for junk in JUNK_BY_FIELD[field])]:
        with pytest.raises(TransferError, match=f"the sender's GO is refused: its {field} is "):
            Go.from_json(wrong)
