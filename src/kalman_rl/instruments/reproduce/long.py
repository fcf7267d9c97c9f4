"""A start policy that writes long replies, and questions for it: sorted digits, peeled one by one (``sort_peel``)."""

from __future__ import annotations

from pathlib import Path

import torch

from kalman_rl.engine.models.load import Progress, load_model
from kalman_rl.engine.tasks import load_task
from kalman_rl.instruments.reproduce.policy import CausalPolicy
from kalman_rl.instruments.reproduce.pool import Limits, World

BANK = 3000
CHUNK = 250
"""Questions whose success is computed at once."""


def long_world(cache: Path, progress: Progress) -> World:
    """The tiny model after its warm start, and a bank of questions it was not taught on."""
    task = load_task("sort_peel", test_size=BANK)
    loaded = load_model("tiny", cache=cache, task=task, progress=progress)
    policy = CausalPolicy(
        loaded.model, loaded.tokenizer, end=loaded.tokenizer.eos_token_id, longest=task.max_completion_tokens
    )
    parts = [policy.success(task.test[i : i + CHUNK]) for i in range(0, BANK, CHUNK)]
    return World(policy, policy.state(), list(task.test), torch.cat(parts), Limits(between=(0.05, 0.55)))
