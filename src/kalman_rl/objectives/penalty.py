"""Penalties added to the policy loss, per token: KL to the reference policy, distance to the old one.

With ``d = logp_reference - logp``, as *values* under samples of the current policy k1 and k3 are unbiased
for KL(policy || reference) and k2 is biased by O(d^3). As *losses* they differ: the gradient of k1 has
mean zero (useless), the gradient of k2 is that of KL(policy || reference), the gradient of k3 is that of
KL(reference || policy). Formulas: Schulman, "Approximating KL divergence" (2020).

Exponentials are capped as those of ratios are, at ``LOG_WEIGHT_CAP`` nats: what multiplies ``grad logp`` never
exceeds ``exp(20)``, and a token beyond the cap is still pulled back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, quote
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.objectives.trust.clip import LOG_WEIGHT_CAP, weight_of


def k1(difference: Tensor) -> Tensor:
    """``-d``: unbiased, can be negative; its gradient has mean zero."""
    return -difference


def k2(difference: Tensor) -> Tensor:
    """``d^2 / 2``: its gradient is unbiased for KL(policy || reference)."""
    return difference.square() / 2


def k3(difference: Tensor) -> Tensor:
    """``exp(d) - 1 - d >= 0``, and from ``d = 20`` on its tangent there: the gradient ``expm1(min(d, 20))``
    has the cap of ratios and keeps its sign. Written with ``expm1`` because it cancels for small d in float32.

    >>> k3(torch.tensor([0.0, 1.0, 1000.0]))
    tensor([0.0000e+00, 7.1828e-01, 4.7595e+11])
    """
    capped = difference.clamp(max=LOG_WEIGHT_CAP)
    return torch.expm1(capped) * (1 + (difference - capped)) - capped


def weighted(estimator: Callable[[Tensor], Tensor], difference: Tensor, log_ratio: Tensor) -> Tensor:
    """``w estimator(d)``, ``w = exp(min(s, 20))`` for the log-ratio ``s = logp - logp_old``, gradient through both.

    Beyond the cap w stays the factor on the gradient, as in the policy's loss. For k3 and ``d > 1`` it is
    ``exp(s + d) - w (1 + d)``: the sum is ``logp_reference - logp_old``, so that the first term is a constant, and
    neither of two factors can overflow where their product is 1.

    >>> logp = torch.tensor(-201.0, requires_grad=True)  # sampled and reference policy: -1
    >>> value = weighted(k3, -1 - logp, logp + 1)
    >>> value.backward()
    >>> value.item(), logp.grad.item()
    (1.0, -0.0)
    """
    weight = weight_of(log_ratio.detach()) * (1 + (log_ratio - log_ratio.detach()))
    if estimator is not k3:
        return weight * estimator(difference)
    far = difference > 1
    exponent = log_ratio.detach().clamp(max=LOG_WEIGHT_CAP) + difference.detach()
    constant = exponent.clamp(max=2 * LOG_WEIGHT_CAP).exp()
    near = weight * k3(torch.where(far, 0.0, difference))
    return torch.where(far, constant - weight * (1 + difference), near)


@dataclass(frozen=True)
class SquaredLogRatio:
    """``coefficient (logp - logp_old)^2 / 2`` per token (B, T): a pull back to the old policy, in nats^2.

    Args: coefficient: beta > 0. Raises: NumericError for another. Gradient: through ``logp``.
    Source: DRO (arXiv 2405.19107), in the token form of verl 0.9.1.
    """

    coefficient: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.coefficient < math.inf:
            raise NumericError(f"beta: got {quote(self.coefficient)}, expected a finite penalty weight > 0")

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
        level: "token", or "sequence" to multiply by the geometric mean of the sequence's ratios, as TRL does with
            ``importance_sampling_level="sequence"``; the estimate is then biased.

    Raises: ConfigError for another level, or if the rollouts carry no ``logp_reference``. Gradient: through ``logp``.
    """

    coefficient: float = 0.04
    estimator: Callable[[Tensor], Tensor] = k3
    importance_weighted: bool = False
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise NumericError(
                f"coefficient: got {quote(self.coefficient)}, expected a finite penalty weight >= 0"
            )
        if self.level not in ("token", "sequence"):
            raise ConfigError(f"level: got {quote(self.level)}, expected token or sequence")

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Tensor:
        if rollouts.logp_reference is None:
            raise ConfigError(
                "logp_reference: got None, expected (B, T) log-probabilities of the reference policy "
                "because the method has a KL penalty; pass them in Rollouts (in TRL: set beta > 0), "
                "or drop the penalty"
            )
        difference = torch.where(rollouts.mask, rollouts.logp_reference - logp, 0.0)
        if not self.importance_weighted:
            return self.coefficient * self.estimator(difference)
        log_ratio = torch.where(rollouts.mask, logp - rollouts.logp_old, 0.0)
        if self.level == "token":
            return self.coefficient * weighted(self.estimator, difference, log_ratio)
        mean = rollouts.per_sequence_sum(log_ratio) / rollouts.lengths.clamp(min=1.0)
        return self.coefficient * weight_of(mean) * self.estimator(difference)
