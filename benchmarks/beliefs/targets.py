"""The numbers this package set out to reach, and whether it does: tolerance +-10 %."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
TOLERANCE = 0.1


@dataclass(frozen=True)
class Target:
    """``goal`` for ``row[key]`` of the task ``kind`` whose cell holds ``cell``; smaller is better if ``low``."""

    claim: str
    setting: str
    kind: str
    cell: Row
    row: str
    key: str
    goal: float
    low: bool = False


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured: ``got`` = [mean, half width, n] or None; ``word`` says where it lies."""

    target: Target
    got: list[float] | None
    word: str
    others: Row = field(default_factory=dict)


def _value(group: int, noise: float, walk: float, goal: float, kind: str = "clean") -> Target:
    epochs = 50 if kind == "long" else 10
    cell = {"group": group, "noise": noise, "walk": walk}
    setting = f"G={group}, noise {noise:g}, drift {walk:g}, {epochs} epochs"
    return Target("value MSE gain", setting, kind, cell, "ours", "gain", goal)


def _saving(pool: str, aim: str, k: int, goal: float) -> Target:
    key, rule = ("gradient", "gradient") if aim == "gradient" else ("informative", "mixed_groups")
    return Target(
        f"rollouts saved, {key}",
        f"{pool}, k{k}",
        "allocation",
        {"pool": pool},
        f"ours {rule} k{k} [tracker]",
        key,
        goal,
    )


def _gradient(group: int, noise: float, goal: float) -> Target:
    cell = {"group": group, "noise": noise, "walk": 0.3}
    return Target(
        "gradient error vs LOO", f"G={group}, noise {noise:g}", "clean", cell, "ours", "error_ratio", goal
    )


def _training(group: int, noise: float, goal: float) -> Target:
    cell = {"group": group, "noise": noise}
    return Target(
        "toy training, final reward", f"G={group}, noise {noise:g}", "train", cell, "ours", "final", goal
    )


TARGETS: tuple[Target, ...] = (
    _value(8, 0.0, 0.05, 2.74),
    _value(8, 0.0, 0.3, 2.21),
    _value(8, 0.0, 1.0, 1.24),
    _value(8, 1.0, 0.3, 5.69),
    _value(8, 2.0, 0.3, 11.14),
    _value(8, 4.0, 0.3, 27.66),
    _value(4, 4.0, 0.3, 46.67),
    _value(2, 4.0, 0.3, 79.41),
    _value(8, 4.0, 0.05, 43.4, "long"),
    _value(2, 4.0, 0.05, 103.2, "long"),
    _gradient(2, 0.0, 2.11),
    _gradient(4, 1.0, 1.32),
    _gradient(8, 0.0, 1.17),
    _training(2, 1.0, 0.825),
    _training(4, 4.0, 0.577),
    _training(8, 4.0, 0.671),
    *(
        _saving(pool, aim, k, goal)
        for pool, goals in {
            "U-shaped warm": (1.86, 1.46, 2.10, 2.01),
            "U-shaped cold": (1.32, 1.30, 1.45, 1.31),
            "hard-skewed warm": (1.72, 1.43, 1.56, 1.75),
            "easy-skewed warm": (1.87, 1.46, 1.83, 2.08),
        }.items()
        for (aim, k), goal in zip(
            (("gradient", 2), ("gradient", 4), ("mixed_groups", 2), ("mixed_groups", 4)), goals
        )
    ),
    Target(
        "stability: largest advantage, raw",
        "G=8, noise 4",
        "clean",
        {"group": 8, "noise": 4.0, "walk": 0.3},
        "ours",
        "largest",
        16.6,
        low=True,
    ),
)


def find(results: Row, kind: str, cell: Row) -> Row | None:
    """The task of a kind whose cell holds these settings."""
    for task in results["tasks"]:
        if task["kind"] == kind and all(task["cell"].get(k) == v for k, v in cell.items()):
            return task
    return None


def verdicts(results: Row) -> Iterator[Verdict]:
    """Every target with what was measured; "not measured" where the task was not run."""
    for target in TARGETS:
        task = find(results, target.kind, target.cell)
        if task is None:
            yield Verdict(target, None, "not measured")
            continue
        got = task["rows"].get(target.row, {}).get(target.key)
        others = {name: row.get(target.key) for name, row in task["rows"].items() if name != target.row}
        yield Verdict(target, got, _word(target, got), others)


def _word(target: Target, got: list[float] | None) -> str:
    if got is None:
        return "missed: not reached in the sweep"
    ratio = got[0] / target.goal
    if abs(ratio - 1) <= TOLERANCE:
        return "inside"
    better = ratio < 1 if target.low else ratio > 1
    return "better" if better else "missed"
