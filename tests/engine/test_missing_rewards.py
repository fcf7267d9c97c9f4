"""Runs whose reward function gives nothing, for a while or for good: what is judged is a whole generation batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from kalman_rl.engine import train as train_module
from kalman_rl.engine.config import TrainConfig, build, to_toml, validate
from kalman_rl.engine.runs.reading import read_manifest, read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import RewardError
from kalman_rl.hosts.trl.missing import IN_A_ROW
from tests.engine.test_stopping import SMALL


class Absent:
    """A reward that is None in some calls of training, counted from 1, and maybe in evaluations."""

    __name__ = "absent"

    def __init__(self, missing: Any, in_evaluation: bool = False) -> None:
        self.missing, self.in_evaluation = missing, in_evaluation
        self.calls: list[int] = []

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        score: list[float | None] = [sum(c.isdigit() for c in text) / 5 for text in completions]
        if columns.get("trainer_state") is None:  # only a trainer has one, an evaluation does not
            return [None] * len(score) if self.in_evaluation else score
        self.calls.append(len(score))
        return [None] * len(score) if self.missing(len(self.calls)) else score


def trained(model_path: str, path: Path, reward: Absent, **changes: Any) -> int:
    config = build(
        TrainConfig, SMALL | {"model": model_path, "run": path, "steps": 8, "save_every": 0} | changes
    )
    validate(config)
    task = dataclasses.replace(train_module.chosen_task(config), reward=reward)
    with Run.create(path, to_toml(config), {}) as run:
        return train_module.train(config, run, task=task)


def test_an_evaluation_without_any_reward_counts_zeros(model_path: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert trained(model_path, path, Absent(lambda call: False, in_evaluation=True)) == 0
    rows = [row for row in read_metrics(path) if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [0, 8]
    assert all(row["eval/sampled_reward"] == row["eval/greedy_accuracy"] == 0 for row in rows)


def test_batches_without_any_reward_teach_nothing_and_end_nothing(model_path: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    reward = Absent(lambda call: call != IN_A_ROW)  # one below the limit, a reward, one below the limit
    batches = 2 * IN_A_ROW - 1
    assert trained(model_path, path, reward, steps=2 * batches) == 0
    assert reward.calls == [16] * batches and read_manifest(path)["status"] == "finished"
    losses = [row["loss"] for row in read_metrics(path) if row["kind"] == "train"]
    known = slice(2 * (IN_A_ROW - 1), 2 * IN_A_ROW)
    assert any(losses[known]) and not any(losses[: known.start] + losses[known.stop :])


def test_several_batches_in_a_row_end_the_run(model_path: str, tmp_path: Path) -> None:
    reward = Absent(lambda call: call > 1)
    expected = rf"absent in {IN_A_ROW} generation batches in a row, the last one of 16 completions for step "
    with pytest.raises(RewardError, match=expected + str(2 * IN_A_ROW + 1)):
        trained(model_path, tmp_path / "run", reward, steps=40)
    assert reward.calls == [16] * (1 + IN_A_ROW)
    assert read_manifest(tmp_path / "run")["status"] == "failed"


def test_a_round_without_any_reward_is_a_part_of_its_batch(model_path: str, tmp_path: Path) -> None:
    reward = Absent(lambda call: call % 2 == 0)
    rounds = {"advantage": "tracked", "allocation": "rounds", "completions_max": 8, "candidates": 4}
    assert trained(model_path, tmp_path / "run", reward, **rounds) == 0
    assert reward.calls == [8] * 8, "two rounds in each of four batches, the second without a reward"
