"""What a chart shows, as data: the page carries it as JSON, and its script draws it with uPlot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kalman_rl.engine.runs.beliefs import Visit
from kalman_rl.instruments.report.stats.intervals import Interval
from kalman_rl.instruments.report.stats.series import Band, Point, thin
from kalman_rl.palette import LIGHT

COLOURS = len(LIGHT)
DIGITS = 6
MAX_VISITS = 80
Spec = dict[str, Any]


@dataclass(frozen=True)
class ChartLine:
    """One line: points in data units (NaN breaks it), an optional band or whiskers, and others behind it.

    ``behind`` are raw values under a moving mean, or the single seeds under their mean.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    band: Sequence[Band] = ()
    whiskers: Sequence[Band] = ()
    behind: Sequence[Sequence[Point]] = ()
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Dots:
    """One row of a dot chart: the mean, its interval, and the single values behind it."""

    name: str
    mean: float
    interval: Interval | None = None
    values: Sequence[float] = ()
    colour: int = 0


def lines_chart(
    lines: Sequence[ChartLine],
    *,
    height: int = 210,
    y_label: str = "",
    x_label: str = "step",
    log: bool = False,
    limits: Sequence[float] = (),
    include: Sequence[float] = (),
    reference: tuple[float, str] | None = None,
) -> Spec:
    """Lines over steps. The axes fit the data.

    Args:
        limits: the smallest and, if there is one, the largest value that can be; the axis does not go beyond.
        include: values that the y axis shows in any case, such as those of charts beside it.
        reference: a horizontal line and its name.
    """
    return {
        "kind": "lines", "height": height, "x": x_label, "y": y_label, "log": log,
        "limits": [limits[0] if limits else None, limits[1] if len(limits) > 1 else None],
        "include": _numbers(include), "reference": reference and [_number(reference[0]), reference[1]],
        "lines": [_line(line) for line in lines],
    }  # fmt: skip


def dots_chart(
    rows: Sequence[Dots],
    *,
    unit: str = "",
    include: Sequence[float] = (),
    reference: tuple[float, str] | None = None,
) -> Spec:
    """One row per name: single values as rings, the mean as a solid dot on its interval."""
    return {
        "kind": "dots", "height": 54 + 26 * len(rows), "x": unit, "limits": [None, None],
        "include": _numbers(include), "reference": reference and [_number(reference[0]), reference[1]],
        "rows": [
            {"name": row.name, "colour": row.colour % COLOURS, "mean": _number(row.mean),
             "interval": _numbers(row.interval or ()), "values": _numbers(row.values if len(row.values) > 1 else ())}
            for row in rows
        ],
    }  # fmt: skip


def belief_chart(visits: Sequence[Visit], steps: tuple[float, float], limits: tuple[float, float]) -> Spec:
    """A prompt's belief over a run, the height of a table row: posterior mean, its 90 % band, means of batches.

    Args: steps, limits: the ends of the axes.
    """
    shown = list(visits[:: max(1, math.ceil(len(visits) / MAX_VISITS))])
    if shown[-1] is not visits[-1]:
        shown.append(visits[-1])
    bands = [(visit.step, *visit.interval) for visit in shown]
    return {
        "kind": "belief", "height": 48, "x": "step", "steps": list(steps), "limits": _numbers(limits),
        "lines": [_line(ChartLine("belief", [(visit.step, visit.after) for visit in shown], 0, band=bands))],
        "seen": [_numbers([visit.reward for visit in shown]), _numbers([visit.n for visit in shown])],
    }  # fmt: skip


def _line(line: ChartLine) -> Spec:
    points = thin(line.points)
    made: Spec = {"name": line.name, "colour": line.colour % COLOURS, "points": _columns(points)}
    for name, value in (("band", line.band), ("whiskers", line.whiskers)):
        if value:
            made[name] = _columns(value)
    if line.behind:
        made["behind"] = [_columns(thin(points)) for points in line.behind]
    if line.dashed:
        made["dashed"] = True
    if line.dots or sum(math.isfinite(value) for _, value in points) == 1:
        made["dots"] = True
    return made


def _columns(rows: Sequence[Sequence[float]]) -> list[list[float | None]]:
    return [_numbers(column) for column in zip(*rows)]


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    """A short number for JSON, whole if it is; None for what is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(value) if value == int(value) and abs(value) < 2**53 else short
