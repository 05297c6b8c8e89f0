"""packcast: broadcast a safetensors checkpoint from one process to many.

Names are looked up when they are first asked for: importing the package costs nothing, no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packcast.errors import (
        CheckpointError,
        DestinationError,
        Interrupted,
        PackcastError,
        RendezvousError,
        TransferError,
        UsageError,
        VerificationError,
    )
    from packcast.report import Report
    from packcast.settings import Settings
    from packcast.view import View

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DestinationError",
    "Interrupted",
    "PackcastError",
    "RendezvousError",
    "Report",
    "Settings",
    "TransferError",
    "UsageError",
    "VerificationError",
    "View",
]

_MODULES = {"Report": "report", "Settings": "settings", "View": "view"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "errors")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
