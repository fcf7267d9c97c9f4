"""Penalties added to the policy loss, per token: KL to the reference policy, distance to the old one.

With ``d = logp_reference - logp``, as *values* under samples of the current policy k1 and k3 are unbiased
for KL(policy || reference) and k2 is biased by O(d^3). As *losses* they differ: the gradient of k1 has
mean zero (useless), the gradient of k2 is that of KL(policy || reference), the gradient of k3 is that of
KL(reference || policy). Formulas: Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.objectives.trust.clip import weight_of


def k1(difference: Tensor) -> Tensor:
    """``-d``: unbiased, can be negative; its gradient has mean zero."""
    return -difference


def k2(difference: Tensor) -> Tensor:
    """``d^2 / 2``: its gradient is unbiased for KL(policy || reference)."""
    return difference.square() / 2


def k3(difference: Tensor) -> Tensor:
    """``exp(d) - 1 - d >= 0``, written with ``expm1`` because it cancels for small d in float32."""
    return torch.expm1(difference) - difference


@dataclass(frozen=True)
class SquaredLogRatio:
    """``coefficient (logp - logp_old)^2 / 2`` per token (B, T): a pull back to the old policy, in nats^2.

    Args: coefficient: beta > 0. Raises: NumericError for another. Gradient: through ``logp``.
    Source: DRO (arXiv 2405.19107), in the token form of verl 0.9.1.
    """

    coefficient: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.coefficient < math.inf:
            raise NumericError(f"beta: got {self.coefficient}, expected a finite penalty weight > 0")

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Tensor:
        return self.coefficient * k2(torch.where(rollouts.mask, logp - rollouts.logp_old, 0.0))


@dataclass(frozen=True)
class KL:
    """``coefficient * estimator(logp_reference - logp)`` per token (B, T), in nats.

    Args:
        coefficient: beta >= 0.
        estimator: :func:`k1`, :func:`k2` or :func:`k3` (TRL's and GRPO's choice, the default).
        importance_weighted: multiply by the token ratio ``exp(logp - logp_old)``, through which gradient
            flows too; then value and gradient of k1 and k3 are those of KL(policy || reference), off-policy
            as well (TRL: ``use_bias_correction_kl``). Not so for k2, whose value is biased.

    Raises: ConfigError if the rollouts carry no ``logp_reference``. Gradient: through ``logp``.
    """

    coefficient: float = 0.04
    estimator: Callable[[Tensor], Tensor] = k3
    importance_weighted: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise NumericError(f"coefficient: got {self.coefficient}, expected a finite penalty weight >= 0")

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Tensor:
        if rollouts.logp_reference is None:
            raise ConfigError(
                "logp_reference: got None, expected (B, T) log-probabilities of the reference policy "
                "because the method has a KL penalty; pass them in Rollouts (in TRL: set beta > 0), "
                "or drop the penalty"
            )
        difference = torch.where(rollouts.mask, rollouts.logp_reference - logp, 0.0)
        penalty = self.coefficient * self.estimator(difference)
        if self.importance_weighted:
            penalty = penalty * weight_of(torch.where(rollouts.mask, logp - rollouts.logp_old, 0.0))
        return penalty
