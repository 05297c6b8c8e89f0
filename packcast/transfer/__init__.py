"""A whole transfer on one rank: `run`. Imported late, since it needs torch."""

from packcast.transfer.transfer import run

__all__ = ["run"]
