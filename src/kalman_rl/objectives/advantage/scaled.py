"""Advantages centred within the group and scaled by the batch, for one or for several reward functions.

The conventions of ``group`` hold: a NaN reward is missing and gets 0, arithmetic is float64 inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError, quote
from kalman_rl.objectives.advantage.group import GroupZScore, group_statistics, only_known


@dataclass(frozen=True)
class BatchScaled:
    """``A = (r - mean of the group) / (std of the batch + epsilon)``; 0 for groups of one or of equal rewards.

    Args: epsilon: >= 0, added to the standard deviation of all rewards of the batch.
    Raises: NumericError for another. Source: arXiv 2508.08221, TRL's ``scale_rewards="batch"``.

    >>> BatchScaled(0.0)(torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ 0.3873, -0.3873,  0.3873, -0.3873])
    """

    epsilon: float = 1e-4
    needs_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.epsilon)

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        std = group_statistics(reward, torch.zeros_like(group)).std + self.epsilon
        s = group_statistics(reward, group)
        centred = torch.where(s.spread > 0, s.deviation, 0.0)
        return only_known(torch.where(centred != 0, centred / std, 0.0), reward)


@dataclass(frozen=True)
class NormalizeThenSum:
    """Several reward functions, each normalized within the group before the weighted sum is normalized over the batch.

        S = sum_k weight_k (r_k - mean_k) / (std_k + epsilon),        A = S / (std S + epsilon),  mean S = 0

    Args:
        weights: one per reward function; () weighs all alike.
        epsilon: >= 0, added to both standard deviations.

    Needs: ``rewards`` (B, K). A function without a number for a completion (NaN) adds 0 to its sum.
    Raises: NumericError, ShapeError. Source: GDPO (arXiv 2601.05242), TRL's
    ``multi_objective_aggregation="normalize_then_sum"``.
    """

    weights: tuple[float, ...] = ()
    epsilon: float = 1e-4
    inputs: ClassVar[tuple[str, ...]] = ("rewards",)
    needs_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.epsilon)

    def __call__(self, reward: Tensor, group: Tensor, *, rewards: Tensor) -> Tensor:
        weights = self.weights or (1.0,) * (rewards.shape[1] if rewards.dim() == 2 else 0)
        if rewards.shape != (len(reward), len(weights)):
            raise ShapeError(
                f"rewards: got shape {tuple(rewards.shape)}, expected ({len(reward)}, {len(weights)}): one number "
                "per completion and reward function"
            )
        within = GroupZScore(self.epsilon)
        total = sum(
            weight * within.score(column, group) for weight, column in zip(weights, rewards.unbind(1))
        )
        total = torch.as_tensor(total, dtype=torch.float64, device=rewards.device)
        known = torch.where(torch.isnan(rewards).all(1), torch.nan, total)
        s = group_statistics(known, torch.zeros_like(group))
        # Each function's scores sum to 0 in every group, so the sum's own mean is rounding alone.
        return only_known(
            torch.where(s.spread > within.tolerance, known / (s.std + self.epsilon), 0.0), reward
        )


def _check(epsilon: float) -> None:
    if not 0 <= epsilon < math.inf:
        raise NumericError(f"epsilon: got {quote(epsilon)}, expected a finite number >= 0")
