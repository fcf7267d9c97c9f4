"""When surprises become an alarm: k of a metric's last n innovations outside their band, on one harmful side.

The band is the chi-square band of a normalised squared innovation, ``z^2 <= chi2_1(1 - 2 a)``, that is ``|z| <= u``
with one-sided tail a. Under white Gaussian innovations the outsides of one side are independent with probability a,
and :func:`false_alarm_rate` gives the alarms per observation that k of n then brings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from benchmarks.collapse.metrics import Metric
from benchmarks.collapse.surprise import Surprise
from kalman_rl.checks import is_real, is_whole, saved
from kalman_rl.errors import ConfigError, NumericError


@dataclass(frozen=True)
class Rule:
    """k of n observations beyond ``band`` standard deviations on the same harmful side.

    After an alarm the metric's window is emptied and it rests for ``rest`` observations.

    Args:
        band: > 0, standard deviations of the forecast.
        k, n: outsides among the newest n observations of a metric that make an alarm, 1 <= k <= n <= 16.
        rest: observations, >= 0.

    Raises: ConfigError, NumericError for a value outside its range.
    """

    band: float = 4.0
    k: int = 2
    n: int = 3
    rest: int = 16

    def __post_init__(self) -> None:
        if not (is_real(self.band) and 0 < self.band < math.inf):
            raise NumericError(
                f"band: got {self.band!r}, expected a finite number of standard deviations > 0"
            )
        check_counts(self.k, self.n, self.rest)

    @property
    def tail(self) -> float:
        """Probability that one white Gaussian innovation leaves the band on a given side."""
        return 0.5 * math.erfc(self.band / math.sqrt(2))

    def false_alarms(self) -> float:
        """Alarms per 1000 observations of a metric with one harmful side, under white Gaussian innovations."""
        return 1000 * false_alarm_rate(self.tail, self.k, self.n, self.rest)


def check_counts(k: int, n: int, rest: int) -> None:
    """Refuse counts of a rule out of range. Raises: ConfigError."""
    if not (is_whole(k, 1, 16) and is_whole(n, k, 16)):
        raise ConfigError(f"k, n: got {k!r} of {n!r}, expected integers 1 <= k <= n <= 16")
    if not is_whole(rest):
        raise ConfigError(f"rest: got {rest!r}, expected a number of observations >= 0")


def false_alarm_rate(tail: float, k: int, n: int, rest: int = 0) -> float:
    """Alarms per observation when every observation is outside with probability ``tail``, independently.

    Exact: the last n - 1 observations form a Markov chain over the windows with fewer than k outsides; its mean
    time to the k-th outside, from an empty window, is the solution of one linear system.

    Args:
        tail: in [0, 1).
        k, n: outsides among the newest observations that make an alarm, 1 <= k <= n <= 16.
        rest: observations after an alarm that are not looked at, >= 0.

    Raises: NumericError, ConfigError for a value out of range.

    >>> round(1 / false_alarm_rate(0.5, 2, 2), 9)  # two outsides in a row: 6 observations on average, as with coins
    6.0
    """
    if not (is_real(tail) and 0 <= tail < 1):
        raise NumericError(f"tail: got {tail!r}, expected [0, 1)")
    check_counts(k, n, rest)
    if tail < 1e-12:  # the mean time is beyond any run, and beyond the digits of the solution
        return 0.0
    size = n - 1
    windows = [
        sum(1 << i for i in chosen) for r in range(min(k, n)) for chosen in combinations(range(size), r)
    ]
    place = {window: i for i, window in enumerate(windows)}
    stay = torch.eye(len(windows), dtype=torch.float64)
    for window, i in place.items():
        for outside, chance in ((0, 1 - tail), (1, tail)):
            if window.bit_count() + outside < k:
                after = ((window << 1) | outside) & ((1 << size) - 1)
                stay[i, place[after]] -= chance
    mean_time = torch.linalg.solve(stay, torch.ones(len(windows), dtype=torch.float64))[place[0]].item()
    return 1 / (mean_time + rest)


@dataclass(frozen=True)
class Excursion:
    """A metric that left its band: where, which way, how far, and what to try."""

    step: int
    metric: str
    direction: str
    value: float
    expected: float
    z: float
    outside: int
    of: int
    advice: str


class Judge:
    """Keeps each metric's last n sides and decides; fed by :meth:`benchmarks.collapse.surprise.Watch.see`."""

    def __init__(self, rule: Rule | None = None) -> None:
        self.rule = rule or Rule()
        self._sides: dict[str, list[int]] = {}
        self._rest: dict[str, int] = {}

    def judge(self, step: int, surprises: Sequence[Surprise]) -> list[Excursion]:
        """Alarms of one step, at most one per metric."""
        return [alarm for surprise in surprises if (alarm := self._one(step, surprise)) is not None]

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state."""
        return {"sides": {name: list(sides) for name, sides in self._sides.items()}, "rest": dict(self._rest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises: ConfigError for a state that lacks a part."""
        sides, rest = saved("alarm state", state, "sides", "rest")
        self._sides = {name: [int(side) for side in row] for name, row in sides.items()}
        self._rest = {name: int(count) for name, count in rest.items()}

    def _one(self, step: int, surprise: Surprise) -> Excursion | None:
        metric, rule = surprise.metric, self.rule
        if self._rest.get(metric.name, 0) > 0:
            self._rest[metric.name] -= 1
            return None
        side = int(math.copysign(1, surprise.z)) if abs(surprise.z) > rule.band else 0
        sides = [*self._sides.get(metric.name, []), side][-rule.n :]
        self._sides[metric.name] = sides
        outside = sides.count(side)
        if side not in metric.harmful or outside < rule.k:
            return None
        of = len(sides)
        self._sides[metric.name], self._rest[metric.name] = [], rule.rest
        return _excursion(step, surprise, metric, side, outside, of)


def _excursion(step: int, surprise: Surprise, metric: Metric, side: int, outside: int, of: int) -> Excursion:
    return Excursion(
        step=step,
        metric=metric.name,
        direction="rising" if side > 0 else "falling",
        value=surprise.value,
        expected=surprise.expected,
        z=surprise.z,
        outside=outside,
        of=of,
        advice=metric.advice(side),
    )
