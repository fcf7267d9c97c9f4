"""The command ``kalman-rl``."""

from __future__ import annotations

import sys

from kalman_rl.errors import AdapterError, extra


def start() -> int:
    """Run the command line; returns its exit code. One sentence where the extra ``app`` is not installed."""
    try:
        with extra("app", "kalman-rl"):
            from kalman_rl.cli.main import main
    except AdapterError as error:
        print(error, file=sys.stderr)
        return 1
    return main()
