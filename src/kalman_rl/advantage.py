"""Advantages from outcome rewards: callables ``(reward, group) -> advantage``, each (B,), detached.

A NaN reward is missing: it is left out of every baseline and its advantage is 0. Arithmetic is float64
inside, so that equal rewards give exactly 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError


class GroupStatistics(NamedTuple):
    """Per completion (B,): its group's ``size`` (known rewards), ``mean``, unbiased ``std``, ``spread``."""

    size: Tensor
    mean: Tensor
    std: Tensor
    spread: Tensor


def group_statistics(reward: Tensor, group: Tensor) -> GroupStatistics:
    """Statistics of each completion's group over the known rewards; groups may be ragged and interleaved.

    Args:
        reward: (B,) numbers, NaN = missing.
        group: (B,) integers.

    Raises: ShapeError for other shapes, NumericError for an infinite reward.

    >>> group_statistics(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 3])).mean
    tensor([0.5000, 0.5000, 5.0000], dtype=torch.float64)
    """
    reward, known = _known(reward, group)
    index = torch.unique(group, return_inverse=True)[1]
    zeros = reward.new_zeros(int(index.max()) + 1 if len(index) else 0)
    count = zeros.index_add(0, index, known.double())
    mean = zeros.index_add(0, index, reward) / count.clamp(min=1)
    deviation = torch.where(known, reward - mean[index], 0.0)
    std = (zeros.index_add(0, index, deviation.square()) / (count - 1).clamp(min=1)).sqrt()
    high = zeros.scatter_reduce(0, index, torch.where(known, reward, -math.inf), "amax", include_self=False)
    low = zeros.scatter_reduce(0, index, torch.where(known, reward, math.inf), "amin", include_self=False)
    spread = torch.where(count > 0, high - low, 0.0)
    return GroupStatistics(count[index], mean[index], std[index], spread[index])


@dataclass(frozen=True)
class GroupZScore:
    """``A = (r - mean) / (std + epsilon)`` within the group; exactly 0 for groups of one or of equal rewards.

    Args:
        epsilon: added to the standard deviation (TRL 1e-4, verl 1e-6).
        tolerance: a group whose spread is at most ``tolerance * max(1, |mean|)`` counts as equal, because
            rounding residue would be inflated to full-size advantages.

    Source: GRPO (arXiv 2402.03300). Division by the group's own std makes it a biased gradient estimate.
    """

    epsilon: float = 1e-4
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not (0 <= self.epsilon < math.inf and 0 <= self.tolerance < math.inf):
            raise NumericError(
                f"epsilon, tolerance: got {self.epsilon}, {self.tolerance}, expected finite numbers >= 0"
            )

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        s = group_statistics(reward, group)
        informative = s.spread > self.tolerance * s.mean.abs().clamp(min=1.0)
        score = (reward.double() - s.mean) / torch.where(informative, s.std + self.epsilon, 1.0)
        return _finish(score, reward, informative)


def group_centred(reward: Tensor, group: Tensor) -> Tensor:
    """``A = r - mean`` within the group; 0 for a group of one. Source: Dr.GRPO (arXiv 2503.20783)."""
    s = group_statistics(reward, group)
    return _finish(reward.double() - s.mean, reward, s.spread > 0)


def leave_one_out(reward: Tensor, group: Tensor) -> Tensor:
    """``A = r - mean of the others = G/(G-1) (r - mean)``; 0 for a group of one, which has no others.

    Unbiased: a completion's reward never moves its own baseline. Source: RLOO (arXiv 2402.14740).
    """
    s = group_statistics(reward, group)
    scale = s.size / (s.size - 1).clamp(min=1)
    return _finish(scale * (reward.double() - s.mean), reward, s.spread > 0)


def batch_leave_one_out(reward: Tensor, group: Tensor) -> Tensor:
    """``A = r - mean of all other completions of the batch``: a baseline without groups or memory.

    The control that is hard to beat where prompts are alike in difficulty.
    """
    return leave_one_out(reward, torch.zeros_like(group))


@dataclass(frozen=True)
class ConstantBaseline:
    """``A = r - value``: REINFORCE with a baseline known before sampling. Source: Williams (1992)."""

    value: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise NumericError(f"baseline: got {self.value}, expected a finite reward")

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        _known(reward, group)
        return _finish(reward.double() - self.value, reward, torch.ones_like(reward, dtype=torch.bool))


def _known(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    if reward.dim() != 1 or group.shape != reward.shape:
        raise ShapeError(
            f"reward, group: got shapes {tuple(reward.shape)}, {tuple(group.shape)}, expected (B,) and (B,): "
            "one reward and one group number per completion"
        )
    if torch.isinf(reward).any():
        row = int(torch.isinf(reward).nonzero()[0])
        raise NumericError(
            f"reward: got {reward[row].item()} at row {row}, expected a finite number, or NaN for missing"
        )
    known = ~torch.isnan(reward)
    return torch.where(known, reward.detach().double(), 0.0), known


def _finish(advantage: Tensor, reward: Tensor, informative: Tensor) -> Tensor:
    keep = informative & ~torch.isnan(reward)
    dtype = reward.dtype if reward.dtype == torch.float64 else torch.float32
    return torch.where(keep, advantage, 0.0).to(dtype).detach()
