"""A trust region over the whole batch: the tokens that moved farthest go, until the rest has moved little on average.

    drop the largest l_t^2 until the mean of the others is below ``bound``

The tokens are sorted into bins whose sums add up over micro-batches and ranks (:meth:`SecondMoment.statistics`); one
look at the sums gives the limit of the whole optimizer step (:meth:`SecondMoment.fitted`), however it was split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError, quote
from kalman_rl.numerics.log_bins import bin_of, counted, edge
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import Band, Trust

BINS = 2**15
"""Bins of log-ratios, 0.08 % wide: tokens of one bin go or stay together."""


@dataclass(frozen=True)
class SecondMoment:
    """Keep the tokens whose mean squared log-ratio stays below ``bound``, dropping the largest first.

    Args:
        bound: > 0, nats squared; inf drops nothing.

    The bin of the smallest log-ratios always stays, as one token does in the published code.
    Raises: NumericError for a bound outside its range. Source: M2PO (arXiv 2510.01161).
    """

    memory: ClassVar[float] = 0.0
    learned: ClassVar[tuple[str, ...]] = ()

    bound: float = 0.04

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise NumericError(f"bound: got {quote(self.bound)}, expected a mean square > 0 (nats^2), or inf")

    def initial(self) -> Tensor:
        """The state before anything was seen: counts, then sums of squares, of every bin: zeros (65536,), float64."""
        return torch.zeros(2 * BINS, dtype=torch.float64)

    def statistics(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Tensor:
        """Tokens and sums of their squared log-weights by bin, (65536,) float64: additive over the parts of an
        optimizer step."""
        size = ratio.log_weight[rollouts.mask].double().abs()
        places = bin_of(size, BINS)
        return torch.cat([counted(places, value, BINS) for value in (torch.ones_like(size), size.square())])

    def fitted(self, state: Tensor) -> Band:
        """The band whose tokens meet the bound, given the statistics of a whole optimizer step.

        Raises: ShapeError for statistics of another part."""
        if state.shape != (2 * BINS,):
            raise ShapeError(
                f"statistics: got shape {tuple(state.shape)}, expected ({2 * BINS},): the sum of what `statistics` "
                "returned for each part"
            )
        count, squares = state.detach().double().cpu().reshape(2, BINS)
        filled = count.nonzero().flatten()
        if not len(filled):
            return Band(edge(BINS, BINS), edge(BINS, BINS))
        mean = (squares.cumsum(0) / count.cumsum(0).clamp(min=1))[filled]
        kept = max(int((mean < self.bound).sum()), 1)  # means of ever larger tokens never fall
        if kept < len(filled):
            limit = edge(int(filled[kept]), BINS)
        else:
            last = int(filled[-1])
            limit = math.inf if last == BINS - 1 else edge(last + 1.5, BINS)  # above the bin, whatever rounds
        return Band(limit, limit)

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        """The current batch taken for the whole optimizer step."""
        found = self.fitted(self.statistics(ratio, advantage, current, rollouts))
        return found(ratio, advantage, current, rollouts)
