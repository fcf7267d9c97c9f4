"""Study: runs sorted into arms (one method under one condition), and what each arm's numbers say.

The rule of the whole report: a difference counts only beyond the noise. The noise of an arm is the wider
of two 95% intervals: the spread over seeds (Student's t, from two seeds on) and the number of held-out
answers (Wilson). The same prompts serve every seed, so their count is not multiplied by the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from kalman_rl.engine.runs.reading import Row, RunRecord
from kalman_rl.engine.runs.received import parse_toml
from kalman_rl.instruments.report.stats.intervals import (
    Interval,
    newcombe,
    overlap,
    t_interval,
    wider,
    wilson,
)
from kalman_rl.instruments.report.stats.series import complement, ends, finite, same, series

SAMPLED, GREEDY = "eval/sampled_accuracy", "eval/greedy_accuracy"
ACCURACIES = {SAMPLED: "sampled", GREEDY: "greedy"}
POOL_SAMPLED, POOL_GREEDY = "pool/sampled_accuracy", "pool/greedy_accuracy"
POOL_ACCURACIES = {POOL_SAMPLED: "sampled", POOL_GREEDY: "greedy"}
"""The same on prompts that were trained on, see the setting ``pool_prompts``."""
METHOD_ORDER = (
    "kpo",
    "kpo_diffuse",
    "kpo_unclipped",
    "ratio_one",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
)
COLOUR_OF = {
    "kpo_diffuse": 0,
    "kpo": 1,
    "grpo": 2,
    "gspo": 3,
    "reinforce": 4,
    "kpo_unclipped": 5,
    "ratio_one": 7,
}
OTHER_COLOURS = (4, 6, 5)
NOT_A_CONDITION = frozenset({"seed", "method", "run", "name", "condition", "labels"})


@dataclass(frozen=True)
class Measured:
    """One accuracy in one arm: per seed at the end, per seed at the start, and the answers behind each."""

    finals: tuple[float, ...]
    starts: tuple[float, ...] = ()
    count: float | None = None
    start_count: float | None = None

    @property
    def mean(self) -> float:
        return fmean(self.finals)

    @property
    def start(self) -> float | None:
        return fmean(self.starts) if self.starts else None

    @cached_property
    def over_seeds(self) -> Interval | None:
        """Student's interval of the mean over seeds, inside [0, 1]."""
        interval = t_interval(self.finals)
        return interval and (max(0.0, interval[0]), min(1.0, interval[1]))

    @cached_property
    def noise(self) -> Interval | None:
        """Where the accuracy may lie: the wider of the intervals over seeds and over answers."""
        return wider(self.over_seeds, wilson(self.mean, self.count) if self.count else None)

    @cached_property
    def change(self) -> Interval | None:
        """Where the difference final - start may lie; None without a start or without any count of noise."""
        if self.start is None:
            return None
        answers = None
        if self.count:
            answers = newcombe(self.mean, self.count, self.start, self.start_count or self.count)
        seeds = t_interval([after - before for after, before in zip(self.finals, self.starts)])
        both = wider(seeds, answers)
        return both and (max(-1.0, both[0]), min(1.0, both[1]))

    @property
    def verdict(self) -> str:
        """``learned``, ``collapsed`` (half of the start is gone), ``worse``, ``unclear`` or ``unknown``."""
        if self.start is None or self.change is None:
            return "unknown"
        low, high = self.change
        if low > 0:
            return "learned"
        if high < 0:
            return "collapsed" if self.mean <= self.start / 2 else "worse"
        return "unclear"


@dataclass(frozen=True)
class StudyArm:
    """One method under one condition: its finished runs, and how many did not finish."""

    method: str
    condition: str
    runs: list[RunRecord]
    unfinished: int = 0
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def main(self) -> Measured | None:
        """The accuracy that verdicts use: sampled if it was measured, else greedy."""
        return self.measured.get(SAMPLED) or self.measured.get(GREEDY)

    @property
    def kind(self) -> str:
        return ACCURACIES[SAMPLED if SAMPLED in self.measured else GREEDY]


def evaluations(run: RunRecord, key: str) -> list[Row]:
    """Evaluations of a run in which ``key`` was measured."""
    return [row for row in run.evals if math.isfinite(row.get(key, math.nan))]


def measure(
    runs: Iterable[RunRecord], key: str, fallback: tuple[float, float | None] | None = None
) -> Measured | None:
    """Final and start accuracy over runs; a run with one evaluation only borrows the ``fallback`` start."""
    finals, starts, counts, start_counts = [], [], [], []
    for run in runs:
        rows = evaluations(run, key)
        if not rows:
            continue
        finals.append(rows[-1][key])
        counts.append(answers(rows[-1], key))
        if len(rows) > 1:
            starts.append(rows[0][key])
            start_counts.append(answers(rows[0], key))
        elif fallback:
            starts.append(fallback[0])
            start_counts.append(fallback[1])
    if not finals:
        return None
    if len(starts) < len(finals):
        starts = []
    return Measured(tuple(finals), tuple(starts), _smallest(counts), _smallest(start_counts))


def answers(row: Row, key: str) -> float | None:
    """Replies behind an accuracy: one per prompt, or several where each prompt was sampled several times."""
    side = key.partition("/")[0]
    samples = row.get(f"{side}/samples", 1.0) if "sampled" in key else 1.0
    count = row.get(f"{side}/count", math.nan) * samples
    return count if math.isfinite(count) and count >= 1 else None


def _smallest(counts: Sequence[float | None]) -> float | None:
    known = [count for count in counts if count]
    return min(known) if len(known) == len(counts) and known else None


