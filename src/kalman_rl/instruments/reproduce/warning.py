"""The experiment on precursors: does a falling effective sample size or a rising gradient norm announce a collapse?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalman_rl.instruments.reproduce.claim import Claim, Measure, Records
from kalman_rl.instruments.reproduce.collapses import UPDATES, ahead, collapse_of, false_alarm
from kalman_rl.instruments.reproduce.experiment import Experiment
from kalman_rl.instruments.reproduce.loop import Arm, Setting, Training, train
from kalman_rl.instruments.reproduce.pool import World
from kalman_rl.instruments.reproduce.ratios import PLENTY, PUBLISHED, TEACHING

WINDOW = 8 // UPDATES
"""Generation batches in a mean over 8 updates."""
Run = Mapping[str, Any]
Signal = Callable[[Run], list[float]]
"""From a run to one number per generation batch, larger = worse."""
Judge = Callable[[int | None, int | None], bool | None]


@dataclass(frozen=True)
class Signalled(Training):
    """A trial that also keeps what every update said."""

    def run(self, worlds: Callable[[], World], seed: int) -> dict[str, Any]:
        return train(worlds(), self.setting, self.arm, seed, signals=True)


def means(values: Sequence[float], window: int) -> list[float]:
    """The mean of each ``window`` values in a row.

    >>> means([1.0, 3.0, 5.0], 2)
    [2.0, 4.0]
    """
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def in_batches(values: Sequence[float]) -> list[float]:
    """Means over the updates of each generation batch."""
    return means(values, UPDATES)[::UPDATES]


def lost_size(run: Run) -> list[float]:
    """Share of the sequences that the effective sample size has lost."""
    return [1 - size for size in means(in_batches(run["size"]), WINDOW)]


def gradient_norm(run: Run) -> list[float]:
    """Norm of the gradient before clipping."""
    return means(in_batches(run["grad_norm"]), WINDOW)


def lost_reward(run: Run) -> list[float]:
    """How far the reward is below its best so far, as a share of it."""
    found, best = [], 0.0
    for reward in means(run["reward"], WINDOW):
        best = max(best, reward)
        found.append(1 - reward / best if best else 0.0)
    return found


def alarm(run: Run, signal: Signal, limit: float) -> int | None:
    """First generation batch whose end finds the mean over 8 updates beyond the limit."""
    return next((i + WINDOW - 1 for i, value in enumerate(signal(run)) if value > limit), None)


def limit_of(records: Records, signal: Signal, arms: Sequence[str], without: int) -> float | None:
    """The worst value of the runs of these arms that held, one seed left out; None where there is no such run."""
    held = [
        run
        for arm in arms
        for seed, run in records.get(arm, {}).items()
        if seed != without and collapse_of(run["reward"]) is None
    ]
    return max((max(signal(run)) for run in held), default=None)


def share(signal: Signal, set_by: Sequence[str], arms: Sequence[str], judge: Judge) -> Measure:
    """Share of the runs of ``arms``, seed by seed, where ``judge(collapse, alarm)`` is true; None leaves a run out."""

    def measure(records: Records) -> list[float]:
        shares = []
        for seed in sorted(set.intersection(*(set(records.get(arm, {})) for arm in arms))):
            limit = limit_of(records, signal, set_by, seed)
            if limit is None:
                continue
            runs = [records[arm][seed] for arm in arms]
            judged = [judge(collapse_of(run["reward"]), alarm(run, signal, limit)) for run in runs]
            known = [float(found) for found in judged if found is not None]
            shares += [sum(known) / len(known)] if known else []
        return shares

    return measure


_SLOW = {"grpo, 1e-4": Arm(), "kpo_diffuse, 1e-4": Arm("kpo_diffuse", PUBLISHED)}
_FAST = {"grpo, 2e-4": Arm(rate=2e-4), "grpo, 3e-4": Arm(rate=3e-4)}
_FALL = {
    "grpo, to 2e-3": Arm(end_rate=2e-3),
    "no ratio, to 2e-3": Arm("ratio_one", end_rate=2e-3),
    "grpo, to 4e-3": Arm(end_rate=4e-3),
    "grpo, 1e-3": Arm(rate=1e-3),
}
_ALL = _SLOW | _FAST | _FALL
_SIGNALS: dict[str, tuple[str, Signal]] = {
    "a falling effective sample size": ("VCPO", lost_size),
    "a rising gradient norm": ("VCPO", gradient_norm),
    "the falling reward itself": ("project", lost_reward),
}


def _claims(limits: str, known: tuple[str, ...], calm: tuple[str, ...], these: str) -> Iterator[Claim]:
    """For each signal: is it ahead of the collapses, and quiet in the runs ``calm``, with limits from ``known``?"""
    for name, (source, signal) in _SIGNALS.items():
        yield Claim(
            f"With limits from {limits}, {name} is 10 updates ahead of over half of the collapses.",
            source,
            share(signal, known, tuple(_ALL), ahead),
            low=0.5,
        )
        yield Claim(
            f"With limits from {limits}, {name} alarms in under 0.2 of {these}.",
            source,
            share(signal, known, calm, false_alarm),
            high=0.2,
        )


WARNING = Experiment(
    "warning",
    "Does a falling effective sample size or a rising gradient norm announce a collapse ten updates ahead?",
    f"{PLENTY}; 8192 completions, groups of 8, 128 a batch, 4 updates; two rates meant to hold, a slow and a fast one, "
    "and four arms meant to fall; an alarm is a mean over 8 updates beyond the worst of the runs of other seeds "
    "that held",
    {name: Signalled(Setting(mix=TEACHING), arm) for name, arm in _ALL.items()},
    (
        *_claims("all runs that hold", tuple(_ALL), tuple(_ALL), "them"),
        *_claims("the slow runs alone", tuple(_SLOW), tuple(_FAST), "the fast runs that hold"),
    ),
    quick_seeds=0,
)
