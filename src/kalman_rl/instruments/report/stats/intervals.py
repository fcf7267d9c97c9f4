"""Intervals: how far an accuracy may be off, from the number of answers and from the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Interval = tuple[float, float]

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


def wilson(share: float, count: float) -> Interval:
    """Wilson's score interval of a share observed on ``count`` independent answers.

        centre = (p + z^2/2n) / (1 + z^2/n),   half = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)

    >>> [round(bound, 3) for bound in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    share = min(max(share, 0.0), 1.0)
    scale = 1 + Z * Z / count
    centre = (share + Z * Z / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / scale
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def newcombe(after: float, count_after: float, before: float, count_before: float) -> Interval:
    """Interval of the difference ``after - before`` of two independent shares (Newcombe 1998, method 10)."""
    low_after, high_after = wilson(after, count_after)
    low_before, high_before = wilson(before, count_before)
    difference = after - before
    return (
        difference - math.hypot(after - low_after, high_before - before),
        difference + math.hypot(high_after - after, before - low_before),
    )


def t_quantile(freedom: int) -> float:
    """The t with ``P(|T| < t) = 0.95`` at an integer number of degrees of freedom, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < LEVEL else (low, middle)
    return high


def _t_inside(t: float, freedom: int) -> float:
    """``P(|T| < t)``: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= cosine * cosine * (2 * k - 1 + odd) / (2 * k + odd)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean over seeds; None with fewer than two values."""
    if len(values) < 2:
        return None
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return mean - half, mean + half


def wider(*intervals: Interval | None) -> Interval | None:
    """The smallest interval that holds all given ones; None if there are none."""
    given = [interval for interval in intervals if interval is not None]
    return (min(low for low, _ in given), max(high for _, high in given)) if given else None


def overlap(one: Interval, other: Interval) -> bool:
    """True if the two intervals share a point."""
    return one[0] <= other[1] and other[0] <= one[1]
