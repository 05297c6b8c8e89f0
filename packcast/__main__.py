"""`packcast` and `python -m packcast`: the command line's front door, and its way out."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from packcast.cli.app import run

    code = run(sys.argv[1:])
    if "torch" in sys.modules:
        # All that was begun has ended, and taking torch's modules down takes half a second.
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            sys.exit(code)  # which says so, as every program of Python's does
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
