"""The collapse alarm: the rule on fallen reward, the journal, the callback driven as a trainer would."""

from __future__ import annotations

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

from kalman_rl.engine.collapse.rule import FILE, Alarm, Fall, Token, append_alarm, keep_alarms, read_alarms
from kalman_rl.errors import ConfigError, RunError

# ---------------------------------------------------------------- the rule

FALLEN = [*np.linspace(0.2, 0.5, 30), *[0.02] * 12, *[0.5] * 20, *[0.01] * 12]


def falls(rewards: Any, fall: Fall) -> list[int]:
    told = [fall.see(t + 1, {"reward": reward}) for t, reward in enumerate(rewards)]
    return [alarm.step for alarm in told if alarm]


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


def test_an_alarm_names_the_lowest_sample_size_since_the_reward_before() -> None:
    """Rewards come with the first update after sampling, whose size is 1; the updates between have none."""
    fall, alarms, size = Fall(), list[Alarm](), "effective_sample_size/sequences_raw"
    for batch, reward in enumerate([0.40, 0.41, 0.39, 0.40, 0.41, 0.40, *[0.05] * 5]):
        first = fall.see(4 * batch, {"reward": reward, size: 1.0})
        alarms += [first] if first else []
        for update, share in enumerate((0.9, 0.9 - 0.01 * batch, 0.95), 1):
            assert fall.see(4 * batch + update, {size: share}) is None
    (alarm,) = alarms
    assert alarm.step == 36 and alarm.sample_size == pytest.approx(0.9 - 0.01 * 8)
    assert "effective sample size 0.82" in alarm.sentence()


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


# ---------------------------------------------------------------- on disk


def an_alarm(step: int = 7, text: str = "9") -> Alarm:
    return Alarm(step, 0.1, 0.4, -3.0, (Token(text, -1.5, "p", 3),))


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


# ---------------------------------------------------------------- the callback

pytest.importorskip("trl")
from transformers import TrainerControl, TrainerState  # noqa: E402

from kalman_rl.engine.collapse import CollapseAlarm  # noqa: E402


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
        alarm.on_log(args, state, control, logs={"loss": 0.0, "reward": value})  # type: ignore[arg-type]
        asked.append(f"{'save ' * control.should_save}{'stop' * control.should_training_stop}".strip())
        if control.should_training_stop:
            break
    return asked


FALL = [0.5, 0.51, 0.49, 0.5, 0.5, 0.51, 0.01, 0.02, 0.01, 0.02, 0.01, 0.02, 0.01, 0.02, 0.01, 0.02]


def test_actions_wait_for_the_end_of_the_generation_batch(tmp_path: Path) -> None:
    said: list[str] = []
    asked = {}
    for action in ("warn", "checkpoint", "stop"):
        alarm = CollapseAlarm(action, tmp_path / action, say=said.append)
        asked[action] = hosted(alarm, FALL, tmp_path)
        first = read_alarms(tmp_path / action)[0]
        assert 9 <= first.step <= 12 and first == alarm.alarms[0]
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
        CollapseAlarm("stop", tmp_path / "file"),
        CollapseAlarm("warn", tmp_path, say=broken),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kalman_rl"):
            assert len(hosted(alarm, FALL, tmp_path)) >= 12
        assert [r for r in caplog.records if "the run goes on without it" in r.message]
    with pytest.raises(ConfigError, match="action: got 'pause'"):
        CollapseAlarm("pause")


def test_evaluations_and_summaries_are_not_training(tmp_path: Path) -> None:
    alarm = CollapseAlarm(folder=tmp_path)
    hosted(alarm, FALL[:8], tmp_path)
    before = alarm.state()
    state, control = TrainerState(), TrainerControl()
    for logs in (
        {"eval_loss": 1.0, "reward": 9.0},
        {"train_runtime": 1.0, "loss": 0.0, "reward": 9.0},
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
