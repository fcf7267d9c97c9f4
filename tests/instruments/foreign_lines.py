"""Lines of prime-rl's token export, for tests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def exported(
    step: int = 5, *, prompt: int = 3, tokens: int = 6, advantage: float = 1.0, **changes: Any
) -> dict[str, Any]:
    """A line as src/prime_rl/trainer/rl/token_export.py writes it (schema 1, prime-rl 559b447)."""
    size = prompt + tokens
    inference = [-0.1 * (i % 4) - 0.2 for i in range(size)]
    trainer = [value + 0.05 * (-1) ** i for i, value in enumerate(inference)]
    ratio = [b - a for a, b in zip(inference, trainer)]
    mask = [i >= prompt for i in range(size)]
    delta = [math.exp(b) - math.exp(a) for a, b in zip(inference, trainer)]
    return {
        "schema_version": 1, "step": step, "rank": 0, "micro_step": 0, "micro_sequence_idx": 0,
        "export_sequence_idx": 0, "env_name": "math", "token_ids": list(range(100, 100 + size)),
        "position_ids": list(range(size)), "loss_mask": mask, "advantages": [advantage] * size,
        "inference_logprobs": inference, "trainer_logprobs": trainer, "entropy": [0.3] * size,
        "mismatch_kl": [0.001] * size, "log_importance_ratio": ratio,
        "importance_ratio": [math.exp(value) for value in ratio], "prob_delta": delta,
        "is_masked": [trained and gain > 0.03 for trained, gain in zip(mask, delta)],
        "is_masked_high": [False] * size, "is_masked_low": [False] * size, "rl_weights": [None] * size,
        "ce_weights": [None] * size, "ref_kl_weights": [None] * size,
    } | changes  # fmt: skip


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    return path
