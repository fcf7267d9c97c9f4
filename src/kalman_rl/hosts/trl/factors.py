"""TRL's detached factors on the loss of a token: high-entropy tokens, the behaviour policy's mismatch, stale
sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kalman_rl.hosts.trl.translate import spreads


def scaled_advantage(
    trainer: Any, inputs: dict[str, Any], logp: Tensor, entropy: Tensor, mask: Tensor
) -> Tensor:
    """Advantages (B, T) times TRL's factors; a factor >= 0 on A scales the gradient exactly as it would on the loss,
    and leaves the trust region's decision alone.

    Where TRL's settings decide and have one loss per sequence, all its tokens carry the mean of their factors.
    """
    advantage = inputs["advantages"]
    advantage = (advantage if advantage.dim() == 2 else advantage[:, None]).expand_as(logp).float()
    factor = torch.ones_like(advantage)
    if trainer.top_entropy_quantile < 1.0:
        factor = factor * high_entropy(trainer, entropy, mask)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        factor = factor * inputs["importance_sampling_ratio"]
    if trainer.off_policy_mask_threshold is not None:
        old = inputs.get("old_per_token_logps", logp.detach())
        factor = factor * trainer.get_off_policy_mask(
            advantages=advantage,
            per_token_logps=logp.detach(),
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
            mask=mask,
            off_policy_threshold=trainer.off_policy_mask_threshold,
        )
    factor = torch.where(mask, factor, 0.0)
    if trainer.as_trl and spreads(trainer.method):
        factor = factor.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, advantage * factor, 0.0)


def high_entropy(trainer: Any, entropy: Tensor, mask: Tensor) -> Tensor:
    """The tokens (B, T) of ``top_entropy_quantile``, bool."""
    found: Tensor = trainer.get_high_entropy_mask(entropy.detach(), mask, 1 - trainer.top_entropy_quantile)
    return found.bool()
