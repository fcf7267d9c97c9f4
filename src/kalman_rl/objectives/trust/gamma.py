"""A trust region over whole sequences: a Gamma-shaped weight of the sequence's ratio instead of a clip.

    W = prod_t w_t of the sequence,        phi(W) = e^lambda W^k e^(-lambda W)        so phi(1) = 1

Rare sequences fade with the power k, common ones with the decay lambda; both depend on the advantage's sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import LOG_WEIGHT_CAP, Trust, everything

LOG_FLOOR = math.log(1e-8)
"""A sequence's log-ratio is not taken below this."""


@dataclass(frozen=True)
class Gamma:
    """Keep every token, with its sequence's weight: ``loss_t = -A phi(W) logp_t``.

    Args:
        positive_power, positive_decay: k >= 0 and lambda > 0 for A >= 0.
        negative_power, negative_decay: the same for A < 0.

    Log-ratios of tokens are held in [-20, 20], their sum in [log 1e-8, 20].
    Raises: NumericError for a value outside its range. Source: VESPO (arXiv 2602.10693), as in TRL 1.16.
    """

    positive_power: float = 2.0
    positive_decay: float = 3.0
    negative_power: float = 3.0
    negative_decay: float = 2.0

    def __post_init__(self) -> None:
        for name in ("positive_power", "negative_power"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise NumericError(f"{name}: got {quote(value)}, expected a finite power >= 0")
        for name in ("positive_decay", "negative_decay"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise NumericError(f"{name}: got {quote(value)}, expected a finite decay > 0")

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        phi = self.phi(ratio.log_weight, advantage, rollouts.per_sequence_sum)
        return Trust(everything(phi), phi, -advantage * phi * current.logp)

    def phi(self, log_weight: Tensor, advantage: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        """Weight (B, T) of each token's sequence.

        Args: log_weight: (B, T). advantage: broadcastable to it. total: sum over the tokens of a sequence.
        """
        steps = log_weight.clamp(-LOG_WEIGHT_CAP, LOG_WEIGHT_CAP)
        whole = total(steps).clamp(LOG_FLOOR, LOG_WEIGHT_CAP)
        good = advantage >= 0
        power = torch.where(good, whole.new_tensor(self.positive_power), self.negative_power)
        decay = torch.where(good, whole.new_tensor(self.positive_decay), self.negative_decay)
        return (decay + power * whole - decay * whole.exp()).exp()
