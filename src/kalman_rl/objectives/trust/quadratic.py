"""A trust region without a clip: the further a token moved, the less it may move on, until it is pulled back.

    loss_t = -A w_t + |A| m_t (w_t - 1)^2 / (2 bound)
    c_t = w_t (1 - sign(A) m_t (w_t - 1) / bound)          m_t = 1, or the probability before: m (w - 1) = pi - mu

The weight is continuous in the ratio. It is negative beyond the bound: a token that moved too far in the direction
its advantage asks for is pushed back, while a clip would only stop it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import LOG_WEIGHT_CAP, Trust, everything, weight_of


@dataclass(frozen=True)
class Quadratic:
    """Keep every token; its weight falls linearly with how far it moved, through 0 at ``bound``.

    Args:
        bound: > 0 or inf. How far a token may move before it is pulled back: its ratio from 1, or with
            ``by_probability`` its probability, where a bound of 1 or more never pulls back.
        by_probability: measure the move in probability, ``pi(y) - mu(y)``, with ``mu`` the policy that the ratio is
            taken to. Rare tokens may then change by large factors.

    Raises: NumericError for a bound outside its range.
    Source: Simple Policy Optimization (arXiv 2401.16025) and, by probability, DRPO (arXiv 2606.09821).
    """

    bound: float
    by_probability: bool = False

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise NumericError(f"bound: got {quote(self.bound)}, expected a distance > 0, or inf for none")

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        weight = weight_of(ratio.log_weight)
        moved = torch.expm1(ratio.log_weight.clamp(max=LOG_WEIGHT_CAP))
        size = (current.logp - ratio.log_weight).exp() if self.by_probability else torch.ones_like(weight)
        pull = torch.sign(advantage) * size * moved / self.bound
        surrogate = -advantage * weight + advantage * pull * moved / 2
        return Trust(everything(weight), weight * (1 - pull), surrogate)
