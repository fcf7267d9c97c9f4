"""The command ``kalman-rl``."""

from __future__ import annotations

from kalman_rl.errors import AdapterError, extra
from kalman_rl.terminal import tell


def start() -> int:
    """Run the command line; returns its exit code. One sentence where the extra ``app`` is not installed."""
    try:
        with extra("app", "kalman-rl"):
            from kalman_rl.cli.main import main
    except AdapterError as error:
        tell(error, error=True)
        return 1
    except KeyboardInterrupt:
        tell("interrupted", error=True)
        return 130
    return main()
