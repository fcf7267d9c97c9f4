"""Charts as inline SVG: lines with bands, and dots with intervals. Colours and fonts come from the page.

A chart is drawn at the width it is shown at, so its text keeps its size; a page that needs two widths
draws it twice. Every text goes through markupsafe, so labels may be hostile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from kalman_rl.instruments.report.charts.axis import Axis, linear_axis, log_axis, step_axis
from kalman_rl.instruments.report.stats.intervals import Interval
from kalman_rl.instruments.report.stats.series import Band, Point, thin

COLOURS = 8
MAX_NAME = 18
LABEL_GAP = 14.0
LETTER = 6.3
"""Width of an average letter in px at the page's 12 px chart font."""


@dataclass(frozen=True)
class ChartLine:
    """One line: points in data units (NaN breaks it), an optional band or whiskers, raw points behind it."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    band: Sequence[Band] = ()
    whiskers: Sequence[Band] = ()
    behind: Sequence[Point] = ()
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
    width: int = 344,
    height: int = 230,
    y_label: str = "",
    x_label: str = "step",
    log: bool = False,
    y_range: Sequence[float] = (),
    reference: tuple[float, str] | None = None,
    labels: bool = True,
    names: int = MAX_NAME,
) -> Markup:
    """Lines over steps with direct labels at their ends.

    Args:
        y_range: values that the y axis must include.
        reference: a horizontal line and its name.
        labels: write names at the line ends, if there is room for all of them.
        names: letters of a name that are shown.
    """
    drawn = [replace(line, points=thin(line.points), behind=thin(line.behind)) for line in lines]
    every = [point for line in drawn for point in (*line.points, *line.behind)]
    values = [value for _, value in every]
    values += [edge for line in drawn for _, *edges in (*line.band, *line.whiskers) for edge in edges]
    values += [*y_range, *([reference[0]] if reference else [])]
    top, bottom = 30.0, height - 38.0
    y = log_axis(values, bottom, top) if log else linear_axis(values, bottom, top)
    left = 12 + LETTER * max((len(label) for _, label in y.ticks), default=1)
    named = [line.name for line in drawn if line.points]
    named = named if labels and len(named) * LABEL_GAP < bottom - top + LABEL_GAP else []
    room = min(max((len(name) for name in named), default=0), names) * LETTER
    right = width - (1.1 * room + 20 if named else 10)
    x = step_axis([step for step, _ in every], left, right, max(3, int((right - left) // 48)))
    parts = [_frame(x, y, left, right, bottom, y_label, x_label)]
    if reference:
        parts.append(_level("reference", y(reference[0]), left, right))
    parts += [_line(line, x, y, x_label) for line in drawn]
    if reference:
        parts.append(_text(right - 4, y(reference[0]) - 4, "tick end halo", reference[1]))
    if named:
        parts.append(_end_labels(drawn, x, y, top - 8, bottom + 4, names))
    return _svg(width, height, f"{y_label}: {', '.join(line.name for line in drawn)}", parts)


def _frame(x: Axis, y: Axis, left: float, right: float, bottom: float, y_label: str, x_label: str) -> Markup:
    parts = [_text(0, 12, "unit", y_label), _text((left + right) / 2, bottom + 34, "unit mid", x_label)]
    for value, label in y.ticks:
        kind = "axis" if abs(y(value) - bottom) < 0.5 else "grid"
        parts += [_level(kind, y(value), left, right), _text(left - 6, y(value) + 4, "tick end", label)]
    if y.zero is None:
        parts.append(_level("axis", bottom, left, right))
    for value, label in x.ticks:
        parts += [
            _upright("axis", x(value), bottom, bottom + 4),
            _text(x(value), bottom + 17, "tick mid", label),
        ]
    return Markup("").join(parts)


def _line(line: ChartLine, x: Axis, y: Axis, x_label: str) -> Markup:
    colour = line.colour % COLOURS
    parts = []
    if line.band:
        there = [f"{x(step):.1f} {y(high):.1f}" for step, _, high in line.band]
        back = [f"{x(step):.1f} {y(low):.1f}" for step, low, _ in reversed(line.band)]
        parts.append(_stroke(f"band f{colour}", f"M{'L'.join(there + back)}Z"))
    if line.behind:
        parts.append(_stroke(f"behind s{colour}", _path(line.behind, x, y)))
    for step, low, high in line.whiskers:
        parts.append(_upright(f"whisker s{colour}", x(step), y(low), y(high)))
    kind = "line dashed" if line.dashed else "line"
    parts.append(_stroke(f"{kind} s{colour}", _path(line.points, x, y), line.name))
    known = [(step, value) for step, value in line.points if math.isfinite(value)]
    for step, value in known if line.dots or len(known) == 1 else ():
        name = f"{line.name}: {value:.4g} at {x_label} {step:g}"
        parts.append(_circle(f"dot f{colour}", x(step), y(value), 3.2, name))
    return Markup("<g>{}</g>").format(Markup("").join(parts))


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    pieces, pen = [], "M"
    for step, value in points:
        if math.isfinite(value):
            pieces.append(f"{pen}{x(step):.1f} {y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(pieces)


def _end_labels(lines: Sequence[ChartLine], x: Axis, y: Axis, top: float, bottom: float, most: int) -> Markup:
    """Names beside the line ends, pushed apart so that none covers another."""
    ends = []
    for line in lines:
        known = [(step, value) for step, value in line.points if math.isfinite(value)]
        if known:
            ends.append((y(known[-1][1]), x(known[-1][0]), line))
    ends.sort(key=lambda end: end[0])
    parts = []
    for place, (height, across, line) in zip(spread([end[0] for end in ends], LABEL_GAP, top, bottom), ends):
        leader = f"M{across + 2:.1f} {height:.1f}L{x.end + 9:.1f} {place:.1f}"
        parts.append(_stroke(f"leader s{line.colour % COLOURS}", leader))
        parts.append(_text(x.end + 12, place + 4, "name", _shortened(line.name, most)))
    return Markup("").join(parts)


def spread(places: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Sorted places moved as little as needed to be ``gap`` apart, kept inside ``[top, bottom]`` if they fit.

    >>> spread([10.0, 11.0, 50.0], 14.0, 0.0, 100.0)
    [3.5, 17.5, 50.0]
    """
    groups: list[list[float]] = []  # [sum of (place - offset), size]
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1:
            (sum_a, n_a), (sum_b, n_b) = groups[-2:]
            start_a, start_b = sum_a / n_a, sum_b / n_b
            if start_a + gap * n_a <= start_b:
                break
            groups[-2:] = [[sum_a + sum_b - gap * n_a * n_b, n_a + n_b]]
    result: list[float] = []
    for total, size in groups:
        start = min(max(total / size, top), max(top, bottom - gap * (size - 1)))
        result += [start + gap * index for index in range(int(size))]
    for index in range(1, len(result)):
        result[index] = max(result[index], result[index - 1] + gap)
    return result


