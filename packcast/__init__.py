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
    from packcast.packed.compat import (
        DEFAULT_PACKED_BUFFER_SIZE_BYTES,
        DEFAULT_PACKED_NUM_BUFFERS,
        packed_broadcast_consumer,
        packed_broadcast_producer,
        packed_nccl_broadcast_consumer,
        packed_nccl_broadcast_producer,
    )
    from packcast.packed.layout import TensorSpec
    from packcast.packed.replay import ReplayReceiver, ReplaySender
    from packcast.report import Report
    from packcast.settings import Settings
    from packcast.transfer.api import receive_checkpoint, send_checkpoint
    from packcast.view import View

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PACKED_BUFFER_SIZE_BYTES",
    "DEFAULT_PACKED_NUM_BUFFERS",
    "CheckpointError",
    "DestinationError",
    "Interrupted",
    "PackcastError",
    "RendezvousError",
    "ReplayReceiver",
    "ReplaySender",
    "Report",
    "Settings",
    "TensorSpec",
    "TransferError",
    "UsageError",
    "VerificationError",
    "View",
    "packed_broadcast_consumer",
    "packed_broadcast_producer",
    "packed_nccl_broadcast_consumer",
    "packed_nccl_broadcast_producer",
    "receive_checkpoint",
    "send_checkpoint",
]

_MODULES = {
    "DEFAULT_PACKED_BUFFER_SIZE_BYTES": "packed.compat",
    "DEFAULT_PACKED_NUM_BUFFERS": "packed.compat",
    "ReplayReceiver": "packed.replay",
    "ReplaySender": "packed.replay",
    "Report": "report",
    "Settings": "settings",
    "TensorSpec": "packed.layout",
    "View": "view",
    "packed_broadcast_consumer": "packed.compat",
    "packed_nccl_broadcast_consumer": "packed.compat",
    "packed_broadcast_producer": "packed.compat",
    "packed_nccl_broadcast_producer": "packed.compat",
    "receive_checkpoint": "transfer.api",
    "send_checkpoint": "transfer.api",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "errors")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
