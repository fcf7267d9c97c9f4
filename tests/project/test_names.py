"""One name for one thing: no two classes of the package share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import kalman_rl

SOURCE = Path(kalman_rl.__file__).parent


def classes() -> dict[str, list[str]]:
    """The modules that define each class, module level only."""
    found = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(path.relative_to(SOURCE).as_posix())
    return found


def test_no_two_classes_share_a_name() -> None:
    found = classes()
    assert found["Rollouts"] == ["objectives/rollouts.py"]  # classes were found at all
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
