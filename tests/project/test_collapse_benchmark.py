"""The benchmark of collapse warnings: the surprise rule against oracles and simulation, the benchmark on made runs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from statsmodels.tsa.statespace.structural import UnobservedComponents

pytest.importorskip("trl")

from benchmarks.collapse import __main__ as benchmark
from benchmarks.collapse import surprise as surprise_module
from benchmarks.collapse.k_of_n import Judge, Rule, false_alarm_rate
from benchmarks.collapse.metrics import WATCHED, Metric
from benchmarks.collapse.recorded import load, period_of
from benchmarks.collapse.surprise import Surprise, Watch, WatchOptions

from kalman_rl.errors import ConfigError, NumericError

PLAIN = Metric("plain", "x", "same", 0.0, rising="wait", falling="hurry")
ONE_SIDED = dataclasses.replace(PLAIN, falling="")


def seen(values: np.ndarray, watch: Watch) -> list[Surprise | None]:
    """The surprise about each value of one plain metric, None where there was none."""
    told = [watch.see(t + 1, {"x": float(value)}) for t, value in enumerate(values)]
    return [surprises[0] if surprises else None for surprises in told]


# ---------------------------------------------------------------- the filter


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_forecasts_are_those_of_statsmodels(
    ratio: float, holes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank of one ratio, no clipping: the diffuse local-level model with missing observations."""
    monkeypatch.setattr(surprise_module, "RATIOS", (ratio,))
    monkeypatch.setattr(surprise_module, "CLIP", math.inf)
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(size=120) * math.sqrt(ratio)) + rng.normal(size=120)
    values[rng.random(120) < holes] = np.nan
    values[0] = 0.5
    told = seen(values, Watch(metrics=(PLAIN,), options=WatchOptions(stiffest=10.0)))
    model = UnobservedComponents(values, "llevel", use_exact_diffuse=True)
    model.tolerance = 0.0  # no shortcut to the steady state
    fitted = model.filter([1.0, ratio])
    forecast, spread = fitted.forecasts[0], fitted.forecasts_error_cov[0, 0]
    count = 0
    past: list[float] = []
    for t, surprise in enumerate(told):
        if surprise is not None:
            count += 1
            assert surprise.expected == pytest.approx(forecast[t], abs=1e-9)
            weights = 0.98 ** np.arange(len(past))[::-1]
            scale = math.sqrt(
                np.sum(weights * np.square(past)) / np.sum(weights) / surprise_module.CLIPPED_SECOND_MOMENT
            )
            expected = (values[t] - forecast[t]) / math.sqrt(spread[t]) / scale
            assert surprise.z == pytest.approx(expected, rel=1e-9)
        if t > 0 and np.isfinite(values[t]):
            past.append((values[t] - forecast[t]) / math.sqrt(spread[t]))
    assert count == np.isfinite(values).sum() - 24


def test_clipped_second_moment() -> None:
    inside = integrate.quad(lambda z: z**2 * stats.norm.pdf(z), -surprise_module.CLIP, surprise_module.CLIP)[
        0
    ]
    value = inside + surprise_module.CLIP**2 * 2 * stats.norm.sf(surprise_module.CLIP)
    assert value == pytest.approx(surprise_module.CLIPPED_SECOND_MOMENT, abs=1e-12)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1])
def test_innovations_are_standard_when_the_model_holds(ratio: float) -> None:
    rng = np.random.default_rng(1)
    many = tuple(dataclasses.replace(PLAIN, name=f"m{i}", key=f"m{i}") for i in range(40))
    noise = rng.normal(size=(400, 40)) + np.cumsum(math.sqrt(ratio) * rng.normal(size=(400, 40)), axis=0)
    watch = Watch(metrics=many, options=WatchOptions(stiffest=0.1))
    z = [
        [surprise.z for surprise in watch.see(t + 1, {f"m{i}": 7 * noise[t, i] for i in range(40)})]
        for t in range(400)
    ]
    values = np.array(z[24:])
    assert values.shape == (376, 40)
    assert np.std(values) == pytest.approx(1.0, abs=0.06)
    outside = np.mean(np.abs(values) > 2.0)  # a little more than normal: the noise is estimated from the past
    assert 0.8 * 2 * stats.norm.sf(2) < outside < 1.35 * 2 * stats.norm.sf(2)


