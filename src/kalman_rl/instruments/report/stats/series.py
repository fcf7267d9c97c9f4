"""Series: numbers over steps, taken from rows, smoothed, thinned, and averaged over seeds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, median

from kalman_rl.engine.runs.reading import Row, RunRecord
from kalman_rl.instruments.report.stats.intervals import t_interval

Point = tuple[float, float]
Band = tuple[float, float, float]
MAX_POINTS = 400
LOG_MAX = math.log(sys.float_info.max)


def same(value: float) -> float:
    """The value itself: a metric that is drawn as it is."""
    return value


def complement(value: float) -> float:
    """One minus the value: the share that was not."""
    return 1 - value


def series(
    rows: Sequence[Row], key: str, change: Callable[[float], float] = same, *, skip_noop: bool = False
) -> list[Point]:
    """``(step, value)`` of every row that has the key; NaN stays NaN and breaks the line.

    ``skip_noop`` leaves out updates whose log-ratios are all zero: there every ratio is one by definition.
    """
    rows = [row for row in rows if not (skip_noop and row.get("ratio/noop") == 1)]
    return [(row["step"], change(row[key])) for row in rows if key in row]


def finite(points: Sequence[Point]) -> list[float]:
    """The finite values of points."""
    return [value for _, value in points if math.isfinite(value)]


def typical(runs: Sequence[RunRecord], key: str) -> float | None:
    """Median of a metric over all steps of all runs, without the updates that change nothing."""
    values = [value for run in runs for value in finite(series(run.train, key, skip_noop=True))]
    return median(values) if values else None


def ends(points: Sequence[Point]) -> tuple[float, float] | None:
    """Means of the first and the last tenth (at least one value each); None without values."""
    values = finite(points)
    size = max(1, len(values) // 10)
    return (fmean(values[:size]), fmean(values[-size:])) if values else None


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Moving mean over ``window`` neighbours, always a full window; holes are skipped and stay holes.

    Of a long series it keeps every second, fourth, eighth... point, so that seeds keep the same steps.
    """
    stride = 2 ** max(0, math.ceil(math.log2(max(1, len(points)) / MAX_POINTS)))
    result = []
    for index in sorted({*range(0, len(points), stride), *([len(points) - 1] if points else [])}):
        step, value = points[index]
        start = max(0, min(index - window // 2, len(points) - window))
        near = finite(points[start : start + window])
        result.append((step, fmean(near) if math.isfinite(value) else math.nan))
    return result


def window_of(length: int, cycle: int = 1) -> int:
    """Window of the moving mean: none for short series, about a fifteenth of long ones.

    It covers whole cycles, since a log-ratio grows from update to update until the next sampling.
    """
    return 1 if length < 30 else cycle * max(1, round(max(3, length // 15) / cycle))


def cycle_of(rows: Sequence[Row]) -> int:
    """Rows with any log-ratio per sampling: the usual distance between rows with an update without one."""
    still = [index for index, row in enumerate(rows) if row.get("ratio/noop", 0.0) > 0]
    gaps = [after - before for before, after in pairwise(still)]
    skipped = any(row.get("ratio/noop") == 1 for row in rows)
    return max(1, int(median(gaps)) - skipped) if gaps else 1


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about ``MAX_POINTS`` points: the lowest and the highest of each stretch of a long series."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MAX_POINTS)
    result: list[Point] = []
    for start in range(0, len(points), size):
        stretch = [point for point in points[start : start + size] if math.isfinite(point[1])]
        if stretch:
            by_value = [min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])]
            result += sorted(set(by_value))
        else:
            result.append((points[start][0], math.nan))
    return result


def over_seeds(many: Sequence[Sequence[Point]]) -> tuple[list[Point], list[Band]]:
    """Mean line and min-max band over several series, at every step where all of them have a value."""
    tables = [dict(points) for points in many if points]
    if not tables:
        return [], []
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    line, band = [], []
    for step in steps:
        values = [table[step] for table in tables]
        line.append((step, fmean(values)))
        if len(values) > 1 and all(map(math.isfinite, values)):
            band.append((step, min(values), max(values)))
    stride = max(1, len(line) // MAX_POINTS)
    return line[::stride], band[::stride]


def with_interval(many: Sequence[Sequence[Point]], *, log: bool = False) -> tuple[list[Point], list[Band]]:
    """Mean over seeds at every step that all have, with its 95 % interval by Student's t; two seeds: their range.

    With ``log`` mean and interval are those of the logarithms; a step with a value <= 0 then has none.
    """
    tables = [dict(points) for points in many if points]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    line, band = [], []
    for step in steps:
        values = [table[step] for table in tables]
        usable = all(map(math.isfinite, values)) and not (log and min(values) <= 0)
        scaled = [math.log(value) for value in values] if log and usable else values
        middle = fmean(scaled)
        line.append((step, math.exp(min(middle, LOG_MAX)) if log and usable else middle))
        interval = t_interval(scaled) if len(values) > 2 else (min(scaled), max(scaled))
        if usable and interval and len(values) > 1:
            low, high = (math.exp(min(end, LOG_MAX)) for end in interval) if log else interval
            band.append((step, low, high))
    stride = max(1, len(line) // MAX_POINTS)
    return line[::stride], band[::stride]
