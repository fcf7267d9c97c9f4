"""A model that vLLM can sample, and runs of our trainer with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, TokenBatch
from tests.engines.vllm_cpu import Engines
from tests.hosts.test_trl import History, run, settings
from tests.hosts.tiny_llama import model, tokenizer


def save_model(path: Path) -> str:
    """A random Llama with heads of size 32, the smallest that vLLM's CPU attention takes."""
    model(hidden_size=64, intermediate_size=64, max_position_embeddings=64).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def with_vllm(output: Path, **changes: Any) -> dict[str, Any]:
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_correction": False}
    return settings(output, **(vllm | changes))


def trained(
    output: Path, model_path: str, engines: Engines, *, checkpoint: Path | None = None, **changes: Any
) -> tuple[History, list[TokenBatch]]:
    """A run of our trainer; what ``engines`` said before it is forgotten."""
    to_trainer = ("method", "reward", "peft_config", "rollout_func")
    kwargs = {name: changes.pop(name) for name in to_trainer if name in changes}
    seen: list[TokenBatch] = []
    engines.said.clear()
    config = KalmanGRPOConfig(**with_vllm(output, **changes))
    _, history = run(
        KalmanGRPOTrainer, config, model_path, checkpoint=checkpoint, observers=[seen.append], **kwargs
    )
    assert all(math.isfinite(log["loss"]) for log in history.logs)
    return history, seen


def by_completion(batch: TokenBatch, values: Tensor) -> list[tuple[tuple[int, ...], list[float]]]:
    """For each row with trained tokens: its completion and ``values`` (B, T) on it."""
    completions = batch.inputs["completion_ids"]
    return [
        (tuple(ids[mask].tolist()), row[mask].tolist())
        for ids, row, mask in zip(completions, values, batch.rollouts.mask, strict=True)
        if mask.any()
    ]