def test_a_cycle_is_no_surprise() -> None:
    """Log-ratios grow from update to update and start again at every sampling."""
    rng = np.random.default_rng(2)
    values = 3.0 * (np.arange(400) % 8) + rng.normal(size=400)
    blind, knows = Watch(metrics=(PLAIN,)), Watch(8, metrics=(PLAIN,))
    z = np.array([s.z for s in seen(values, knows) if s][80:])
    assert np.std(z) == pytest.approx(1.0, abs=0.15) and np.abs(z).max() < 4.5
    missed = np.array([s.expected - v for s, v in zip(seen(values, blind), values) if s])
    assert np.std(missed) > 4.0  # what it looks like without the profile


def test_a_long_period_has_no_profile() -> None:
    watch = Watch(1000, metrics=(PLAIN,))
    assert watch.phases == 1
    assert any(seen(np.random.default_rng(0).normal(size=40), watch))


MISSING = st.sampled_from([None, math.nan, math.inf, -math.inf, "text", [], 1e300])


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.booleans(), MISSING), min_size=40, max_size=40), st.integers(0, 2**32 - 1))
def test_whatever_is_no_number_is_missing(holes: list[tuple[bool, Any]], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=40)
    other = dataclasses.replace(PLAIN, name="other", key="y")
    given_, absent = Watch(metrics=(PLAIN, other)), Watch(metrics=(PLAIN, other))
    for t, ((hole, junk), value) in enumerate(zip(holes, values)):
        row = {"y": float(value)}
        told = given_.see(t + 1, row | {"x": junk if hole else float(value)})
        assert told == absent.see(t + 1, row if hole else row | {"x": float(value)})
        assert all(math.isfinite(surprise.z) for surprise in told)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 79), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_saved_state_goes_on_bit_for_bit(cut: int, period: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=80).cumsum()
    rule = Rule(band=0.5, k=2, n=3, rest=2)
    whole, judge = Watch(period, metrics=(PLAIN,)), Judge(rule)
    other, second = Watch(period, metrics=(PLAIN,)), Judge(rule)
    for t, value in enumerate(values):
        if t == cut:
            saved = json.loads(json.dumps([whole.state_dict(), judge.state_dict()], allow_nan=False))
            assert other.load_state_dict(saved[0])
            second.load_state_dict(saved[1])
        told = whole.see(t + 1, {"x": value})
        alarms = judge.judge(t + 1, told)
        if t >= cut:
            again = other.see(t + 1, {"x": value})
            assert again == told and second.judge(t + 1, again) == alarms


def test_a_state_of_something_else_is_refused() -> None:
    state = Watch(4, metrics=(PLAIN,)).state_dict()
    assert not Watch(8, metrics=(PLAIN,)).load_state_dict(state)
    assert not Watch(4).load_state_dict(state)
    assert not Watch(4, metrics=(PLAIN,), options=WatchOptions(stiffest=1.0)).load_state_dict(state)


@given(st.floats(1e-9, 1e9), st.floats(0, 1))
def test_transforms_come_back(positive: float, share: float) -> None:
    log, logit = (Metric("m", "x", kind, 0.1) for kind in ("log", "logit"))
    assert log.back(log.read({"x": positive})) == pytest.approx(positive)  # type: ignore[arg-type]
    assert logit.back(logit.read({"x": share})) == pytest.approx(share, abs=1e-9)  # type: ignore[arg-type]
    kept = dataclasses.replace(logit, complement=True)
    assert kept.back(kept.read({"x": share})) == pytest.approx(1 - share, abs=1e-9)  # type: ignore[arg-type]
    assert log.read({"x": 0.0}) is None and log.read({"x": -positive}) is None


def test_an_update_without_log_ratios_is_missing() -> None:
    for metric in WATCHED:
        assert (metric.read({metric.key: 0.5, "ratio/noop": 1.0}) is None) == metric.of_ratio


def test_a_constant_metric_can_still_move() -> None:
    metric = dataclasses.replace(PLAIN, least=0.5)
    told = seen(np.r_[np.ones(40), 1.1, 3.0], Watch(metrics=(metric,)))
    assert all(abs(s.z) < 1e-9 for s in told[24:40] if s)
    assert told[40] is not None and 0 < told[40].z < 1 and told[41] is not None and told[41].z > 2


# ---------------------------------------------------------------- the rule


@given(st.floats(0.01, 0.99), st.integers(0, 50))
def test_rate_in_closed_form(tail: float, rest: int) -> None:
    assert false_alarm_rate(tail, 1, 1, rest) == pytest.approx(1 / (1 / tail + rest))
    run = (1 - tail**3) / ((1 - tail) * tail**3)  # mean time to three in a row
    assert false_alarm_rate(tail, 3, 3, rest) == pytest.approx(1 / (run + rest))


