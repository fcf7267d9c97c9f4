"""A trust region on a part of the ratio: what the transform left out comes back as a detached factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import Trust, TrustRegion, weight_of


@dataclass(frozen=True)
class Decoupled:
    """Clip the change since a nearby policy, weigh by the change before it.

        pi / mu = pi / pi_near  pi_near / mu;     loss_t = sg(min(e^(l_t - s_t), cap)) then(e^s_t)

    with l the observed log-ratio to the behaviour policy and s the part of it that ``ratio`` kept.

    Args:
        then: the trust region on ``e^s``.
        cap: > 0, upper bound of the factor.

    Raises: NumericError for a cap outside its range. Source: decoupled PPO (arXiv 2110.00641).
    """

    then: TrustRegion
    cap: float = 5.0

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise NumericError(f"cap: got {quote(self.cap)}, expected an upper bound > 0 of the factor")

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        factor = weight_of(ratio.log_ratio - ratio.log_weight).clamp(max=self.cap)
        keep, weight, surrogate = self.then(ratio, advantage, current, rollouts)
        return Trust(keep, factor * weight, factor * surrogate)
