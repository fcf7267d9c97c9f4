"""Trackers behind their guard: every event, Ctrl-C, failures and slowness."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import WandbCallback
from transformers.trainer_callback import CallbackHandler

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl import SafeSink, make_sinks, sinks


def test_guards_take_every_event_and_let_ctrl_c_through() -> None:
    assert make_sinks("none") == [] and make_sinks([]) == []
    with pytest.raises(ConfigError, match="report_to: got 'wandbb'"):
        make_sinks("wandbb")
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    assert len(events) > 10 and all(name in vars(SafeSink) for name in events)

    class Interrupted(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

        def on_step_end(self, *args: Any, **kwargs: Any) -> Any:
            return "a control of its own"

    sink = SafeSink(Interrupted())
    assert sink.on_step_end() is None  # type: ignore[call-arg]
    with pytest.raises(KeyboardInterrupt):
        sink.on_log()  # type: ignore[call-arg]


def test_failures_count_over_the_run() -> None:
    class Flaky(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionError("no\nnetwork")

    said: list[str] = []
    sink: Any = SafeSink(Flaky(), "mine", said.append)
    for left in (2, 1):
        sink.on_log()
        assert sink.callback is not None, left
    sink.on_log()
    assert sink.callback is None
    assert said == [
        "report_to: mine failed in on_log (ConnectionError: no network); the run goes on without it after "
        "2 failures more"
    ]


def test_slowness_counts_over_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.03)

    said: list[str] = []
    sink: Any = SafeSink(Slow(), "mine", said.append)
    monkeypatch.setattr(sinks, "STEP", 60.0)
    sink.on_step_end()
    assert sink._used >= 0.03
    sink._used = 60.0
    sink.on_step_begin()
    sink.on_step_end()
    assert sink.callback is not None, "a new step begins at 0"
    monkeypatch.setattr(sinks, "STEP", 0.05)
    for _ in range(3):
        sink.on_step_end()
    assert sink.callback is None
    assert said == [
        "report_to: mine failed in on_step_end (it took longer than 0.05 s); the run goes on without it"
    ]


def test_events_come_in_order_in_one_thread() -> None:
    seen: list[tuple[str, int]] = []

    class Noting(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            return lambda *args, **kwargs: seen.append((name, threading.get_ident()))

    sink: Any = SafeSink(Noting(), "mine")
    for event in ("on_init_end", "on_train_begin", "on_step_begin", "on_log", "on_train_end"):
        getattr(sink, event)()
    assert [name for name, _ in seen] == [
        "on_init_end",
        "on_train_begin",
        "on_step_begin",
        "on_log",
        "on_train_end",
    ]
    assert len({thread for _, thread in seen} | {threading.get_ident()}) == 2


class Dying(BaseException):
    def __str__(self) -> str:
        raise ValueError


class Slow(TrainerCallback):
    def __init__(self) -> None:
        time.sleep(60)


class Unset(TrainerCallback):
    def __init__(self) -> None:
        raise Dying


@pytest.mark.parametrize(
    ("tracker", "why"),
    [(Slow, "it took longer than 0.05 s"), (Unset, "Dying: an error that cannot be written out")],
)
def test_a_set_up_that_hangs_or_dies_is_left_out(
    tracker: type[TrainerCallback], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "LONG", 0.05)
    monkeypatch.setitem(sinks.INTEGRATION_TO_CALLBACK, "wandb", tracker)
    said: list[str] = []
    assert make_sinks("wandb", said.append) == []
    assert said == [f"report_to: wandb failed in set-up ({why}); the run goes on without it"]


def test_a_tracker_has_no_say_in_training() -> None:
    class Meddling(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop, state.global_step = True, 7
            kwargs["logs"].clear()

    state, control, logs = TrainerState(global_step=1), TrainerControl(), {"loss": 1.0}
    said: list[str] = []
    SafeSink(Meddling(), "mine", said.append).on_log(None, state, control, logs=logs)  # type: ignore[attr-defined]
    assert (state.global_step, control.should_training_stop, logs, said) == (1, False, {"loss": 1.0}, [])


def test_the_trackers_of_the_trainer_class_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of its ``report_to``; other callbacks are the user's own, and stay as they are."""

    class Leaving(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            sys.exit(7)

    class Mine(TrainerCallback):
        pass

    from tests.hosts.test_trl_sampling import config, trainer

    monkeypatch.setitem(sinks.INTEGRATION_TO_CALLBACK, "wandb", Leaving)
    made = trainer(config(tmp_path, method="grpo", max_steps=2, report_to="wandb"), callbacks=[Mine()])
    kinds = [type(callback) for callback in made.callback_handler.callbacks]
    assert Mine in kinds and SafeSink in kinds and Leaving not in kinds
    with caplog.at_level("WARNING"):
        made.train()
    assert made.state.global_step == 2
    assert caplog.text.count("report_to: wandb failed in on_step_end (SystemExit: 7)") == 1


def test_a_guarded_tracker_is_found_by_its_class() -> None:
    handler = CallbackHandler([TrainerCallback()], None, None, None, None)
    handler.callbacks = [SafeSink(WandbCallback.__new__(WandbCallback), "wandb")]
    assert isinstance(handler.callbacks[0], WandbCallback)
    guarded = handler.pop_callback(WandbCallback)
    assert type(guarded) is SafeSink and not handler.callbacks
