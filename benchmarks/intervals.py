"""Means over seeds with the 95 % interval of Student's t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Mean(NamedTuple):
    """A mean over seeds, half the width of its 95 % interval (NaN for one seed), and how many seeds."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return text(self)


def over_seeds(values: np.ndarray) -> Mean:
    """Mean and half width ``t_{0.975, n-1} s / sqrt(n)`` of one number per seed; NaN values are left out.

    >>> over_seeds(np.array([1.0, 2.0, 3.0]))._replace(half=0.0)
    Mean(mean=2.0, half=0.0, n=3)
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    n = len(known)
    if n == 0:
        return Mean(float("nan"), float("nan"), 0)
    half = stats.t.ppf(0.975, n - 1) * known.std(ddof=1) / np.sqrt(n) if n > 1 else float("nan")
    return Mean(float(known.mean()), float(half), n)


def stored(values: Sequence[float]) -> Mean:
    """The mean that was written as a list.

    >>> stored([0.5, 0.1, 20])
    Mean(mean=0.5, half=0.1, n=20)
    """
    return Mean(float(values[0]), float(values[1]), int(values[2]))


def text(value: Mean | None, digits: int | None = None) -> str:
    """``2.74±0.06``, with as many digits as are worth reading; a dash where there is nothing."""
    if value is None or not np.isfinite(value.mean):
        return "-"
    if digits is None:
        digits = 2 if abs(value.mean) < 10 else 1
    half = "" if not np.isfinite(value.half) else f"±{value.half:.{digits}f}"
    return f"{value.mean:.{digits}f}{half}"
