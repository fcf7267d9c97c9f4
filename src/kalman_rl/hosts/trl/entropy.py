"""TRL's entropy bonus beside any method: ``L = L_policy - coefficient * mean entropy``, fixed or adaptive.

The coefficient and what it adapts to live in the trainer's own attributes, which TRL's checkpoints keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kalman_rl.hosts.trl.factors import high_entropy
from kalman_rl.hosts.trl.translate import WHOLE_STEP


def entropy_bonus(trainer: Any, entropy: Tensor, mask: Tensor, mode: str, policy: Tensor) -> Tensor:
    """What is added to the loss of a micro-batch; the coefficient moves at the end of an optimizer step.

        bonus = -coefficient * mean of H over the tokens that the policy's loss acts on / micro-batches per step

    Args:
        trainer: with TRL's ``entropy_coef``, ``args.entropy_*`` and ``_entropy_window_stats``; logs to ``_metrics``.
        entropy: (B, T) nats, with gradient. mask: (B, T) trained tokens. mode: "train" or "eval".
        policy: the loss without the bonus.

    Gradient: through ``entropy``. Source: TRL 1.16; the adaptive coefficient is Skywork-OR1's (arXiv 2505.22312).
    """
    share = trainer.current_gradient_accumulation_steps if mode == "train" else 1
    whole = trainer.as_trl and trainer.args.loss_type in WHOLE_STEP
    noted = trainer.accelerator.gather(policy.detach() * (1 if whole else share))
    trainer._metrics[mode]["policy_loss"].append(noted.nanmean().item())
    if trainer.top_entropy_quantile < 1.0:
        mask = mask & high_entropy(trainer, entropy, mask)
    total, count = torch.where(mask, entropy, 0.0).sum(), mask.sum()
    coefficient = trainer.entropy_coef
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coefficient = 0.0
    if mode == "train":
        if trainer.use_adaptive_entropy:
            _adapt(trainer, torch.stack([total.detach(), count.to(total.dtype)]))
        if trainer.accelerator.sync_gradients:
            trainer._metrics[mode]["entropy_coef"].append(trainer.entropy_coef)
    return -coefficient * total / count.clamp(min=1) / share


def _adapt(trainer: Any, fresh: Tensor) -> None:
    """Gather sum and count over the optimizer step; at its end move the coefficient towards the target."""
    window = trainer._entropy_window_stats
    trainer._entropy_window_stats = fresh if window is None else window + fresh
    if not trainer.accelerator.sync_gradients:
        return
    total, count = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum").tolist()
    args, world = trainer.args, total / max(count, 1.0)
    if world <= args.entropy_target:
        trainer.entropy_coef = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
    else:
        trainer.entropy_coef = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
    trainer._last_world_entropy = world
    trainer._entropy_window_stats = None
