"""Resident memory over many tiny steps. Survived: less than ``MOST`` MB more per 1000 steps, after the first fifth."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from benchmarks.chaos.made import program, tiny_model, train_command
from benchmarks.chaos.trial import Outcome, Plan

STEPS = 20_000
MOST = 1.0
TAIL = 20_000
"""Bytes at the end of ``metrics.jsonl`` in which the newest row begins."""


def run(plan: Plan) -> Outcome:
    outcome = Outcome("memory")
    path, log = plan.folder / "run", plan.folder / "log"
    steps = max(200, plan.count(STEPS))
    few = {"eval_every": 0, "save_every": steps, "traces_per_step": 0}
    words = train_command(tiny_model(plan.folder / "model"), path, steps=steps, **few)
    with outcome.trial(f"{steps} steps"):
        seen = watched(program(words, log), path / "metrics.jsonl")
        slope = per_thousand([(step, size) for step, size in seen if step > steps / 5])
        outcome.seen[f"steps, {slope:+.2f} MB per 1000 steps, {seen[-1][1]:.0f} MB at the end"] = steps
        if plan.size == 1 and slope >= MOST:
            raise AssertionError(f"{slope:.2f} MB per 1000 steps, expected less than {MOST}")
    return outcome


def watched(pid: int, metrics: Path) -> list[tuple[int, float]]:
    """(newest step, MB resident) of a process, until it ends."""
    seen: list[tuple[int, float]] = []
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        if pages:  # none once it has ended
            seen.append((newest_step(metrics), pages * os.sysconf("SC_PAGE_SIZE") / 1e6))
        time.sleep(0.2)
    if ended[1]:
        raise AssertionError(f"the run ended with {os.waitstatus_to_exitcode(ended[1])}")
    return seen


def newest_step(metrics: Path) -> int:
    """Step of the last row of metrics, 0 without one."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL))
        found = re.findall(rb'"kind": "train", "step": (\d+)', file.read())
    return int(found[-1]) if found else 0


def per_thousand(points: list[tuple[int, float]]) -> float:
    """Least-squares slope, in MB per 1000 steps."""
    if not points:
        raise AssertionError("got no step to measure")
    x, y = (sum(part) / len(points) for part in zip(*points, strict=True))
    spread = sum((step - x) ** 2 for step, _ in points)
    return 1000 * sum((step - x) * (size - y) for step, size in points) / spread if spread else 0.0
