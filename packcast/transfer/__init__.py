"""A whole transfer on one rank: `run`, which imports torch when it is called."""

from packcast.transfer.run import run

__all__ = ["run"]