def dots_chart(
    rows: Sequence[Dots],
    *,
    width: int = 344,
    unit: str = "",
    x_range: Sequence[float] = (),
    reference: tuple[float, str] | None = None,
) -> Markup:
    """One row per name: single values as rings, the mean as a solid dot on its interval."""
    top, gap = 34.0, 26.0
    bottom = top + gap * len(rows)
    left = 14 + LETTER * min(max((len(row.name) for row in rows), default=0), MAX_NAME)
    values = [*x_range, *([reference[0]] if reference else [])]
    values += [value for row in rows for value in (row.mean, *row.values, *(row.interval or ()))]
    x = linear_axis(values, left, width - 14.0, 4)
    parts = [_text(0, 12, "unit", unit)]
    for value, label in x.ticks:
        parts += [
            _upright("grid", x(value), top - 6, bottom),
            _text(x(value), bottom + 16, "tick mid", label),
        ]
    if reference:
        place, beyond = x(reference[0]), x(reference[0]) > (left + width) / 2
        parts.append(_upright("reference", place, top - 12, bottom))
        parts.append(
            _text(place + (-4 if beyond else 4), top - 10, "tick end" if beyond else "tick", reference[1])
        )
    parts += [_dots_row(row, x, left, top + gap * (index + 0.5)) for index, row in enumerate(rows)]
    return _svg(width, int(bottom + 26), f"{unit}: {', '.join(row.name for row in rows)}", parts)


def _dots_row(row: Dots, x: Axis, left: float, height: float) -> Markup:
    colour = row.colour % COLOURS
    parts = [_text(left - 10, height + 4, "name end", _shortened(row.name))]
    if row.interval:
        parts.append(_level(f"whisker s{colour}", height, x(row.interval[0]), x(row.interval[1])))
    if len(row.values) > 1:
        parts += [_circle(f"seed s{colour}", x(value), height, 3, f"{value:.3f}") for value in row.values]
    parts.append(_circle(f"dot f{colour}", x(row.mean), height, 4.6, f"{row.name}: {row.mean:.3f}"))
    return Markup("").join(parts)


def _shortened(name: str, most: int = MAX_NAME) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _text(x: float, y: float, kind: str, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)


def _stroke(kind: str, path: str, name: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(name) if name else ""
    return Markup('<path class="{}" d="{}">{}</path>').format(kind, path, title)


def _level(kind: str, y: float, start: float, end: float) -> Markup:
    return _stroke(kind, f"M{start:.1f} {y:.1f}H{end:.1f}")


def _upright(kind: str, x: float, start: float, end: float) -> Markup:
    return _stroke(kind, f"M{x:.1f} {start:.1f}V{end:.1f}")


def _circle(kind: str, x: float, y: float, radius: float, name: str) -> Markup:
    shape = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
    return shape.format(kind, x, y, radius, name)


def _svg(width: int, height: int, name: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, name, Markup("").join(parts)
    )
