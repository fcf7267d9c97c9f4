"""Supervised rewards in the trainer: one argument, the same training, and what stays in its process."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from torch import nn

from kalman_rl.errors import ConfigError, RewardError
from kalman_rl.hosts.rewards import SupervisedReward
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer
from kalman_rl.hosts.trl.missing import MissingRewards
from kalman_rl.hosts.trl.supervise import supervised
from tests.hosts.test_trl import ROWS, History, settings
from tests.hosts.tiny_llama import model, tokenizer


def trained(output: Path, reward: Any, **changes: Any) -> tuple[Any, History]:
    history = History()
    torch.manual_seed(0)
    trainer = KalmanGRPOTrainer(
        model=model(),
        reward_funcs=reward,
        args=KalmanGRPOConfig(**settings(output, max_steps=2, method="grpo", **changes)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
        callbacks=[history],
    )
    trainer.train()
    return trainer, history


def test_a_closure_and_an_async_reward_train_as_in_place(tmp_path: Path) -> None:
    scale = 2.0

    def digits(
        completions: list[str],
    ) -> list[float]:  # sent by value; a module's function is imported over there
        return [sum(int(c) for c in text if c.isdigit()) / 20 for text in completions]

    def scaled(completions: list[str], data_source: list[str], **columns: Any) -> list[float | None]:
        return [scale * x if name == "maths" else None for x, name in zip(digits(completions), data_source)]

    async def later(
        completions: list[str], trainer_state: Any, log_metric: Any, **columns: Any
    ) -> list[float]:
        log_metric("step_seen", trainer_state.global_step)
        return digits(completions)

    _, here = trained(tmp_path / "here", [scaled, later])
    trainer, there = trained(tmp_path / "there", [scaled, later], reward_timeout=600)
    assert [reward.__name__ for reward in trainer.supervised] == ["scaled", "later"]
    for mine, theirs in zip(there.logs, here.logs, strict=True):
        added = {"reward/missing", "reward/failed"}
        assert {k: v for k, v in mine.items() if k not in added and "time" not in k} == {
            k: v for k, v in theirs.items() if "time" not in k
        }
    assert "step_seen" in there.logs[0] and 0 < there.logs[0]["reward/missing"] < 1
    for mine, theirs in zip(there.gradients, here.gradients, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    rows = [
        json.loads(line)
        for line in (tmp_path / "there" / "rewards" / "1-rank0.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [0] and len(rows[0]["answer"]["rewards"]) == 16


def test_models_stay_in_the_trainers_process_and_what_cannot_leave_is_named(tmp_path: Path) -> None:
    args = KalmanGRPOConfig(**settings(tmp_path, reward_timeout=60.0))
    judge = nn.Linear(1, 1)

    def score(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    kept, named, away = supervised([judge, "a/reward-model", score], args)
    assert kept is judge and named == "a/reward-model" and isinstance(away, SupervisedReward)
    assert supervised([away], args) == [away] and supervised(None, args) is None
    lock = threading.Lock()
    with pytest.raises(
        ConfigError, match="^reward_timeout: got the reward held that cannot be sent to a worker"
    ):

        def held(completions: list[str], **columns: Any) -> list[float]:
            with lock:
                return [0.0] * len(completions)

        supervised(held, args)
    assert supervised(score, KalmanGRPOConfig(**settings(tmp_path))) is score


def test_more_than_a_fifth_of_failures_over_three_batches_is_too_many() -> None:
    rewards, seen = torch.zeros(10), MissingRewards()
    for failed in (0, 0, 6, 0, 0, 6):  # 6 of 30 is a fifth
        seen.see(rewards, ["judge"], 1, failed)
    seen = MissingRewards()
    for _ in range(2):
        seen.see(rewards, ["judge"], 5, 10, "why")
    with pytest.raises(
        RewardError, match=r"^reward: got no result of judge for 67% .* \(why\); .*of step 6 is there"
    ):
        seen.see(rewards, ["judge"], 7, 0, "why")