def arm(method: str, condition: str, runs: Sequence[RunRecord], study: Sequence[RunRecord] = ()) -> StudyArm:
    """Measure one arm; ``study`` gives the common start for runs that were only evaluated at the end."""
    finished = [run for run in runs if run.finished] or (list(runs) if not study else [])
    measured = {}
    for key in ACCURACIES:
        common = [rows[0] for run in study if len(rows := evaluations(run, key)) > 1]
        fallback = (
            (fmean(row[key] for row in common), _smallest([answers(row, key) for row in common]))
            if common
            else None
        )
        result = measure(finished, key, fallback)
        if result:
            measured[key] = result
    return StudyArm(method, condition, finished, len(runs) - len(finished), measured)


@dataclass(frozen=True)
class Study:
    """A stress study: arms by condition and method."""

    arms: list[StudyArm]
    runs: list[RunRecord]
    notes: list[str]

    @property
    def conditions(self) -> list[str]:
        return sorted({arm.condition for arm in self.arms})

    @property
    def methods(self) -> list[str]:
        return sorted({arm.method for arm in self.arms}, key=method_rank)

    def under(self, condition: str) -> list[StudyArm]:
        return [arm for arm in self.arms if arm.condition == condition]

    def find(self, condition: str, method: str) -> StudyArm | None:
        return next((arm for arm in self.under(condition) if arm.method == method), None)

    @property
    def seeds(self) -> tuple[int, int]:
        """Fewest and most finished runs in an arm."""
        sizes = [len(arm.runs) for arm in self.arms]
        return min(sizes), max(sizes)


def method_rank(name: str) -> tuple[int, str]:
    """Sorting key: known methods in their fixed order, then the others by name."""
    return METHOD_ORDER.index(name) if name in METHOD_ORDER else len(METHOD_ORDER), name


def colours(names: Sequence[str]) -> dict[str, int]:
    """A fixed colour per known method; the others take turns."""
    others = [name for name in names if name not in COLOUR_OF]
    turns = {name: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, name in enumerate(others)}
    return {name: COLOUR_OF[name] if name in COLOUR_OF else turns[name] for name in names}


def split(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], Study | None]:
    """Main runs (no ``condition`` label) and the stress study made of all others."""
    main = [run for run in runs if "condition" not in run.labels]
    stress = [run for run in runs if "condition" in run.labels]
    if not stress:
        return main, None
    notes: list[str] = []
    cells: dict[tuple[str, str], dict[str, RunRecord]] = {}
    for run in sorted(stress, key=lambda run: run.facts.get("created", "")):
        cell = cells.setdefault((run.labels["condition"], run.labels.get("method", "unnamed")), {})
        seed = run.labels.get("seed", run.name)
        if seed in cell:
            notes.append(f"{cell[seed].name} repeats {run.name}; only the later one is counted")
        cell[seed] = run
    kept = [run for cell in cells.values() for run in cell.values()]
    arms = [
        arm(method, condition, list(cells[condition, method].values()), kept)
        for condition, method in sorted(cells, key=lambda pair: (pair[0], method_rank(pair[1])))
    ]
    return main, Study(arms, kept, notes)


def subject_of(run: RunRecord) -> str:
    """What was trained on what; only runs of one subject are compared.

    >>> from types import SimpleNamespace
    >>> subject_of(SimpleNamespace(labels={"model": "tiny", "task": "sort16"}))
    'tiny on sort16'
    """
    return " on ".join(run.labels[label] for label in ("model", "task") if run.labels.get(label))


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """The shortest label that tells the runs apart: the method, the method and seed, or the directory."""
    rules: tuple[Callable[[RunRecord], str], ...] = (
        lambda run: run.labels.get("method", run.name),
        lambda run: f"{run.labels.get('method', run.name)}, seed {run.labels.get('seed', '?')}",
        lambda run: run.name,
    )
    tables = [[rule(run) for run in runs] for rule in rules]
    return next((names for names in tables if len(set(names)) == len(names)), tables[-1])


def ties(one: StudyArm, other: StudyArm) -> bool | None:
    """True if the two arms cannot be told apart; None if one of them has no interval."""
    if not (one.main and other.main and one.main.noise and other.main.noise):
        return None
    return overlap(one.main.noise, other.main.noise)


def differences(study: Study) -> dict[str, dict[str, str]]:
    """Settings that are the same inside each condition but not across them: ``{condition: {key: value}}``."""
    seen: dict[str, dict[str, set[str]]] = {}
    for run in study.runs:
        table = seen.setdefault(run.labels["condition"], {})
        for key, value in flat(run.config).items():
            table.setdefault(key, set()).add(value)
    keys = sorted(set.intersection(*(set(table) for table in seen.values())))
    telling = [
        key
        for key in keys
        if key.split(".")[0] not in NOT_A_CONDITION
        and all(len(table[key]) == 1 for table in seen.values())
        and len({next(iter(table[key])) for table in seen.values()}) > 1
    ]
    return {condition: {key: next(iter(table[key])) for key in telling} for condition, table in seen.items()}


def flat(config: str) -> dict[str, str]:
    """Dotted keys and printed values of a TOML text; empty if it cannot be read."""
    try:
        tree = parse_toml(config)
    except ValueError:
        return {}
    return dict(_leaves(tree, ""))


def _leaves(tree: dict[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)[:60]


def trend(run: RunRecord, key: str, *, kept: bool = False) -> tuple[float, float] | None:
    """Means of the first and last tenth of a training metric; with ``kept``, of one minus it."""
    return ends(series(run.train, key, complement if kept else same, skip_noop="/" in key))


def noop_share(run: RunRecord) -> float | None:
    """Share of updates whose log-ratios were all zero, so that every ratio method does the same."""
    values = finite(series(run.train, "ratio/noop"))
    return fmean(values) if values else None
