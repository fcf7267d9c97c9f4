"""SkyRL: our objectives in its registry of policy losses (read at skyrl 0.3.0, August 2026).

SkyRL calls ``loss(log_probs, old_log_probs, advantages, config=, loss_mask=, rollout_logprobs=)`` and sums over
micro-batches: its advantages are already divided as ``loss_reduction`` requires. So the loss here is a plain sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, quote
from kalman_rl.hosts.recipes.common import SUM, checked, metrics_of, summed
from kalman_rl.methods import make_method
from kalman_rl.objectives.aggregate import token_mean
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.rollouts import Rollouts

PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]


def loss_for(method: str | Method, **options: Any) -> PolicyLoss:
    """A SkyRL policy loss of a method (a name with options, or your own Method).

    Raises: ConfigError for methods that need more than SkyRL passes, or with a penalty of their own, whose weight
        would not follow ``loss_reduction``: use ``use_kl_loss``.
    """
    given = make_method(method, **options) if isinstance(method, str) else method
    chosen = summed(checked("SkyRL", given), token_mean)
    if chosen.penalty is not None:
        raise ConfigError(
            f"method: got {quote(chosen.name)} with a penalty, expected none; SkyRL has use_kl_loss"
        )

    def kalman_rl_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any = None,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        logp_behaviour = old_log_probs if rollout_logprobs is None else rollout_logprobs
        rollouts = Rollouts(old_log_probs, mask > 0, logp_behaviour=logp_behaviour, allow_empty=True)
        loss = policy_loss(chosen, rollouts, log_probs, advantage=advantages, totals=SUM)
        numbers = {name: float(value) for name, value in metrics_of(loss, rollouts).items()}
        return loss.value, numbers | {"clip_ratio": 1 - numbers["trust/kept"]}

    return kalman_rl_loss


def register(method: str | Method, name: str | None = None, **options: Any) -> str:
    """Enter a method into SkyRL's registry, before ``ray.init`` syncs it to the workers.

    Returns: the name to set as ``trainer.algorithm.policy_loss_type``, by default ``kalman_rl/METHOD``.
    """
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    name = name or f"kalman_rl/{method if isinstance(method, str) else method.name}"
    PolicyLossRegistry.register(name, loss_for(method, **options))
    return name
