"""The report's intervals against other libraries; its axes, series and charts."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalman_rl.instruments.report.charts.axis import log_axis, nice_ticks
from kalman_rl.instruments.report.charts.chart import ChartLine, lines_chart, spread
from kalman_rl.instruments.report.stats.intervals import newcombe, t_interval, t_quantile, wilson
from kalman_rl.instruments.report.stats.series import MAX_POINTS, cycle_of, over_seeds, smooth, thin


def test_intervals_agree_with_other_libraries() -> None:
    stats = pytest.importorskip("scipy.stats")
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for count in (1, 7, 64, 128, 1000):
        for right in {0, 1, count // 3, count - 1, count}:
            expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
            assert wilson(right / count, count) == pytest.approx(tuple(expected), abs=1e-12)
            pair = proportion.confint_proportions_2indep(
                right, count, 20, 50, method="newcomb", compare="diff"
            )
            assert newcombe(right / count, count, 0.4, 50) == pytest.approx(pair, abs=1e-9)
    for freedom in range(1, 60):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
    values = [0.31, 0.35, 0.34]
    expected = stats.t.interval(0.95, 2, loc=stats.tmean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    assert t_interval([0.3]) is None


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_nice_ticks_cover_the_range(low: float, width: float) -> None:
    high = low + width
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    if high - low > 1e-8 * max(abs(low), abs(high)):
        slack = 1e-6 * (high - low)
        assert ticks[0] <= low + slack and ticks[-1] >= high - slack


@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_never_overlap(places: list[float]) -> None:
    result = spread(sorted(places), 14.0, 0.0, 300.0)
    assert all(after - before >= 14.0 - 1e-9 for before, after in pairwise(result))
    assert not result or min(result) >= 0.0


def test_a_log_axis_has_a_row_for_zero() -> None:
    axis = log_axis([0.0, 1e-9, 1e-2], 200.0, 0.0)
    assert axis(0.0) == 200.0 > axis(1e-9) > axis(1e-2) >= 0.0
    assert ("0" in [label for _, label in axis.ticks]) and ("10⁻²" in [label for _, label in axis.ticks])


def test_a_hole_breaks_the_line_and_names_are_escaped() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 1.0), (4.0, 2.0)]
    svg = lines_chart([ChartLine("<b>&", points)])
    path = re.search(r'class="line s0" d="([^"]*)"', svg)
    assert path and path[1].count("M") == 2
    assert "<b>" not in svg and "&lt;b&gt;&amp;" in svg and "nan" not in svg
    assert lines_chart([]).startswith("<svg")


def test_series_tools() -> None:
    long = [(float(step), math.sin(step)) for step in range(10_000)]
    assert len(thin(long)) <= MAX_POINTS + 2 and max(thin(long))[0] >= 9_900
    assert smooth([(0, 1.0), (1, 3.0), (2, 5.0)], 3) == [(0, 3.0), (1, 3.0), (2, 3.0)]
    line, band = over_seeds([[(0, 1.0), (1, 2.0)], [(0, 3.0), (1, 6.0), (2, 9.0)]])
    assert line == [(0, 2.0), (1, 4.0)] and band == [(0, 1.0, 3.0), (1, 2.0, 6.0)]
    assert cycle_of([{"step": step, "ratio/noop": float(step % 8 == 1)} for step in range(1, 33)]) == 7
