"""Where in a completion the gradient comes from: its share by token position, from the traces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import quantiles

from kalman_rl.engine.runs import traces
from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.engine.runs.traces import Table
from kalman_rl.instruments.replay import own_method
from kalman_rl.instruments.report.charts.chart import ChartLine, lines_chart
from kalman_rl.instruments.report.sections.tokens import MAX_ROWS, number_of, sequences, spread_out
from kalman_rl.instruments.report.stats.metrics import Figure
from kalman_rl.instruments.report.stats.pool import Group
from kalman_rl.instruments.report.words import counted
from kalman_rl.objectives import aggregate

COLUMNS = ("sequence", "coefficient", "advantage")
MAX_FILES = 12
MAX_BINS = 24
Sums = dict[int, list[float]]
"""Per token number: the gradient's size as trained, and with every token kept at coefficient 1."""


def position_figure(groups: Sequence[Group], palette: dict[str, int]) -> Figure | None:
    """Share of ``sum |w c A|`` by token number; dashed, the share if every token were kept at coefficient 1.

    ``w`` is the token's part in its method's mean: one over the completion's length for a mean per sequence.
    """
    lines: list[ChartLine] = []
    single = len(groups) == 1
    files = 0
    for group in groups:
        sums, read = _sums(group.first)
        if not sums:
            continue
        files = max(files, read)
        size = max(1, math.ceil(_usual_length(sums) / MAX_BINS))
        for index, (name, dashed) in enumerate((("as trained", False), ("all tokens kept", True))):
            total = sum(pair[index] for pair in sums.values())
            if total <= 0:
                continue
            shares: dict[int, float] = {}
            for place, pair in sums.items():
                shares[place // size] = shares.get(place // size, 0.0) + pair[index] / total
            last = max(shares)
            points = [
                (1 + size * (i + 0.5) - 0.5, shares.get(i, 0.0)) for i in range(min(last + 1, 2 * MAX_BINS))
            ]
            colour = index if single else palette.get(group.name, 0)
            label = name if single else group.name if index == 0 else f"{group.name}, {name}"
            lines.append(ChartLine(label, points, colour, dashed=dashed))
    if not lines:
        return None
    note = (
        "Part of the gradient's size (advantage times coefficient) by position. Dashed: if every token were kept "
        f"at coefficient 1. From traced completions of {counted(files, 'step')}."
    )
    chart = lines_chart(lines, y_label="share of the gradient", x_label="token", limits=(0.0, 1.0))
    return Figure("Gradient by position", note, chart)


def _sums(run: RunRecord) -> tuple[Sums, int]:
    files = traces.steps(run.path)
    sums: Sums = {}
    read = 0
    method, _ = own_method(run.path) if files else (None, [])
    per_sequence = method is None or method.aggregate is aggregate.sequence_mean
    for step in spread_out(list(files), MAX_FILES):
        table = traces.read(files[step], COLUMNS, [], optional=["position"], limit=MAX_ROWS)
        if table:
            read += 1
            _add(sums, table, per_sequence)
    return sums, read


def _add(sums: Sums, table: Table, per_sequence: bool) -> None:
    for rows in sequences(table).values():
        part = 1 / len(rows) if per_sequence else 1.0
        for place, row in enumerate(rows):
            coefficient, advantage = number_of(table["coefficient"][row]), number_of(table["advantage"][row])
            if math.isfinite(coefficient) and math.isfinite(advantage):
                pair = sums.setdefault(place, [0.0, 0.0])
                pair[0] += part * abs(coefficient * advantage)
                pair[1] += part * abs(advantage)


def _usual_length(sums: Sums) -> float:
    """The position before which nine tenths of the positions with any gradient lie."""
    places = sorted(sums)
    return quantiles(places, n=10)[-1] + 1 if len(places) > 1 else 1.0
