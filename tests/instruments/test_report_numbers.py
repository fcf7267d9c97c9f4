"""The report's intervals against other libraries; its series and charts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalman_rl.instruments.report.charts.chart import ChartLine, lines_chart
from kalman_rl.instruments.report.picture import spread
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


@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_never_overlap(places: list[float]) -> None:
    result = spread(sorted(places), 14.0, 0.0, 300.0)
    assert all(after - before >= 14.0 - 1e-9 for before, after in pairwise(result))
    assert not result or min(result) >= 0.0


def test_a_hole_stays_a_hole_and_numbers_are_short() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 1 / 3), (4.0, 1e300)]
    chart = lines_chart(
        [ChartLine("<b>&", points, 11, band=[(0.0, -math.inf, 1.0)])], reference=(0.5, "start")
    )
    assert chart["lines"] == [
        {
            "name": "<b>&", "colour": 3, "points": [[0, 1, 2, 3, 4], [1, 2, None, 0.333333, 1e300]],
            "band": [[0], [None], [1]],
        }
    ]  # fmt: skip
    assert chart["reference"] == [0.5, "start"] and chart["limits"] == [None, None]
    assert lines_chart([])["lines"] == []
    alone = lines_chart([ChartLine("one", [(1.0, 2.0), (2.0, math.nan)])])["lines"][0]
    assert alone["dots"]  # a single value is no line


def test_series_tools() -> None:
    long = [(float(step), math.sin(step)) for step in range(10_000)]
    assert len(thin(long)) <= MAX_POINTS + 2 and max(thin(long))[0] >= 9_900
    assert smooth([(0, 1.0), (1, 3.0), (2, 5.0)], 3) == [(0, 3.0), (1, 3.0), (2, 3.0)]
    line, band = over_seeds([[(0, 1.0), (1, 2.0)], [(0, 3.0), (1, 6.0), (2, 9.0)]])
    assert line == [(0, 2.0), (1, 4.0)] and band == [(0, 1.0, 3.0), (1, 2.0, 6.0)]
    assert cycle_of([{"step": step, "ratio/noop": float(step % 8 == 1)} for step in range(1, 33)]) == 7
