"""Aggregation: how token losses become one number.

An aggregation is a callable ``(rollouts, totals) -> weights`` with weights (B, T), detached and 0 outside
the mask, and the loss is ``sum(weights * token_loss)``. The denominators come from ``totals``, the counts of
the *whole* optimizer step, so that any split into micro-batches or ranks sums to the same loss and gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.objectives.rollouts import Rollouts


class Totals(NamedTuple):
    """Trained ``tokens`` and non-empty ``sequences`` in one optimizer step, over all micro-batches and
    ranks (divided by the number of ranks where the ranks' gradients are averaged)."""

    tokens: float
    sequences: float


def totals_of(rollouts: Rollouts) -> Totals:
    """Counts of one batch that is the whole optimizer step."""
    return Totals(float(rollouts.mask.sum()), float(rollouts.sequence_count))


def token_mean(rollouts: Rollouts, totals: Totals) -> Tensor:
    """Every token counts the same: ``1 / tokens``. Source: DAPO (arXiv 2503.14476)."""
    return rollouts.mask.to(rollouts.logp_old.dtype) / max(totals.tokens, 1.0)


def sequence_mean(rollouts: Rollouts, totals: Totals) -> Tensor:
    """Every sequence counts the same, its tokens equally: ``1 / (n_i sequences)``.

    Source: GRPO (arXiv 2402.03300), GSPO (arXiv 2507.18071), KPO (arXiv 2602.10609).
    """
    return rollouts.mask / (rollouts.lengths.clamp(min=1.0) * max(totals.sequences, 1.0))


@dataclass(frozen=True)
class SequenceSum:
    """Sum over tokens divided by a constant length: ``1 / (length sequences)``.

    Args:
        length: constant > 0 in tokens, the same for the whole run (Dr.GRPO takes the maximum completion
            length); 1 gives the plain sum.

    Source: Dr.GRPO (arXiv 2503.20783).
    """

    length: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.length < math.inf:
            raise NumericError(
                f"length: got {quote(self.length)}, expected a constant, finite number of tokens > 0"
            )

    def __call__(self, rollouts: Rollouts, totals: Totals) -> Tensor:
        return rollouts.mask.to(rollouts.logp_old.dtype) / (self.length * max(totals.sequences, 1.0))
