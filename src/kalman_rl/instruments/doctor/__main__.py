"""``python -m kalman_rl.instruments.doctor``: the same checks where the command ``kalman-rl`` itself does not
start."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kalman_rl.instruments.doctor import PlannedRun, doctor


def main() -> int:
    """Read the flags of ``kalman-rl doctor`` with the standard library alone."""
    parser = argparse.ArgumentParser(prog="python -m kalman_rl.instruments.doctor")
    for name, kind in (("task", str), ("data", Path), ("reward", str), ("run", Path), ("config", Path)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--json", action="store_true")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    as_json = given.pop("json")
    return doctor(PlannedRun(**given), as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
