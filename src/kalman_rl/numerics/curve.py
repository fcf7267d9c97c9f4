"""One noisy curve as a smooth line with a band and a slope, for people to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.numerics.arguments import expect_values
from kalman_rl.numerics.likelihood import profile
from kalman_rl.numerics.smoother import noise_sums, wiener_smoother

QUANTILE = 1.6448536269514722  # of the normal distribution at 0.95: a band of 90 %
FEWEST, MOST = 4, 400
_ROUGHEST = 6.0  # log of q step^3 / R where the line follows every value
_SPACING = math.log(10) / 3
_LEAST_WEIGHT = 1e-3


class SmoothCurve(NamedTuple):
    """Lists of equal length: ``step``; ``mean`` with the 90 % band ``low`` to ``high``; ``slope`` per step with its
    own, ``slope_low`` to ``slope_high``. The bands hold the line, not single values."""

    step: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    slope: list[float]
    slope_low: list[float]
    slope_high: list[float]


def smooth_curve(steps: Sequence[float], values: Sequence[float], *, most: int = MOST) -> SmoothCurve:
    """The line behind noisy values: a smoothing spline, averaged over how smooth it may be.

    Each smoothness on a grid, from a straight line to following every value, counts by its likelihood; the band holds
    the spread between them too.

    Args:
        steps: n numbers that strictly increase.
        values: n numbers; NaN = missing.
        most: longer curves are averaged over neighbours down to this many points first; what is narrower than such
            a stretch is not resolved.

    Returns: :class:`SmoothCurve` at the steps that have a value, or at the means of the averaged ones. Where the
        values lie on a straight line the bands have no width.

    Raises: NumericError for fewer than four values or steps that do not increase; ShapeError for unequal lengths.

    Source: Wahba (1983) for the band of a spline. The noise is taken as equal and independent from step to step.

    >>> curve = smooth_curve(range(6), [0.0, 1.1, 1.9, 3.2, 3.9, 5.1])
    >>> round(curve.slope[0], 1), curve.low[0] < curve.mean[0] < curve.high[0]
    (1.0, True)
    """
    if len(steps) != len(values):
        raise ShapeError(f"values: got {len(values)}, expected {len(steps)}, one per step")
    pairs = [(float(s), float(v)) for s, v in zip(steps, values) if math.isfinite(v)]
    if len(pairs) < FEWEST:
        raise NumericError(f"values: got {len(pairs)} finite ones, expected at least {FEWEST} to draw a line")
    data = torch.tensor(pairs, dtype=torch.float64)
    rising = torch.nn.functional.pad(data[:, 0].diff(), (1, 0), value=1.0) > 0
    expect_values("steps", data[:, 0], rising, "more than the step before", "sort them", "(place,)")
    first, size = data[0, 0], data[:, 1].abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    unit = (data[-1, 0] - first) / (len(data) - 1)
    data = torch.stack(((data[:, 0] - first) / unit, data[:, 1] / size), 1)  # so that nothing overflows
    bins = data.tensor_split(min(len(data), most))
    time, value = torch.stack([part.mean(0) for part in bins]).T
    level = value.mean()
    value = value - level
    noise = torch.tensor([1.0 / len(part) for part in bins], dtype=torch.float64)  # of a mean
    smoothest = -4 * math.log(len(bins))  # a bend takes the whole curve
    grid = [_ROUGHEST - _SPACING * k for k in range(int((_ROUGHEST - smoothest) / _SPACING) + 2)]
    sums, log_ratios = noise_sums(value[None], time, grid=grid, relative_noise=noise)
    quadratic = sums[1 : 1 + len(grid)]
    if float(quadratic.min()) <= 1e-24 * len(bins):  # rounding of a straight line
        weight, scale = torch.eye(len(grid), dtype=torch.float64)[-1], torch.zeros_like(quadratic)
    else:
        weight, scale = profile(sums).softmax(0), quadratic / sums[0]
    kept = weight >= _LEAST_WEIGHT
    weight, ratio, scale = (part[kept] for part in (weight / weight[kept].sum(), log_ratios.exp(), scale))
    belief = wiener_smoother(
        value.expand(len(ratio), -1), time, process_noise=ratio[:, None], observation_noise=noise
    )
    means = belief.mean.permute(2, 1, 0)  # (line or slope, time, smoothness)
    spread = scale * belief.variance.diagonal(dim1=-2, dim2=-1).permute(2, 1, 0)
    mean = means @ weight
    half = QUANTILE * ((spread + (means - mean[..., None]) ** 2) @ weight).sqrt()
    mean[0] += level
    units = torch.stack((size, size / unit))[:, None]
    line, slope = (mean * units).tolist()
    (low, slope_low), (high, slope_high) = (((mean + side * half) * units).tolist() for side in (-1, 1))
    return SmoothCurve((first + unit * time).tolist(), line, low, high, slope, slope_low, slope_high)
