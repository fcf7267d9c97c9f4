"""Runs whose reward function fails, hangs or is random: they end well, and no batch is scored twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from kalman_rl.engine.config import TrainConfig, build
from kalman_rl.engine.runs.reading import read_manifest, read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.train import train
from kalman_rl.errors import ConfigError, RewardError
from tests.engine.test_train import SMALL, start, weights

REWARDS = """
import os, time
def mixed(completions, **columns):
    open("calls", "a").write(f"{len(completions)}\\n")
    if not os.path.exists("mended"):
        for text in completions:
            if sum(map(ord, text)) % 3 == 0:
                os._exit(1)
    return [sum(c.isdigit() for c in text) / 5 for text in completions]
def unheard(completions, trainer_state, **columns):
    if trainer_state is None:
        return [0.0] * len(completions)
    open("calls", "a").write(f"{trainer_state.global_step}\\n")
    return [os.urandom(1)[0] / 255 for _ in completions]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resumed(model_path: str, path: Path, allow_change: Collection[str] = (), **changes: Any) -> int:
    config = build(TrainConfig, SMALL | {"model": model_path, "run": path} | changes)
    with Run.open(path) as run:
        return train(config, run, resume=True, allow_change=allow_change)


def numbers(path: Path) -> list[dict[str, Any]]:
    clock = {"time", "step_time", "memory/process_most"}
    rows = [row for row in read_metrics(path) if row["kind"] == "train"]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def test_too_many_failures_end_the_run_with_a_checkpoint_that_resumes(
    model_path: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"reward": "own_rewards:mixed", "save_every": 0, "steps": 6, "quiet": False}
    with pytest.raises(RewardError) as caught:
        start(model_path, here / "run", **settings)
    text = str(caught.value)
    assert text.startswith("reward: got no result of mixed for ") and "ended with exit code 1" in text
    assert "expected at most 20%" in text and "checkpoint of step 4" in text
    assert capsys.readouterr().err.count("it is missing, not 0") == 1
    with Run.open(here / "run") as run:
        assert run.manifest["status"] == "failed"
        assert [folder.name for folder in run.checkpoints()] == ["checkpoint-4"]
    rows = numbers(here / "run")
    shares = [row["reward/failed"] for row in rows if "reward/failed" in row]
    assert len(shares) == 2 and all(0.2 < share < 1 for share in shares)
    assert all(row["loss"] == row["loss"] for row in rows)
    (here / "mended").touch()
    assert resumed(model_path, here / "run", **settings) == 0
    assert [row["step"] for row in numbers(here / "run")] == [1, 2, 3, 4, 5, 6]
    assert "own_rewards" not in sys.modules, "the trainer's process imports no foreign code"


def test_a_random_reward_resumes_bitwise_and_is_asked_once(model_path: str, here: Path) -> None:
    settings = {"reward": "own_rewards:unheard", "steps": 6}
    path, whole = here / "run", here / "whole"
    _, code = start(model_path, path, **settings)
    assert code == 0
    shutil.copytree(path, whole)
    with Run.open(path) as run:  # as a kill in step 5 leaves it
        for folder in run.checkpoints()[1:]:
            shutil.rmtree(folder)
    shutil.rmtree(path / "model")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    assert resumed(model_path, path, **settings) == 0
    assert numbers(path) == numbers(whole)
    assert all(torch.equal(value, weights(path)[name]) for name, value in weights(whole).items())
    assert (here / "calls").read_text().split() == ["0", "2", "4"], "every batch was scored once"


def test_an_edited_reward_is_noticed_and_scores_anew_where_it_is_allowed(model_path: str, here: Path) -> None:
    settings = {"reward": "own_rewards:unheard", "steps": 6}
    path = here / "run"
    assert start(model_path, path, **settings)[1] == 0
    with Run.open(path) as run:  # as a kill in step 5 leaves it
        for folder in run.checkpoints()[1:]:
            shutil.rmtree(folder)
        run.update_manifest(status="interrupted")
    (here / "own_rewards.py").write_text(REWARDS + "# edited\n")
    with pytest.raises(
        ConfigError, match=r"^reward: got another file of 'own_rewards:unheard' .*--allow-change code"
    ):
        resumed(model_path, path, **settings)
    assert read_manifest(path)["status"] == "interrupted", "as it was"
    assert resumed(model_path, path, ["code"], **settings) == 0
    assert (here / "calls").read_text().split() == ["0", "2", "4", "2", "4"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["code_sha256"] == {
        "reward": hashlib.sha256((here / "own_rewards.py").read_bytes()).hexdigest()
    }
