"""Samples of another policy: the log-probabilities that ratios are taken to are those of the weights that sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from transformers import TrainerCallback

from kalman_rl.cli.stress import CONDITIONS, plan
from kalman_rl.engine.config import StressConfig, TrainConfig, notes, validate
from kalman_rl.engine.models.weights import load_weights, rounded, trained_weights
from kalman_rl.engine.stale import StaleTrainer
from kalman_rl.engine.tasks import load_task
from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl import KalmanGRPOConfig
from tests.hosts.test_trl import model_path, run, settings

__all__ = ["model_path"]


class Weights(TrainerCallback):
    """The weights before every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(trained_weights(model))


@pytest.mark.parametrize(("lag", "bits", "pieces"), [(0, 0, 1), (1, 0, 1), (3, 0, 1), (2, 0, 2), (0, 4, 1)])
def test_old_log_probabilities_are_the_samplers(
    lag: int, bits: int, pieces: int, model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under a lag of k the policy of k steps ago, at most the start; within a batch it stays the same."""
    weights, batches = Weights(), list[Any]()
    made = KalmanGRPOConfig(
        **settings(
            tmp_path, steps_per_generation=pieces, per_device_train_batch_size=8 // pieces, max_steps=5,
            optim="sgd", learning_rate=3.0, max_grad_norm=0.0,
        ),
        method="grpo",
    )  # fmt: skip

    class Noted(StaleTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, lag=lag, bits=bits, **kwargs)
            self.add_callback(weights)

    trainer, _ = run(Noted, made, model_path, observers=[batches.append])
    moved = 0.0
    for step, batch in enumerate(batches):
        sampled = step - step % pieces
        sampler = weights.seen[max(sampled - lag, 0)]
        load_weights(trainer.model, rounded(sampler, bits) if bits else sampler)
        with torch.no_grad():
            expected, _, _ = trainer._score(trainer.model, batch.inputs)
        mask = batch.rollouts.mask
        torch.testing.assert_close(
            batch.rollouts.logp_old[mask], expected[mask].float(), rtol=1e-5, atol=1e-5
        )
        moved = max(moved, (batch.logp - batch.rollouts.logp_old)[mask].abs().max().item())
    assert (moved > 1e-3) == (lag > 0 or bits > 0 or pieces > 1)
    assert ("log-ratio: got exactly 0" in caplog.text) == (not lag and not bits and pieces == 1)


def test_conditions_of_a_study(tmp_path: Path) -> None:
    given = StressConfig(
        conditions=tuple(CONDITIONS), methods=("grpo",), rollouts=64, minibatch=16, run=tmp_path
    )
    found = {p.run.name.partition("-")[0]: p for p in plan(given) if p.run is not None}
    lags = {name: p for name, p in found.items() if name.startswith("lag")}
    assert [p.sampler_lag for p in lags.values()] == [0, 1, 4, 16]
    for p in lags.values():  # one update on each batch of a minibatch's size
        assert (p.updates_per_generation, p.prompts * p.group_size) == (1, 16)
    assert any("every update is on-policy" in note for note in notes(lags["lag0"]))
    assert not any("every update is on-policy" in note for note in notes(lags["lag1"]))
    assert found["quantised"].sampler_bits == 4 and found["A"].updates_per_generation == 4
    task = load_task(found["long"].task, train_size=4, test_size=64)
    lengths = [len(row["answer"]) + 1 for row in task.test]
    assert min(lengths) >= 65 and max(lengths) <= task.max_completion_tokens == 152


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler_lag": 4, "save_every": 10},
            "sampler_lag: got 4 with save_every = 10, expected save_every = 0",
        ),
        ({"sampler_bits": 1}, "sampler_bits: got 1, expected 2 or more"),
        ({"sampler_bits": 17}, "sampler_bits: got 17"),
        ({"sampler_lag": -1}, "sampler_lag: got -1"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TrainConfig(model="tiny", task="sort12", **changes))


def test_a_lag_needs_whole_groups_in_a_minibatch() -> None:
    with pytest.raises(ConfigError, match="minibatch: got 4, expected a multiple of 8"):
        validate(StressConfig(conditions=("lag1",), rollouts=64, minibatch=4))
