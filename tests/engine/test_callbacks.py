"""What the engine's callbacks keep in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
from transformers import TrainerControl, TrainerState

from kalman_rl.engine.callbacks import WriteMetrics
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.runs.run import Run


def test_the_log_is_kept_in_the_file_alone(tmp_path: Path) -> None:
    arguments: Any = None
    state = TrainerState()
    with Run.create(tmp_path / "run", "", {}) as run:
        callback = WriteMetrics(run, lambda step, numbers: None)
        for step in range(1, 101):
            logs = {"reward": float(step)}
            state.global_step = step
            state.log_history.append({**logs, "step": step})
            callback.on_log(arguments, state, TrainerControl(), logs=logs)
        rows = read_metrics(run.path)
    assert [row["reward"] for row in rows] == [float(step) for step in range(1, 101)]
    assert state.log_history == [{"reward": 100.0, "step": 100}]
