"""Tables and curves from the ledger of runs: every seed, medians, and the bars that were set before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.reppo.plan import ARMS, EPISODES, EVALUATIONS, SEEDS, TASKS
from kalman_rl.palette import LIGHT

COLOURS = dict(zip(ARMS, LIGHT))
PARTS = ("no gate", "score function", "scalar critic", "paper's duals")
"""Arms that differ from REPPO in one part."""


def read(ledger: Path) -> list[dict[str, Any]]:
    """Finished runs; none where there is no ledger."""
    if not ledger.exists():
        return []
    return [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines() if line]


def cells(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Runs by task and arm, in the order of their seeds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found.setdefault((row["task"], row["arm"]), []).append(row)
    return found


def verdict(task: str, values: list[float]) -> str:
    """met or not met, once all seeds are there; empty where no bar was set."""
    bar = TASKS[task].bar
    if bar is None:
        return ""
    if len(values) < len(SEEDS):
        return f"open ({len(values)} of {len(SEEDS)} seeds)"
    return "met" if median(values) >= bar else "not met"


def over_curve(run: dict[str, Any]) -> float:
    """The mean of a run's evaluations: higher for one that learns sooner."""
    return mean(row["return"] for row in run["curve"])


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| task, steps | arm | every seed | median | bar | verdict | median over the whole curve | seconds a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = cells(rows)
    for task, wanted in TASKS.items():
        for arm in ARMS:
            runs = found.get((task, arm))
            if runs is None:
                continue
            values = [run["return"] for run in runs]
            bar = "" if wanted.bar is None else f"{wanted.bar:g}"
            lines.append(
                f"| {task}, {wanted.steps // 1000}k | {arm} | {', '.join(f'{value:.0f}' for value in values)} "
                f"| {median(values):.1f} | {bar} | {verdict(task, values)} "
                f"| {median(over_curve(run) for run in runs):.1f} | {median(run['seconds'] for run in runs):.0f} |"
            )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], arms: Sequence[str], file: Path) -> Any:
    """Every run of these arms as a thin line, the median as a thick one, for every task that all of them ran."""
    from matplotlib.figure import Figure

    found = cells(rows)
    tasks = [task for task in TASKS if all((task, arm) in found for arm in arms)]
    if not tasks:
        return None
    figure = Figure(figsize=(4.2 * min(len(tasks), 3), 3.0 * -(-len(tasks) // 3)), layout="constrained")
    axes = list(figure.subplots(-(-len(tasks) // 3), min(len(tasks), 3), squeeze=False).flat)
    for ax in axes[len(tasks) :]:
        ax.set_axis_off()
    for ax, task in zip(axes, tasks):
        for arm in arms:
            runs = found[task, arm]
            for run in runs:
                steps, values = zip(*[(row["step"], row["return"]) for row in run["curve"]])
                ax.plot(steps, values, color=COLOURS[arm], alpha=0.25, linewidth=0.8)
            points = list(zip(*[run["curve"] for run in runs]))
            middle = [median(row["return"] for row in point) for point in points]
            steps = [median(row["step"] for row in point) for point in points]
            ax.plot(steps, middle, color=COLOURS[arm], linewidth=1.8, label=arm)
        bar = TASKS[task].bar
        if bar is not None:
            ax.axhline(bar, color="black", linewidth=0.8, linestyle=":")
        ax.set_title(task, fontsize="medium")
        ax.set_xlabel("steps of the environment")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize="x-small")
    figure.savefig(file, dpi=110)
    return figure


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """``reppo.md``, ``reppo.png`` with PPO and ``ablations.png`` without one part each; nothing without runs."""
    if not rows:
        return
    text = (
        f"Return of {EPISODES} episodes without noise after the last step, every seed. The whole curve is the mean of "
        f"its {EVALUATIONS} evaluations, the median over seeds of it. Seconds on one thread of a crowded machine.\n\n"
    )
    (folder / "reppo.md").write_text(text + table(rows), encoding="utf-8")
    draw(rows, ("reppo", "ppo"), folder / "reppo.png")
    draw(rows, ("reppo", *PARTS), folder / "ablations.png")