@pytest.mark.parametrize(
    ("tail", "k", "n", "rest"), [(0.2, 3, 6, 0), (0.1, 2, 8, 5), (0.3, 4, 5, 1), (0.05, 2, 16, 16)]
)
def test_rate_in_simulation(tail: float, k: int, n: int, rest: int) -> None:
    """Brute force: the judge itself on independent signs."""
    rng = np.random.default_rng(3)
    judge = Judge(Rule(band=1.0, k=k, n=n, rest=rest))
    outside = rng.random(30_000) < tail
    count = sum(
        bool(judge.judge(t, [Surprise(ONE_SIDED, 0.0, 0.0, 2.0 if out else 0.0)]))
        for t, out in enumerate(outside)
    )
    expected = 30_000 * false_alarm_rate(tail, k, n, rest)
    assert abs(count - expected) < 4 * math.sqrt(expected)


def test_false_alarms_of_filter_and_rule_on_white_noise() -> None:
    """The whole chain at a rule that fires often enough to count; learned noise costs a little above the theory."""
    rule = Rule(band=1.5, k=3, n=6, rest=6)
    many = tuple(dataclasses.replace(ONE_SIDED, name=f"m{i}", key=f"m{i}") for i in range(60))
    rng = np.random.default_rng(4)
    watch, judge, count = Watch(metrics=many), Judge(rule), 0
    for t in range(424):
        row = {metric.key: float(value) for metric, value in zip(many, rng.normal(size=60))}
        count += len(judge.judge(t + 1, watch.see(t + 1, row)))
    expected = 60 * 400 * rule.false_alarms() / 1000
    assert expected > 50
    assert abs(count - expected) < 4 * math.sqrt(expected) + 0.3 * expected


@pytest.mark.parametrize("side", [-1, 1])
def test_a_lasting_shift_is_found_on_its_side_only(side: int) -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=120) + np.r_[np.zeros(80), np.full(40, 7.0 * side)]
    for metric in (PLAIN, ONE_SIDED):
        watch, judge = Watch(metrics=(metric,)), Judge()
        alarms = [a for t, v in enumerate(values) for a in judge.judge(t + 1, watch.see(t + 1, {"x": v}))]
        expected = ["rising" if side > 0 else "falling"] if side in metric.harmful else []
        assert [alarm.direction for alarm in alarms[:1]] == expected
        if alarms:
            assert 80 < alarms[0].step <= 80 + judge.rule.n and alarms[0].advice == metric.advice(side)


def test_bad_settings() -> None:
    for bad in ({"band": 0.0}, {"band": math.nan}):
        with pytest.raises(NumericError, match="band: got"):
            Rule(**bad)
    for bad in ({"k": 0}, {"k": 5, "n": 4}, {"n": 17}, {"rest": -1}):
        with pytest.raises(ConfigError, match="got"):
            Rule(**bad)  # type: ignore[arg-type]
    with pytest.raises(NumericError, match="memory: got"):
        WatchOptions(memory=1.0)
    with pytest.raises(NumericError, match="stiffest: got"):
        WatchOptions(stiffest=0.0)
    with pytest.raises(ConfigError, match="warm_up: got"):
        WatchOptions(warm_up=1)
    with pytest.raises(ConfigError, match="period: got"):
        Watch(0)
    with pytest.raises(NumericError, match="tail: got"):
        false_alarm_rate(1.0, 1, 1)
    assert false_alarm_rate(0.0, 1, 1) == 0.0


def test_every_harmful_direction_has_advice() -> None:
    assert len({metric.name for metric in WATCHED}) == len(WATCHED)
    for metric in WATCHED:
        assert metric.harmful and all(metric.advice(side) for side in metric.harmful)


@pytest.mark.parametrize(
    "k, n, rest", [(5, 3, 0), (0, 3, 0), (1, 0, 0), (20, 40, 0), (1.5, 3, 0), (2, 3, -100)]
)
def test_counts_of_the_rule(k: Any, n: int, rest: int) -> None:
    """k of n = 20 of 40 would be a linear system with 10^11 unknowns."""
    for call in (lambda: false_alarm_rate(0.1, k, n, rest), lambda: Rule(k=k, n=n, rest=rest)):
        with pytest.raises(ConfigError, match=r"^(k, n|rest): got .*, expected"):
            call()


