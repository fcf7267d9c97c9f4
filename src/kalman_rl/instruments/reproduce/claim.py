"""A claim: a number per seed, and where its interval must lie, written before the run.

reproduced    the 95 % interval lies inside the accepted range
refuted       it lies outside
not decided   it reaches over a bound, or there are fewer than two seeds
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kalman_rl.instruments.report.stats.intervals import t_interval

Records = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""What the trials of an experiment found: by arm, then by seed."""
Measure = Callable[[Records], list[float]]
"""One number per seed."""
Verdict = Literal["reproduced", "refuted", "not decided"]


@dataclass(frozen=True)
class Claim:
    """A sentence and its acceptance.

    Args:
        text: the claim, a full sentence. source: who makes it.
        measure: one number per seed; paired where two arms are compared.
        low, high: the accepted range of the number, open.
        factor: the number is a factor, so mean and interval are those of its logarithm.
        exact: the number has no noise; the first one is the answer.
    """

    text: str
    source: str
    measure: Measure
    low: float = -math.inf
    high: float = math.inf
    factor: bool = False
    exact: bool = False

    @property
    def acceptance(self) -> str:
        """The accepted range in words."""
        low, high = self.low > -math.inf, self.high < math.inf
        if low and high:
            return f"{self.low:g} to {self.high:g}"
        return f"> {self.low:g}" if low else f"< {self.high:g}"


class Judged(NamedTuple):
    """A claim's mean, 95 % interval over seeds (None with one seed), number per seed, and verdict."""

    value: float
    interval: tuple[float, float] | None
    per_seed: list[float]
    verdict: Verdict


def judge(claim: Claim, records: Records) -> Judged:
    """Measure a claim and compare its interval with the acceptance."""
    values = claim.measure(records)
    if not values:
        return Judged(math.nan, None, [], "not decided")
    if claim.exact:
        return Judged(values[0], (values[0], values[0]), values, verdict((values[0], values[0]), claim))
    numbers = [math.log(value) for value in values] if claim.factor else values
    back = math.exp if claim.factor else float
    mean, interval = back(sum(numbers) / len(numbers)), t_interval(numbers)
    if interval is None:
        return Judged(mean, None, values, "not decided")
    ends = (back(interval[0]), back(interval[1]))
    return Judged(mean, ends, values, verdict(ends, claim))


def verdict(interval: tuple[float, float], claim: Claim) -> Verdict:
    """Where an interval lies.

    >>> claim = Claim("a beats b", "a paper", lambda records: [], low=0.03)
    >>> [verdict(interval, claim) for interval in ((0.04, 0.06), (0.02, 0.06), (-0.01, 0.02))]
    ['reproduced', 'not decided', 'refuted']
    """
    low, high = interval
    if claim.low < low and high < claim.high:
        return "reproduced"
    return "refuted" if high <= claim.low or low >= claim.high else "not decided"


def value(arm: str, key: str = "mean") -> Measure:
    """A number of one arm."""
    return lambda records: [found[key] for _, found in sorted(records.get(arm, {}).items())]


def difference(arm: str, other: str, key: str = "mean") -> Measure:
    """``arm - other``, paired by seed."""
    return lambda records: [ours[key] - theirs[key] for ours, theirs in _pairs(records, arm, other)]


def ratio(arm: str, other: str, key: str) -> Measure:
    """``arm / other``, paired by seed."""
    return lambda records: [ours[key] / theirs[key] for ours, theirs in _pairs(records, arm, other)]


def saved(arm: str, other: str) -> Measure:
    """How many times fewer completions ``arm`` needs for the final accuracy of ``other``, seed by seed.

    The budget over the completions at which ``arm`` first has that accuracy. Where it never does, the other way round:
    the completions at which ``other`` first has the final accuracy of ``arm``, over the budget, which is below 1.
    """

    def measure(records: Records) -> list[float]:
        factors = []
        for ours, theirs in _pairs(records, arm, other):
            reached = _reached(ours, theirs["accuracy"][-1])
            if reached is not None:
                factors.append(theirs["spent"][-1] / reached)
            else:
                level = _reached(theirs, ours["accuracy"][-1])
                assert level is not None
                factors.append(level / ours["spent"][-1])
        return factors

    return measure


def _pairs(records: Records, arm: str, other: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """What two arms found for the seeds that both have."""
    first, second = records.get(arm, {}), records.get(other, {})
    return ((first[seed], second[seed]) for seed in sorted(first.keys() & second.keys()))


def _reached(run: Mapping[str, Any], level: float) -> float | None:
    """Completions at which a curve first has a level, linear between measurements; at least the first one's."""
    spent, accuracy = run["spent"], run["accuracy"]
    for i in range(1, len(spent)):
        if accuracy[i] >= level:
            before = accuracy[i - 1]
            share = 1.0 if before >= level else (level - before) / (accuracy[i] - before)
            found: float = spent[i - 1] + share * (spent[i] - spent[i - 1])
            return found
    return None
