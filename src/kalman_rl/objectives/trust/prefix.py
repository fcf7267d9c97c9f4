"""A trust region with a budget: a token may move as far as the tokens before it left to spend.

D_t = |pi(y_t) - mu(y_t)|,   a_t = 1 - (1 - least) (t - 1) / max(n - 1, 1)          t-th of n trained tokens
drop if moving away and  a_t D_t > min(bound, bound + b W_t - S_t)
W_t = sum_{u < t} a_u,   S_t = sum_{u < t} a_u D_u,   b = clamp(90 % quantile of D, rate, 2 rate)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import Trust, weight_of
from kalman_rl.objectives.trust.divergence import binary_tv

QUANTILE = 0.9


@dataclass(frozen=True)
class PrefixBudget:
    """Keep a token unless it moves away and its sequence has spent its budget; see the module's formula.

    Args:
        bound: > 0, probability, for a single token; inf drops nothing.
        rate: >= 0, probability that every token adds to the budget, at least; at most twice as much.
        least: in (0, 1], weight of the last token; the first has 1.

    ``b`` and ``n`` are those of the whole sequence, so a token's fate depends on later tokens; S counts dropped tokens
    too. The ratio beside it should be :class:`kalman_rl.objectives.ratio.BehaviourToken`. Needs: ``logp_behaviour``.
    Raises: NumericError for a value outside its range. Source: CPPO (arXiv 2606.10968).
    """

    bound: float = 0.2
    rate: float = 0.02
    least: float = 0.8
    inputs: ClassVar[tuple[str, ...]] = ("logp_behaviour",)

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise NumericError(f"bound: got {quote(self.bound)}, expected a probability > 0, or inf for none")
        if not self.rate >= 0:
            raise NumericError(f"rate: got {quote(self.rate)}, expected a probability >= 0")
        if not 0 < self.least <= 1:
            raise NumericError(f"least: got {quote(self.least)}, expected the last token's weight in (0, 1]")

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        distance = binary_tv(current, rollouts).double()
        place = before(torch.ones_like(distance), rollouts)
        share = 1 - (1 - self.least) * place / (rollouts.lengths - 1).clamp(min=1)
        spent = share * distance
        rate = quantile(distance, rollouts, QUANTILE).clamp(self.rate, 2 * self.rate)
        left = self.bound + rate * before(share, rollouts) - before(spent, rollouts)
        away = advantage * ratio.log_weight > 0
        keep = ~(away & (spent > left.clamp(max=self.bound)))
        weight = weight_of(ratio.log_weight)
        return Trust(keep, weight, -advantage * torch.where(keep, weight, 0.0))


def before(values: Tensor, rollouts: Rollouts) -> Tensor:
    """Sum (B, T) over the trained tokens of the same sequence that come earlier.

    >>> before(torch.ones(1, 4), Rollouts(torch.zeros(1, 4), torch.tensor([[1, 0, 1, 1]])))
    tensor([[0., 1., 1., 2.]])
    """
    values = torch.where(rollouts.mask, values, 0.0)
    sums = values.cumsum(1)
    if rollouts.segment is not None:
        index = rollouts.sequence_index
        first = torch.ones_like(rollouts.mask)
        first[:, 1:] = index[:, 1:] != index[:, :-1]
        start = torch.where(first, sums - values, 0.0)
        sums = sums - torch.cummax(start, dim=1).values  # sums of sizes never fall
    return sums - values


def quantile(values: Tensor, rollouts: Rollouts, share: float) -> Tensor:
    """Quantile (B, T) over the trained tokens of each sequence, repeated at them, interpolated linearly; 0 elsewhere.

    >>> quantile(torch.tensor([[0.0, 1.0, 9.0]]), Rollouts(torch.zeros(1, 3), torch.tensor([[1, 1, 0]])), 0.9)
    tensor([[0.9000, 0.9000, 0.0000]])
    """
    out = torch.zeros_like(values)
    # A sequence without trained tokens has a place in ``count`` too; what is found for it is not read. One with trained
    # tokens follows it, or it would have no place, so that all places are inside.
    index, values = rollouts.sequence_index[rollouts.mask], values[rollouts.mask]
    order = values.argsort()
    ranked = values[order[index[order].argsort(stable=True)]]
    count = index.bincount()
    end = count.cumsum(0)
    rank = share * (count - 1).to(values)
    low = end - count + rank.long()
    high = torch.minimum(low + 1, end - 1)
    found = torch.lerp(ranked[low], ranked[high], rank.frac())
    out[rollouts.mask] = found[index]
    return out
