"""Groups compared seed by seed: runs of one seed share start and prompts, so their difference is less noisy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.instruments.report.stats.intervals import t_interval
from kalman_rl.instruments.report.stats.pool import Group
from kalman_rl.instruments.report.stats.study import ACCURACIES, evaluations, trend
from kalman_rl.instruments.report.words import signed

End = Callable[[RunRecord], float | None]


@dataclass(frozen=True)
class Versus:
    """A group less the one it is compared with, at the seeds that both have."""

    name: str
    seeds: int
    difference: str
    interval: str
    higher: str


@dataclass(frozen=True)
class SeedBySeed:
    """``what`` of every other group is compared with that of the group ``first``."""

    what: str
    first: str
    rows: list[Versus]


def seed_by_seed(groups: Sequence[Group]) -> SeedBySeed | None:
    """Final values of each group less those of the first of those with most seeds, paired by seed; None where no two
    seeds are shared."""
    what, end = _compared(groups)
    tables = [{run.labels.get("seed", run.name): end(run) for run in group.runs} for group in groups]
    rows = []
    base = max(range(len(groups)), key=lambda place: groups[place].seeds)
    for group, table in zip(groups, tables):
        if group is groups[base]:
            continue
        pairs = [(table[seed], value) for seed, value in tables[base].items() if seed in table]
        changes = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
        if len(changes) > 1:
            interval = t_interval(changes)
            rows.append(
                Versus(
                    group.name,
                    len(changes),
                    signed(fmean(changes)),
                    f"{signed(interval[0])} to {signed(interval[1])}" if interval else "",
                    f"{sum(change > 0 for change in changes)} of {len(changes)}",
                )
            )
    return SeedBySeed(what, groups[base].name, rows) if rows else None


def _compared(groups: Sequence[Group]) -> tuple[str, End]:
    """The accuracy at the end that all runs measured, else their training reward in the last tenth of the updates."""
    runs = [run for group in groups for run in group.runs]
    for key, kind in ACCURACIES.items():
        if all(evaluations(run, key) for run in runs):
            return f"final {kind} accuracy", lambda run, key=key: evaluations(run, key)[-1][key]
    return "training reward at the end", lambda run: (trend(run, "reward") or (None, None))[1]
