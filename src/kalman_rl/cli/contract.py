"""What ``kalman-rl contract`` prints: one line a promise."""

from __future__ import annotations

import json
from pathlib import Path

from kalman_rl.instruments.contract import contract
from kalman_rl.terminal import tell


def show_contract(name: str, data: Path | None, as_json: bool) -> int:
    """Print the promises; returns 1 if one is broken, else 0. Raises: ConfigError for a name that is none."""
    found = contract(name, data)
    broken = sum(not promise.kept for promise in found.promises)
    if as_json:
        table = {"name": name, "kind": found.kind, "promises": [each._asdict() for each in found.promises]}
        tell(json.dumps(table, indent=1))
    else:
        tell(f"{name}, a {found.kind}")
        tell("\n".join(promise.text() for promise in found.promises))
        tell(f"{len(found.promises) - broken} of {len(found.promises)} promises kept")
    return 1 if broken else 0
