"""``python -m kalman_rl`` is the command ``kalman-rl``."""

from __future__ import annotations

import sys

from kalman_rl.cli import start

if __name__ == "__main__":
    sys.exit(start())
