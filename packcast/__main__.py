"""`packcast` and `python -m packcast`: the command line's front door, and its way out."""

from __future__ import annotations

import signal

# Whoever stops this while it is still being imported is not to see where.
_INTERRUPT = signal.getsignal(signal.SIGINT)
if _INTERRUPT is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os  # noqa: E402
import sys  # noqa: E402
from contextlib import suppress  # noqa: E402

from packcast.errors import PackcastError  # noqa: E402


def main() -> None:
    """Run the command line and exit with its code."""
    from packcast.cli.standard_streams import flush_streams, secure_streams

    secure_streams()
    try:
        from packcast.cli.app import run

        signal.signal(signal.SIGINT, _INTERRUPT)
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before a command has begun, or after it has ended
        code = 128 + signal.SIGINT
    with suppress(PackcastError):  # which has been said, if it is to be said
        flush_streams()
    if "torch" in sys.modules:
        # All that was begun has ended, and taking torch's modules down takes half a second.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
