"""The learning rate that follows the effective sample size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, SampleSizeRate
from tests.hosts.test_trl import History, digit_sum, model_path, settings
from tests.hosts.test_trl_metrics import step_of
from tests.hosts.tiny_llama import tokenizer

__all__ = ["model_path"]
SHARE = "effective_sample_size/sequences_raw"


class Moves(TrainerCallback):
    """How far each optimizer step moved the weights."""

    def __init__(self) -> None:
        self.moves: list[torch.Tensor] = []
        self.before = torch.zeros(0)

    def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - self.before)


def trained(folder: Path, model_path: str, *callbacks: Any) -> tuple[Moves, list[dict[str, float]]]:
    moves, history = Moves(), History()
    KalmanGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        reward_funcs=digit_sum,
        args=KalmanGRPOConfig(**settings(folder, **step_of(2)), method="grpo"),
        train_dataset=Dataset.from_list([{"prompt": f"{a}{b}>"} for a in range(4) for b in range(4)]),
        processing_class=tokenizer(),
        callbacks=[moves, history, *callbacks],
    ).train()
    return moves, history.logs


def test_a_step_is_shortened_by_the_root_of_the_share(model_path: str, tmp_path: Path) -> None:
    """SGD moves the weights by rate times gradient; the first step is on-policy, the second is not."""
    plain, logs = trained(tmp_path / "plain", model_path)
    shorter, same = trained(tmp_path / "shorter", model_path, SampleSizeRate(reference=0.9))
    assert logs[0][SHARE] == 1.0 and logs[1][SHARE] < 0.8
    torch.testing.assert_close(shorter.moves[0], plain.moves[0])
    factor = math.sqrt(logs[1][SHARE] / 0.9)
    torch.testing.assert_close(shorter.moves[1], factor * plain.moves[1], rtol=1e-3, atol=1e-6)
    assert [log["learning_rate"] for log in same] == [log["learning_rate"] for log in logs]


@pytest.mark.parametrize("reference", [0.0, 1.5, float("nan"), True])
def test_a_reference_out_of_range_is_refused(reference: float) -> None:
    with pytest.raises(
        ConfigError, match=r"reference: got .*, expected a share of the sequences in \(0, 1\]"
    ):
        SampleSizeRate(reference)
