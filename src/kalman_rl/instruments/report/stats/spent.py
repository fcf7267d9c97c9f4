"""Completions spent: the axis on which runs with different batches are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.instruments.report.stats.pool import Group
from kalman_rl.instruments.report.stats.series import series
from kalman_rl.instruments.report.stats.study import flat

SAME = 0.01
"""Runs whose completions per update differ by less than this part are compared by updates."""
Spent = Callable[[float], float]


def completions(run: RunRecord) -> Spent | None:
    """Completions sampled for training by a step: as booked, else prompts * completions of every generation batch.

    A batch is sampled before the first of its updates. A booked number is the mean over the batches since the row of
    the log before it. None where the settings do not tell.
    """
    settings = flat(run.config)
    names = ("prompts_per_generation", "completions_per_prompt", "updates_per_generation", "iterations")
    if not all(settings.get(name, "").isdigit() for name in names):
        return None
    prompts, each, updates, passes = (int(settings[name]) for name in names)
    cycle = max(1, updates * passes)

    def batches(step: float) -> int:
        return math.ceil(step / cycle)

    booked = [point for point in series(run.train, "budget/used") if math.isfinite(point[1])]
    if not booked:
        return lambda step: float(batches(step) * prompts * each)

    def spent(step: float) -> float:
        total, before = 0.0, 0.0
        for at, mean in booked:
            total += mean * (batches(min(at, step)) - batches(min(before, step)))
            before = at
        return total

    return spent


def by_completions(groups: Sequence[Group]) -> list[Spent] | None:
    """For each group what its runs had spent by a step, mean over its seeds; None where steps serve as well: for one
    group, for equal completions per update, and where a run does not tell."""
    means = [_mean([completions(run) for run in group.runs]) for group in groups]
    steps = [max(run.steps for run in group.runs) for group in groups]
    known = [spent for spent in means if spent]
    if len(known) < max(2, len(groups)) or not all(steps):
        return None
    rates = [spent(step) / step for spent, step in zip(known, steps)]
    return known if max(rates) - min(rates) > SAME * max(rates) else None


def _mean(found: Sequence[Spent | None]) -> Spent | None:
    known = [spent for spent in found if spent]
    return (lambda step: fmean(spent(step) for spent in known)) if len(known) == len(found) else None
