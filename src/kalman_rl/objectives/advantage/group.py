"""Advantages from outcome rewards: callables ``(reward, group) -> advantage``, each (B,), detached.

A few look at more: they name it in ``inputs`` and take it as keyword arguments, and the optimal token baseline
gives one number per token (B, T). Those that run a filter over the rewards are in ``filtered``. One that says
``needs_groups`` is 0 for every completion that is alone in its group.

A NaN reward is missing: it is left out of every baseline and its advantage is 0. Arithmetic is float64
inside, and a reward that differs from its baseline by rounding alone has an advantage of exactly 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import is_real
from kalman_rl.errors import NumericError, ShapeError, quote


class GroupStatistics(NamedTuple):
    """Per completion (B,): its group's ``size`` (known rewards), ``mean``, unbiased ``std``, ``spread`` and largest
    absolute reward ``peak``; its own ``deviation`` from the mean, as of :func:`above_rounding`."""

    size: Tensor
    mean: Tensor
    std: Tensor
    spread: Tensor
    peak: Tensor
    deviation: Tensor


def group_statistics(reward: Tensor, group: Tensor) -> GroupStatistics:
    """Statistics of each completion's group over the known rewards; groups may be ragged and interleaved.

    Args:
        reward: (B,) numbers, NaN = missing.
        group: (B,) integers.

    Raises: ShapeError for other shapes, NumericError for an infinite reward.

    >>> group_statistics(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 3])).mean
    tensor([0.5000, 0.5000, 5.0000], dtype=torch.float64)
    """
    filled, known = known_rewards(reward, group)
    index = torch.unique(group, return_inverse=True)[1]
    zeros = torch.zeros_like(filled)  # there are no more groups than completions
    count = zeros.index_add(0, index, known.double())
    mean = zeros.index_add(0, index, filled) / count.clamp(min=1)
    deviation = torch.where(known, filled - mean[index], 0.0)
    std = (zeros.index_add(0, index, deviation.square()) / (count - 1).clamp(min=1)).sqrt()
    high = zeros.scatter_reduce(0, index, torch.where(known, filled, -math.inf), "amax", include_self=False)
    low = zeros.scatter_reduce(0, index, torch.where(known, filled, math.inf), "amin", include_self=False)
    spread = torch.where(count > 0, high - low, 0.0)
    size, peak = count[index], torch.where(count > 0, torch.maximum(high, -low), 0.0)[index]
    deviation = above_rounding(reward, mean[index], peak, size)
    return GroupStatistics(size, mean[index], std[index], spread[index], peak, deviation)


def above_rounding(reward: Tensor, baseline: Tensor, peak: Tensor, size: Tensor) -> Tensor:
    """``r - b`` in float64, exactly 0 where rounding alone can make the two differ.

        |r - b| <= (u + n u64) peak        u: relative spacing of the rewards' type, u64: of float64

    0.2 is the mean of 0.1, 0.2 and 0.3, but not of the float32 numbers next to them; the residue would have a sign,
    and with it a side of the clip. Types narrower than float32 hold scores such as 0 and 1 exactly: u is float32's.

    Args:
        reward: (B,), NaN = missing, gives 0.
        baseline: (B,) or (B, 1) or (B, T) float64, with ``reward`` unsqueezed alike: an average of the rewards.
        peak: the largest absolute reward in that average. size: how many there are.

    >>> tenth = torch.tensor([0.1, 0.2, 0.3])
    >>> above_rounding(tenth, tenth.double().mean(), torch.tensor(0.3), torch.tensor(3))[1].item()
    0.0
    """
    exact = torch.finfo(torch.float64).eps
    wide = reward.dtype == torch.float64 or not reward.dtype.is_floating_point
    spacing = exact if wide else torch.finfo(torch.float32).eps
    difference = reward.detach().double() - baseline
    return torch.where(difference.abs() > (spacing + size * exact) * peak, difference, 0.0)


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
    needs_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 <= self.epsilon < math.inf and 0 <= self.tolerance < math.inf):
            raise NumericError(
                f"epsilon, tolerance: got {quote(self.epsilon)}, {quote(self.tolerance)}, expected finite numbers >= 0"
            )

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        return only_known(self.score(reward, group), reward)

    def score(self, reward: Tensor, group: Tensor) -> Tensor:
        """The advantages (B,) in float64, whatever type the rewards have; a missing reward has 0."""
        s = group_statistics(reward, group)
        informative = s.spread > self.tolerance * s.mean.abs().clamp(min=1.0)
        return torch.where(
            informative, s.deviation / torch.where(informative, s.std + self.epsilon, 1.0), 0.0
        )


def group_centred(reward: Tensor, group: Tensor) -> Tensor:
    """``A = r - mean`` within the group; 0 for a group of one. Source: Dr.GRPO (arXiv 2503.20783)."""
    s = group_statistics(reward, group)
    return _finish(s.deviation, reward, s.spread > 0)


def leave_one_out(reward: Tensor, group: Tensor) -> Tensor:
    """``A = r - mean of the others = G/(G-1) (r - mean)``; 0 for a group of one, which has no others.

    Unbiased: a completion's reward never moves its own baseline. Source: RLOO (arXiv 2402.14740).
    """
    s = group_statistics(reward, group)
    scale = s.size / (s.size - 1).clamp(min=1)
    return _finish(scale * s.deviation, reward, s.spread > 0)


def group_relative(reward: Tensor, group: Tensor) -> Tensor:
    """``A = (r - mean) / mean`` within the group; 0 for a group of one, and where the mean is not positive.

    For rewards >= 0: a prompt solved with rate p weighs 1/p, so rare successes count most.
    Source: MaxRL (arXiv 2602.02710).
    """
    s = group_statistics(reward, group)
    positive = s.mean > 0
    scaled = s.deviation / torch.where(positive, s.mean, 1.0)
    return _finish(scaled, reward, positive & (s.spread > 0))


for _part in (group_centred, leave_one_out, group_relative):
    _part.needs_groups = True  # type: ignore[attr-defined]


def batch_leave_one_out(reward: Tensor, group: Tensor) -> Tensor:
    """``A = r - mean of all other completions of the batch``: a baseline without groups or memory.

    The control that is hard to beat where prompts are alike in difficulty.
    """
    known_rewards(reward, group)
    return leave_one_out(reward, torch.zeros_like(group))


@dataclass(frozen=True)
class ConstantBaseline:
    """``A = r - value``: REINFORCE with a baseline known before sampling. Source: Williams (1992)."""

    value: float = 0.0

    def __post_init__(self) -> None:
        if not (is_real(self.value) and math.isfinite(self.value)):
            raise NumericError(f"baseline: got {quote(self.value, 80)}, expected a finite reward")

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        known_rewards(reward, group)
        value = torch.full_like(reward, self.value, dtype=torch.float64)
        return only_known(above_rounding(reward, value, value.abs(), torch.ones_like(value)), reward)


@dataclass(frozen=True)
class Rescaled:
    """``A = alpha (r - mean) / norm`` within the group, alpha from how much of the batch teaches something.

        alpha = known / (known - degenerate)        degenerate: completions in groups of equal rewards
        alpha = known / nonzero                     published code (``by_zeros``): completions with reward 0

    Counting zero rewards makes the step inversely proportional to accuracy and breaks under a shift of the
    reward; counting degenerate groups does neither. Both depend on the batch's rewards, so neither is an
    unbiased estimate; alpha = 1 is :func:`group_centred`.

    Args:
        norm: > 0, divides every advantage.
        by_zeros: count as published code does.

    Source: GPG (arXiv 2504.02546) and verl's port of it.
    """

    norm: float = 1.0
    by_zeros: bool = False
    needs_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise NumericError(f"norm: got {quote(self.norm)}, expected a finite number > 0")

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        s = group_statistics(reward, group)
        known = ~torch.isnan(reward)
        teaching = known & ((reward != 0) if self.by_zeros else (s.spread > 0))
        alpha = known.sum().double() / teaching.sum().clamp(min=1)
        return _finish(alpha * s.deviation / self.norm, reward, s.spread > 0)


@dataclass(frozen=True)
class LengthWeighted:
    """``A = r - sum_i n_i r_i / sum_i n_i`` within the group, n the length in tokens; 0 for a group of one.

    The variance-optimal baseline if a completion's squared score norm is proportional to its length. It
    contains the completion's own reward. Needs: ``length``. Source: OPO (arXiv 2505.23585). Deviation:
    published code gives a group of one its reward.
    """

    inputs: ClassVar[tuple[str, ...]] = ("length",)
    needs_groups: ClassVar[bool] = True

    def __call__(self, reward: Tensor, group: Tensor, *, length: Tensor) -> Tensor:
        s = group_statistics(reward, group)
        filled, known = known_rewards(reward, group)
        if length.shape != reward.shape:
            raise ShapeError(f"length: got shape {tuple(length.shape)}, expected {tuple(reward.shape)}")
        index = torch.unique(group, return_inverse=True)[1]
        weight = torch.where(known, length.double(), 0.0)
        zeros = torch.zeros_like(filled)  # there are no more groups than completions
        total = zeros.index_add(0, index, weight)
        baseline = zeros.index_add(0, index, weight * filled) / torch.where(total > 0, total, 1.0)
        return _finish(above_rounding(reward, baseline[index], s.peak, s.size), reward, s.spread > 0)


@dataclass(frozen=True)
class OptimalTokenBaseline:
    """A baseline for every position: rewards weighted by the squared score norms of each completion so far.

        W_it = sum_{u <= t} |score_iu|^2,    b_t = sum_i W_it r_i / sum_i W_it    (completions alive at t)
        A_it = r_i - b_t;    the end of a completion that outlives its group has b = 0

    Returns (B, T). Groups of one and groups of equal rewards get 0. It contains the own reward.
    Args:
        silent_tail: give the part of the longest completion beyond the second longest advantage 0 instead
            of its reward, because there is nothing to compare it with.

    Needs: ``score_norm_squared``, ``mask``. Source: verl 0.9.1, ``optimal_token_baseline``, outcome rewards.
    Positions are counted in trained tokens, so padding and holes shift nothing. Deviations: groups of one, equal
    rewards, and ``silent_tail`` (published code: the reward itself).
    """

    silent_tail: bool = True
    inputs: ClassVar[tuple[str, ...]] = ("score_norm_squared", "mask")
    needs_groups: ClassVar[bool] = True

    def __call__(self, reward: Tensor, group: Tensor, *, score_norm_squared: Tensor, mask: Tensor) -> Tensor:
        s = group_statistics(reward, group)
        filled, known = known_rewards(reward, group)
        if mask.dim() != 2 or not score_norm_squared.shape == mask.shape == (len(reward), mask.shape[1]):
            shapes = f"{tuple(score_norm_squared.shape)}, {tuple(mask.shape)}"
            raise ShapeError(
                f"score_norm_squared, mask: got shapes {shapes}, expected ({len(reward)}, T) both"
            )
        alive = mask & known[:, None]
        gathered = torch.where(alive, score_norm_squared.double(), 0.0).cumsum(1)
        rank = torch.where(mask, mask.cumsum(1) - 1, 0)  # position among trained tokens
        index = torch.unique(group, return_inverse=True)[1]
        shape = mask.shape  # there are no more groups than completions
        place = (index[:, None] * shape[1] + rank)[alive]

        def per_position(values: Tensor) -> Tensor:
            flat = gathered.new_zeros(shape[0] * shape[1])
            return flat.index_add(0, place, values[alive])[index[:, None] * shape[1] + rank]

        total = per_position(gathered)
        baseline = per_position(gathered * filled[:, None]) / torch.where(total > 0, total, 1.0)
        lonely = per_position(alive.double()) <= 1
        alone = torch.zeros_like(filled) if self.silent_tail else filled
        centred = above_rounding(reward[:, None], baseline, s.peak[:, None], s.size[:, None])
        advantage = torch.where(lonely, alone[:, None], centred)
        return _finish(torch.where(alive, advantage, 0.0), reward[:, None], (s.spread > 0)[:, None])


def known_rewards(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards (B,) in float64 with 0 for missing ones, detached, and which are known, (B,) bool.

    Args: reward: (B,) numbers, NaN = missing. group: (B,) integers.
    Raises: ShapeError for other shapes, NumericError for an infinite reward.
    """
    for name, value in (("reward", reward), ("group", group)):
        if not isinstance(value, Tensor):
            raise ShapeError(f"{name}: got {type(value).__name__}, expected a tensor (B,)")
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


def only_known(advantage: Tensor, reward: Tensor) -> Tensor:
    """Advantages in the reward's type, float32 at least, detached, 0 where the reward is missing."""
    return _finish(advantage, reward, torch.ones_like(reward, dtype=torch.bool))


def _finish(advantage: Tensor, reward: Tensor, informative: Tensor) -> Tensor:
    keep = informative & ~torch.isnan(reward)
    dtype = reward.dtype if reward.dtype == torch.float64 else torch.float32
    return torch.where(keep, advantage, 0.0).to(dtype).detach()
