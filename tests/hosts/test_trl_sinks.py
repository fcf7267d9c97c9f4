"""Trackers behind their guard: every event, Ctrl-C, failures and slowness."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

pytest.importorskip("trl")
from transformers import TrainerCallback

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
