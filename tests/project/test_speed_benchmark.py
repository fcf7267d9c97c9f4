"""The benchmark of speed runs, and its ratios mean what they say. Nothing here judges a time."""

from __future__ import annotations

import time

import pytest
from benchmarks.speed import interleaved
from benchmarks.speed.interleaved import Promise, judge, missed, ratios, table


def work(steps: int):
    def call() -> None:
        total = 0
        for i in range(steps):
            total += i

    return call


def test_ratio_of_a_call_to_itself_and_to_three_times_as_much() -> None:
    calls = {"one": work(3000), "same": work(3000), "three": work(9000)}
    times = interleaved.sample(calls, rounds=9, least=0.004)
    assert 0.6 < ratios(times, "one", "same")[0] < 1.7
    low, high = 1.8, 5.0
    assert low < ratios(times, "three", "one")[0] < high
    assert all(len(t) == 9 for t in times.values())


def test_a_miss_needs_median_and_better_quartile() -> None:
    assert missed((2.0, 1.5, 3.0), 1.0, smaller=True) and not missed((2.0, 0.9, 3.0), 1.0, smaller=True)
    assert missed((2.0, 1.5, 3.0), 4.0, smaller=False) and not missed((2.0, 1.5, 5.0), 4.0, smaller=False)


@pytest.mark.parametrize(
    ("results", "attempts", "holds"), [("hh", 1, True), ("mhh", 3, True), ("mm", 2, False)]
)
def test_two_of_three_attempts(monkeypatch: pytest.MonkeyPatch, results, attempts, holds) -> None:
    outcome = iter([0.5 if kind == "h" else 2.0 for kind in results])
    monkeypatch.setattr(
        interleaved, "sample", lambda *_: (lambda t: {"a": [t] * 3, "b": [1.0] * 3})(next(outcome))
    )
    (row,) = judge("case", {}, [Promise("a", "b", 1.0)])
    assert (row.attempts, row.holds) == (attempts, holds) and row.ratio == (0.5 if holds else 2.0)
    assert ("yes" if holds else "**no**") in table([row])


def test_scaled_candidates() -> None:
    calls = {"a": lambda: time.sleep(0), "b": lambda: time.sleep(0)}
    (row,) = judge(
        "case", calls, [Promise("a", "b", smaller=False)], rounds=3, least=0.001, scale={"b": 1000.0}
    )
    assert row.ratio > 50 and row.holds is None


@pytest.mark.slow
def test_the_command_runs(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    from benchmarks.speed import cpu

    assert cpu.main(["--quick", "--only", "filters", "trackers", "--out", str(tmp_path)]) == 0
    assert "published KPO filter" in capsys.readouterr().out
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"cpu.json", "cpu.md", "cpu.png"}
