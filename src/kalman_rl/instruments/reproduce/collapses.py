"""The experiment on collapses: what a fallen reward tells, and how early."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kalman_rl.engine.collapse.rule import Fall
from kalman_rl.instruments.reproduce.claim import Claim, Measure, Records
from kalman_rl.instruments.reproduce.experiment import Experiment
from kalman_rl.instruments.reproduce.loop import Arm, Setting, Training
from kalman_rl.instruments.reproduce.ratios import PLENTY, PUBLISHED, TEACHING

UPDATES, LASTS, AHEAD = 4, 32, 10
"""Updates per generation batch; updates that a collapse lasts; updates that a warning should come before it."""
Rule = Callable[[Sequence[float]], int | None]
"""From the rewards of generation batches to the batch of the first alarm, if any."""


def collapse_of(rewards: Sequence[float]) -> int | None:
    """First batch from which the reward stays below half of its best so far for 32 updates.

    >>> collapse_of([0.4, 0.5, 0.2] + 8 * [0.1])
    2
    >>> collapse_of([0.4, 0.5, 0.2, 0.4, 0.5, 0.4, 0.5, 0.5, 0.5, 0.5]) is None
    True
    """
    best, needed = 0.0, LASTS // UPDATES
    for batch, reward in enumerate(rewards):
        stay = rewards[batch : batch + needed]
        if len(stay) == needed and max(stay) < best / 2:
            return batch
        best = max(best, reward)
    return None


def fallen_mean(rewards: Sequence[float]) -> int | None:
    """First batch at which the mean over 8 updates is below 0.6 of its best.

    >>> fallen_mean([0.4, 0.5, 0.5, 0.3, 0.2, 0.1])
    4
    """
    best, window = 0.0, 8 // UPDATES
    for batch in range(window - 1, len(rewards)):
        mean = sum(rewards[batch - window + 1 : batch + 1]) / window
        if mean < 0.6 * best:
            return batch
        best = max(best, mean)
    return None


def package_rule(rewards: Sequence[float]) -> int | None:
    """The rule of ``--collapse``: the filtered level below half of its best."""
    fall = Fall()
    return next((batch for batch, reward in enumerate(rewards) if fall.see(batch, {"reward": reward})), None)


def _alarms(
    rule: Rule, arms: Sequence[str], judge: Callable[[int | None, int | None], bool | None]
) -> Measure:
    """Share of an arm's runs, seed by seed, where ``judge(collapse, alarm)`` is true; None leaves a run out."""

    def measure(records: Records) -> list[float]:
        shares = []
        for seed in sorted(set.intersection(*(set(records.get(arm, {})) for arm in arms))):
            runs = [records[arm][seed]["reward"] for arm in arms]
            judged = [judge(collapse_of(run), rule(run)) for run in runs]
            known = [float(found) for found in judged if found is not None]
            shares += [sum(known) / len(known)] if known else []
        return shares

    return measure


def ahead(collapse: int | None, alarm: int | None) -> bool | None:
    """Whether an alarm came 10 updates before a collapse, both given as generation batches; None without a collapse."""
    if collapse is None:
        return None
    return alarm is not None and (collapse - alarm) * UPDATES >= AHEAD


def _noticed(collapse: int | None, alarm: int | None) -> bool | None:
    return None if collapse is None else alarm is not None


def false_alarm(collapse: int | None, alarm: int | None) -> bool | None:
    """Whether a run that held was alarmed; None where it did not hold."""
    return None if collapse is not None else alarm is not None


_HOLD = {
    "grpo, 1e-4": Arm(),
    "grpo, 5e-5": Arm(rate=5e-5),
    "kpo_diffuse, 1e-4": Arm("kpo_diffuse", PUBLISHED),
}
_FALL = {
    "grpo, to 2e-3": Arm(end_rate=2e-3),
    "no ratio, to 2e-3": Arm("ratio_one", end_rate=2e-3),
    "grpo, to 4e-3": Arm(end_rate=4e-3),
}
_ARMS = tuple(_HOLD | _FALL)
_RULES: dict[str, Rule] = {
    "A mean over 8 updates below 0.6 of its best": fallen_mean,
    "The package's brake": package_rule,
}
COLLAPSE = Experiment(
    "collapse",
    "Does a fallen reward tell of a collapse, in time and without false alarms?",
    f"{PLENTY}; 8192 completions, groups of 8, 128 a batch, 4 updates; "
    "three arms meant to hold and three whose rate rises until they fall",
    {name: Training(Setting(mix=TEACHING), arm) for name, arm in (_HOLD | _FALL).items()},
    tuple(
        claim
        for text, rule in _RULES.items()
        for claim in (
            Claim(
                f"{text} notices over 0.8 of the collapses.",
                "project",
                _alarms(rule, _ARMS, _noticed),
                low=0.8,
            ),
            Claim(
                f"{text} is 10 updates ahead of over half of the collapses.",
                "project",
                _alarms(rule, _ARMS, ahead),
                low=0.5,
            ),
            Claim(
                f"{text} alarms in under 0.2 of the runs that hold.",
                "project",
                _alarms(rule, _ARMS, false_alarm),
                high=0.2,
            ),
        )
    ),
    seeds=4,
)
