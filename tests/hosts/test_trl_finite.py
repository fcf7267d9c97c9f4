"""Numbers that are not finite, and noise that is no policy change: what the trainer does about either."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, last_good_checkpoint, switch_off_dropout
from kalman_rl.hosts.trl.dropout import dropout_of
from kalman_rl.hosts.trl.finite import MAX_SKIPPED, gradient_norm
from tests.hosts.test_trl import ROWS, digit_sum, settings, two_ranks
from tests.hosts.tiny_llama import model, tokenizer


def trainer_of(tmp_path: Path, policy: Any = None, **changes: Any) -> KalmanGRPOTrainer:
    return KalmanGRPOTrainer(
        policy or model(),
        digit_sum,
        KalmanGRPOConfig(**settings(tmp_path, method="grpo", **changes)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )


def poison(trainer: KalmanGRPOTrainer, value: float, *steps: int) -> None:
    """Put a number into one parameter's gradient at these steps (from 1), as a broken kernel would."""
    parameter = trainer.model.model.norm.weight

    def change(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, value) if trainer.state.global_step + 1 in steps else gradient

    parameter.register_hook(change)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    tmp_path: Path, value: float, clip: float
) -> None:
    """1e30 is finite, its square is not: Adam's second moment would be infinite for ever."""
    trainer = trainer_of(tmp_path, max_grad_norm=clip, save_strategy="steps", save_steps=1)
    poison(trainer, value, 2)
    what = (
        "a gradient of norm inf"
        if value == 1e30
        else r"a gradient with NaN or infinity of model\.norm\.weight"
    )
    with pytest.raises(
        NumericError, match=rf"^step 2: got {what}, .*checkpoint is .*checkpoint-1; set a lower"
    ):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    now = trainer.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in saved.items())


def test_the_step_may_be_skipped(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, nonfinite="skip")
    poison(trainer, math.nan, 2)
    before: dict[int, torch.Tensor] = {}

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before[state.global_step] = trainer.model.lm_head.weight.detach().clone()

    trainer.add_callback(Note())
    trainer.train()
    assert torch.equal(before[1], before[2]) and not torch.equal(before[2], before[3])
    skipped = [row["step/skipped"] for row in trainer.state.log_history if "step/skipped" in row]
    assert skipped == [0.0, 1.0, 0.0, 0.0]
    states = trainer.optimizer.state.values()
    assert all(value.isfinite().all() for state in states for value in state.values())


def test_a_run_that_only_skips_is_stopped(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, nonfinite="skip", max_steps=MAX_SKIPPED + 4)
    poison(trainer, math.nan, *range(1, 99))
    with pytest.raises(
        NumericError, match=rf"^step {MAX_SKIPPED + 1}: .*no checkpoint was saved.*steps in a row"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "term"), [("objective/surrogate", "loss"), ("objective/penalty", "penalty")]
)
def test_the_term_is_named(tmp_path: Path, name: str, term: str) -> None:
    trainer = trainer_of(tmp_path)
    notice = trainer.notice_terms
    trainer.notice_terms = lambda metrics: notice(metrics | {name: math.inf})  # type: ignore[method-assign]
    with pytest.raises(NumericError, match=rf"^step 1: got a {term} of inf, expected finite"):
        trainer.train()


def test_a_far_reference_neither_stops_a_run_nor_breaks_it(tmp_path: Path) -> None:
    """The penalty against a reference that a high rate has left far behind, which made NaN of the weights."""
    policy = model()
    path = tmp_path / "start"
    policy.save_pretrained(path)
    policy.name_or_path = policy.config._name_or_path = str(path)
    trainer = trainer_of(tmp_path, policy, beta=0.05, learning_rate=0.3, max_grad_norm=0.0, max_steps=6)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3e3)
    trainer.train()
    far = max(row.get("ratio/max_abs_log_ratio", 0.0) for row in trainer.state.log_history)
    assert far > 178, "neither exponential would have overflowed"
    assert all(math.isfinite(row["kl"]) for row in trainer.state.log_history if "kl" in row)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_unknown_choice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^nonfinite: got 'ignore', expected one of stop, skip"):
        trainer_of(tmp_path, nonfinite="ignore")


def test_last_good_checkpoint_passes_over_weights_that_are_not_finite(tmp_path: Path) -> None:
    trainer_of(tmp_path, save_strategy="steps", save_steps=2).train()
    newest, older = tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"
    assert last_good_checkpoint(tmp_path) == newest
    weights = load_file(newest / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, newest / "model.safetensors", metadata={"format": "pt"})
    assert last_good_checkpoint(tmp_path) == older


def test_the_norm_of_no_gradient_is_zero() -> None:
    assert gradient_norm(model()).item() == 0


NAN_RANK = """
import traceback
import tests.hosts.test_trl_finite as f
from kalman_rl.errors import NumericError

def run(nonfinite, **sizes):
    trainer = f.trainer_of(out / nonfinite, nonfinite=nonfinite, per_device_train_batch_size=4, **sizes)
    compute = trainer._compute_loss
    def broken(model, inputs):
        loss = compute(model, inputs)
        here = trainer.accelerator.process_index == 1 and trainer.state.global_step == 1
        return loss * float("nan") if here else loss
    trainer._compute_loss = broken
    return trainer
"""


@pytest.mark.timeout(300)
def test_nan_of_one_rank_is_handled_by_both(tmp_path: Path) -> None:
    """The loss of rank 1 is NaN in step 2: both ranks stop with the same sentence, or both skip the step."""
    body = (
        NAN_RANK
        + """
trainer = run("stop")
try:
    trainer.train()
except NumericError as error:
    results["stop"] = str(error)
results["finite"] = all(bool(p.isfinite().all()) for p in trainer.model.parameters())
trainer = run("skip")
trainer.train()
results["skipped"] = [row["step/skipped"] for row in trainer.state.log_history if "step/skipped" in row]
results["weights"] = [p.double().sum().item() for p in trainer.model.parameters()]
"""
    )
    first, second = two_ranks(body, "", tmp_path)
    assert first["stop"] == second["stop"]
    assert first["stop"].startswith("step 2: got a gradient with NaN or infinity of model.")
    assert first["finite"] and second["finite"]
    assert first["skipped"] == second["skipped"] == [0.0, 1.0, 0.0, 0.0]
    assert first["weights"] == second["weights"] and all(map(math.isfinite, first["weights"]))


# ---- dropout


def with_dropout() -> Any:
    policy = model()
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return policy


def test_dropout_is_named_and_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = with_dropout()
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, policy)
    (text,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("dropout")]
    assert "model.layers.0.self_attn.attention_dropout = 0.1" in text
    assert set(switch_off_dropout(policy).values()) == {0.1} and dropout_of(policy) == {}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, policy)
    assert not any("dropout" in record.getMessage() for record in caplog.records)


def test_at_learning_rate_zero_only_dropout_moves_the_ratio(tmp_path: Path) -> None:
    policy, moved = with_dropout(), []
    for _ in range(2):
        trainer = trainer_of(tmp_path, policy, learning_rate=0.0)
        trainer.train()
        moved.append(max(row.get("ratio/max_abs_log_ratio", 0.0) for row in trainer.state.log_history))
        switch_off_dropout(policy)
    assert moved[0] > 1e-3, "this model has no dropout to switch off"
    assert moved[1] < 1e-5