def test_settings_of_the_rule() -> None:
    with pytest.raises(NumericError, match="^band: got '4'"):
        Rule(band="4")
    with pytest.raises(ConfigError, match="^rest: got nan"):
        Rule(rest=math.nan)
    with pytest.raises(ConfigError, match="^warm_up: got nan"):
        WatchOptions(warm_up=math.nan)
    with pytest.raises(ConfigError, match="^period: got 2.5"):
        Watch(2.5)


# ---------------------------------------------------------------- the benchmark on made runs


def recorded(folder: Path, columns: dict[str, np.ndarray], settings: str = "") -> Path:
    """A finished run with these columns, a torn last line included; 256 completions whose exact share is the reward."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": 1, "status": "finished"}')
    (folder / "config.toml").write_text(settings or "updates_per_generation = 8\n")
    (folder / "exact.json").write_text("[]")
    rows = [
        {"kind": "train", "step": t + 1, "time": t, "loss": 0}
        | {name: value for name, value in zip(columns, values) if math.isfinite(value)}
        for t, values in enumerate(zip(*columns.values()))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    return folder


def test_surprises_of_a_recorded_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    level = np.r_[np.full(80, 0.5), np.full(40, 0.3)] * np.exp(0.03 * rng.normal(size=120))
    reward = np.where(np.arange(120) % 6 == 0, 0.5, math.nan)
    recorded(
        tmp_path / "grpo-s3",
        {"entropy": level, "reward": reward},
        "updates_per_generation = 2\niterations = 3\n",
    )
    (run,) = load(tmp_path)
    assert period_of(tmp_path / "grpo-s3") == run.period == 6 and period_of(tmp_path) == 1
    watch, judge = Watch(run.period), Judge()
    found = [e for row in run.rows for e in judge.judge(row["step"], watch.see(row["step"], row))]
    assert (found[0].metric, found[0].direction) == ("entropy", "falling") and 80 < found[0].step <= 90
    assert "clip-high" in found[0].advice
    assert benchmark.filtered(run, WatchOptions(), Rule()) == [(e.step, e.metric) for e in found]
    assert benchmark.filtered(run, WatchOptions(), Rule(band=50.0)) == []


def test_the_benchmark_judges_made_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two settings, seeds to choose on and seeds to report on: one holds, the reward of the other falls at step 97."""
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["collapse", "--root", str(tmp_path / "runs")])
    assert benchmark.main() == 1 and "no runs yet" in capsys.readouterr().out
    for seed in (0, 2):
        rng = np.random.default_rng(seed)
        sampled = np.arange(192) % 8 == 0
        for name, late in (("grpo", 0.5), ("no_ratio_ramp", 0.02)):
            reward = np.r_[np.full(96, 0.5), np.full(96, late)] + 0.01 * rng.normal(size=192)
            columns = {
                "reward": np.where(sampled, reward, math.nan),
                "entropy": np.exp(0.03 * rng.normal(size=192)),
            }
            recorded(tmp_path / "runs" / f"{name}-s{seed}", columns)
    assert benchmark.main() == 0
    whole = json.loads((tmp_path / "results" / "alarm.json").read_text())
    groups = {name: (run["group"], run["collapse"]) for name, run in whole["runs"].items()}
    assert groups == {
        **{"grpo-s0": ("held", None), "grpo-s2": ("held", None)},
        **{"no_ratio_ramp-s0": ("collapsed", 97), "no_ratio_ramp-s2": ("collapsed", 97)},
    }
    told = whole["detectors"]["fallen reward"]["reported"]
    assert (told["held_runs"], told["collapsed_runs"], told["false_alarms"], told["warned"]) == (1, 1, 0, 0)
    (late,) = told["late"]
    assert 8 <= late <= 48 and late % 8 == 0
    assert (tmp_path / "results" / "alarm.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
    assert (tmp_path / "results" / "alarm.png").stat().st_size > 10_000


def test_the_recorded_results_are_readable() -> None:
    """The report of the stored results is the stored text: the numbers of the documents can be traced to them."""
    from benchmarks.collapse.report import table

    stored = Path(benchmark.__file__).parents[1] / "results" / "collapse"
    whole = json.loads((stored / "alarm.json").read_text())
    assert "\n".join(table(whole["detectors"])) in (stored / "alarm.md").read_text()
    told = {name: entry["reported"] for name, entry in whole["detectors"].items()}
    assert (told["filter"]["warned"], told["filter"]["collapsed_runs"]) == (0, 10)
