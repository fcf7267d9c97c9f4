"""The collapse warning: filter and rule against oracles and simulation, the journal, the callback in real runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from statsmodels.tsa.statespace.structural import UnobservedComponents

from kalman_rl.engine.collapse import (
    WATCHED,
    Fall,
    Judge,
    Metric,
    Rule,
    Surprise,
    Watch,
    WatchOptions,
    false_alarm_rate,
)
from kalman_rl.engine.collapse import watch as watch_module
from kalman_rl.engine.collapse.journal import FILE, append_alarm, keep_alarms, read_alarms
from kalman_rl.engine.collapse.offline import alarms_of, period_of, runs_below, show_alarms
from kalman_rl.engine.collapse.rule import Alarm, Token
from kalman_rl.errors import ConfigError, NumericError, RunError

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
    monkeypatch.setattr(watch_module, "RATIOS", (ratio,))
    monkeypatch.setattr(watch_module, "CLIP", math.inf)
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
                np.sum(weights * np.square(past)) / np.sum(weights) / watch_module.CLIPPED_SECOND_MOMENT
            )
            expected = (values[t] - forecast[t]) / math.sqrt(spread[t]) / scale
            assert surprise.z == pytest.approx(expected, rel=1e-9)
        if t > 0 and np.isfinite(values[t]):
            past.append((values[t] - forecast[t]) / math.sqrt(spread[t]))
    assert count == np.isfinite(values).sum() - 24


def test_clipped_second_moment() -> None:
    inside = integrate.quad(lambda z: z**2 * stats.norm.pdf(z), -watch_module.CLIP, watch_module.CLIP)[0]
    value = inside + watch_module.CLIP**2 * 2 * stats.norm.sf(watch_module.CLIP)
    assert value == pytest.approx(watch_module.CLIPPED_SECOND_MOMENT, abs=1e-12)


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


FALLEN = [*np.linspace(0.2, 0.5, 30), *[0.02] * 12, *[0.5] * 20, *[0.01] * 12]


def falls(rewards: Any, fall: Fall) -> list[int]:
    return [alarm.step for t, r in enumerate(rewards) for alarm in fall.see(t + 1, {"reward": r})]


def test_a_fallen_reward_is_told_once_until_it_is_back() -> None:
    noise = 0.02 * np.random.default_rng(7).normal(size=len(FALLEN))
    first, second = falls(FALLEN + noise, Fall())
    assert 30 < first <= 36 and 62 < second <= 68
    for never in (-np.array(FALLEN), np.zeros(80), 0.5 + 0.1 * np.random.default_rng(8).normal(size=400)):
        assert falls(never, Fall()) == []


def test_a_missing_reward_changes_nothing() -> None:
    fall, other = Fall(), Fall()
    assert falls([r for reward in FALLEN for r in (reward, math.nan)], fall) != []
    falls(FALLEN, other)
    assert fall.state_dict() == other.state_dict() != Fall().state_dict()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 73))
def test_a_saved_fall_goes_on(cut: int) -> None:
    whole, cut_short, other = Fall(), Fall(), Fall()
    falls(FALLEN[:cut], cut_short)
    other.load_state_dict(json.loads(json.dumps(cut_short.state_dict(), allow_nan=False)))
    assert [step for step in falls(FALLEN, whole) if step > cut] == [
        step + cut for step in falls(FALLEN[cut:], other)
    ]
    assert other.state_dict() == whole.state_dict()


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


# ---------------------------------------------------------------- on disk and offline


def an_alarm(step: int = 7, text: str = "9") -> Alarm:
    return Alarm(
        step, "entropy", "entropy", "falling", 0.1, 0.2, -3.0, 4, 8, "this", (Token(text, -1.5, "p", 3),)
    )


def test_alarms_come_back_and_a_resumed_run_drops_later_ones(tmp_path: Path) -> None:
    assert read_alarms(tmp_path) == []
    for step in (3, 7, 9):
        append_alarm(tmp_path, an_alarm(step, "\x1b[31m\u202e</script>"), "warn")
    assert [alarm.step for alarm in read_alarms(tmp_path)] == [3, 7, 9]
    assert read_alarms(tmp_path)[1] == an_alarm(7, "\x1b[31m\u202e</script>")
    assert an_alarm(text="\x1b[31m\u202e").sentence().isprintable()
    keep_alarms(tmp_path, 7)
    assert [alarm.step for alarm in read_alarms(tmp_path)] == [3, 7]
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"step": 8, "metr\xff\nnull\n[]\n{}\n')
    assert [alarm.step for alarm in read_alarms(tmp_path)] == [3, 7]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError):
        append_alarm(tmp_path, an_alarm(), "warn")
    assert read_alarms(tmp_path) == [] and (tmp_path / "elsewhere").read_text() == ""


def recorded(folder: Path, entropy: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format": 1}')
    (folder / "config.toml").write_text("updates_per_generation = 2\niterations = 3\n")
    rows = [
        {"kind": "train", "step": t + 1, "time": t, "loss": 0, "entropy": value}
        for t, value in enumerate(entropy)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    return folder


def test_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(6)
    level = np.r_[np.full(80, 0.5), np.full(40, 0.3)]
    run = recorded(tmp_path / "run", level * np.exp(0.03 * rng.normal(size=120)))
    from kalman_rl.cli.main import main

    assert period_of(run) == 6
    first = alarms_of(run)[0]
    assert (first.metric, first.direction) == ("entropy", "falling") and 80 < first.step <= 90
    assert main(["alarm", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"step {first.step}: entropy falling" in text and "clip-high" in text and "per 1000" in text
    assert main(["alarm", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["alarms"][0]["step"] == first.step
    assert main(["alarm", str(run), "--band", "50"]) == 0
    assert "no alarms" in capsys.readouterr().out
    assert main(["alarm", str(tmp_path / "nothing")]) == 1
    assert main(["alarm"]) == 2
    assert show_alarms(runs_below([tmp_path]), Rule(), WatchOptions(), True) == 0


def test_tokens_come_from_the_traces(tmp_path: Path) -> None:
    import pyarrow.parquet

    from kalman_rl.engine.collapse.offline import traced_tokens
    from tests.instruments.report_runs import write_run, write_trace

    run = write_run(tmp_path / "run", {"method": "kpo"})
    assert traced_tokens(run, 5) == ()
    write_trace(run, list("4201"), step=12)
    step = int(next((run / "traces").iterdir()).stem.rpartition("-")[2])
    tokens = traced_tokens(run, step)
    sizes = [abs(token.log_ratio) for token in tokens]
    assert len(tokens) == 3 and sizes == sorted(sizes, reverse=True)
    path = next((run / "traces").iterdir())
    table = pyarrow.parquet.read_table(path)
    for name, value in (("log_ratio", "large"), ("position", None)):
        column = pyarrow.array([value] * len(table))
        wrong = table.set_column(table.schema.get_field_index(name), name, column)
        pyarrow.parquet.write_table(wrong, path)
        assert traced_tokens(run, step) == ()
    path.write_bytes(b"PAR1 no parquet")
    assert traced_tokens(run, step) == ()


# ---------------------------------------------------------------- the callback

pytest.importorskip("trl")
from transformers import TrainerControl, TrainerState  # noqa: E402

from kalman_rl.engine.collapse.callback import CollapseAlarm  # noqa: E402

EAGER = {"rule": Rule(band=1.0, k=2, n=2, rest=2), "options": WatchOptions(warm_up=4)}


def hosted(
    alarm: CollapseAlarm, values: list[float], folder: Path, cycle: int = 4, start: int = 0
) -> list[str]:
    """Feed a callback as a trainer would; what it asked for after each step."""
    args = SimpleNamespace(output_dir=str(folder), steps_per_generation=cycle)
    state, control, asked = TrainerState(stateful_callbacks=[alarm]), TrainerControl(), []
    state.global_step = start
    alarm.on_train_begin(args, state, control)  # type: ignore[arg-type]
    for value in values:
        state.global_step += 1
        control.should_save = False
        alarm.on_step_end(args, state, control)  # type: ignore[arg-type]
        alarm.on_log(args, state, control, logs={"loss": 0.0, "entropy": value})  # type: ignore[arg-type]
        asked.append(f"{'save ' * control.should_save}{'stop' * control.should_training_stop}".strip())
        if control.should_training_stop:
            break
    return asked


FALL = [0.5, 0.51, 0.49, 0.5, 0.5, 0.51, 0.49, 0.5, 0.5, 0.3, 0.29, 0.28, 0.2, 0.2, 0.2, 0.2]


def test_actions_wait_for_the_end_of_the_generation_batch(tmp_path: Path) -> None:
    said: list[str] = []
    asked = {}
    for action in ("warn", "checkpoint", "stop"):
        alarm = CollapseAlarm(action, tmp_path / action, say=said.append, **EAGER)  # type: ignore[arg-type]
        asked[action] = hosted(alarm, FALL, tmp_path)
        first = read_alarms(tmp_path / action)[0]
        assert first.metric == "entropy" and 10 <= first.step <= 12 and first == alarm.alarms[0]
        assert alarm.stopped == (action == "stop")
    assert not any(asked["warn"])
    assert asked["checkpoint"][:12] == [""] * 11 + ["save"]
    assert asked["stop"] == [""] * 11 + ["save stop"]
    assert said and said[0].startswith("alarm: step")


def test_nothing_in_the_alarm_stops_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")

    def broken(text: str) -> None:
        raise OSError("no terminal")

    for alarm in (
        CollapseAlarm("stop", tmp_path / "file", **EAGER),  # type: ignore[arg-type]
        CollapseAlarm("warn", tmp_path, say=broken, **EAGER),  # type: ignore[arg-type]
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kalman_rl"):
            assert len(hosted(alarm, FALL, tmp_path)) >= 12
        assert [r for r in caplog.records if "the run goes on without it" in r.message]
    with pytest.raises(ConfigError, match="action: got 'pause'"):
        CollapseAlarm("pause")


def test_evaluations_and_summaries_are_not_training(tmp_path: Path) -> None:
    alarm = CollapseAlarm(folder=tmp_path, **EAGER)  # type: ignore[arg-type]
    hosted(alarm, FALL[:8], tmp_path)
    before = alarm.state()
    state, control = TrainerState(), TrainerControl()
    for logs in (
        {"eval_loss": 1.0, "entropy": 9.0},
        {"train_runtime": 1.0, "loss": 0.0, "entropy": 9.0},
        {},
        None,
    ):
        alarm.on_log(SimpleNamespace(), state, control, logs=logs)  # type: ignore[arg-type]
    assert alarm.state() == before


def test_old_checkpoints_without_a_state_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alarm = CollapseAlarm(folder=tmp_path)
    state = TrainerState(stateful_callbacks={})
    state.global_step = 8
    with caplog.at_level(logging.WARNING, "kalman_rl"):
        alarm.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, TrainerControl())  # type: ignore[arg-type]
    assert "start anew" in caplog.text and "CollapseAlarm" in state.stateful_callbacks
    assert os.listdir(tmp_path) == []
