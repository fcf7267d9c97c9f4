"""Dividing a number of completions among prompts: integer counts with the largest sum of gains, exactly.

Gains are a table (N, n_max): entry ``[i, n]`` is what completion number n + 1 of prompt i is worth. Where
gains fall along a row, taking the best entries one after another is the exact optimum. The one exception is
mixed groups from an empty group (the first completion alone is worth nothing), where a dynamic
programme decides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote
from kalman_rl.sampling.gains import Number, gradient_gain, remaining_mixed_group_gains


class Allocation(NamedTuple):
    """``counts`` (N,) int64; ``price``: gain of the last completion bought, or the price that was asked."""

    counts: Tensor
    price: float


def gradient_gains(signal: Tensor, n_max: int) -> Tensor:
    """Gains (N, n_max) for the gradient: :func:`~kalman_rl.sampling.gains.gradient_gain` with k = 1.

    Args: signal: (N,) >= 0, ``E[p (1 - p)]`` of each prompt. n_max: >= 1.
    Raises: ShapeError, NumericError, ConfigError for a value outside its range.
    """
    if not isinstance(signal, Tensor) or signal.dim() != 1:
        got = tuple(signal.shape) if isinstance(signal, Tensor) else type(signal).__name__
        raise ShapeError(f"signal: got {got}, expected a tensor (N,)")
    _check_most(n_max)
    return gradient_gain(signal[:, None], torch.arange(n_max))


def mixed_group_gains(a: Number, b: Number, n_max: int) -> Tensor:
    """Gain table (N, n_max) for mixed groups, from an empty group: rise of P(mixed) by each completion.

    Completion n + 1 >= 2 makes the group mixed for the first time with probability
    ``E[p^n (1 - p)] + E[(1 - p)^n p]``, p ~ Beta(a, b). The first column is 0.

    Args: a, b: (N,) > 0, of the Beta of each prompt. n_max: >= 1.
    Raises: NumericError, ConfigError for a value outside its range.

    >>> mixed_group_gains(torch.tensor([1.0]), torch.tensor([1.0]), 4)
    tensor([[0.0000, 0.3333, 0.1667, 0.1000]], dtype=torch.float64)
    """
    _check_most(n_max)
    return remaining_mixed_group_gains(a, b, 0, 0, n_max)


def _check_most(n_max: int) -> None:
    if not is_whole(n_max, 1):
        raise ConfigError(f"n_max: got {quote(n_max)}, expected an integer >= 1")


def divide(gains: Tensor, total: int, least: Tensor, most: Tensor) -> Allocation:
    """The counts n_i in [least_i, most_i] with sum ``total`` that maximise the sum of gains: exact.

    Args:
        gains: (N, n_max) gain table, finite, >= 0. Each row falls, except that its first entry may be below
            the second.
        total: completions in all, >= 1; every one is used.
        least, most: (N,) integers, 0 <= least <= most <= n_max.

    Returns:
        :class:`Allocation`. Ties go to the earlier prompt, so the result is the same everywhere.

    Raises:
        ShapeError: a shape is wrong or the pool is empty. NumericError: a gain is NaN, infinite or negative.
        ConfigError: no such counts exist.

    Source: greedy (marginal) allocation, Fox 1966; exact for concave gains.

    >>> gains = gradient_gains(torch.tensor([0.25, 0.01]), 8)
    >>> divide(gains, 8, torch.zeros(2, dtype=torch.long), torch.full((2,), 8)).counts
    tensor([7, 1])
    """
    least, most = _checked(gains, least, most)
    if not is_whole(total, 1):
        raise ConfigError(f"total: got {quote(total)}, expected an integer >= 1")
    low, high = int(least.sum()), int(most.sum())
    if not low <= total <= high:
        raise ConfigError(
            f"total: got {quote(total)} completions for {len(least)} prompts, expected {low} to {high} (the sums of "
            "what each must and may get); change the total, the minimum or the maximum"
        )
    smooth = _smoothed(gains, least)
    counts, price = _take_best(smooth, total - low, least, most)
    if bool(((counts == 1) & (least < 1) & (gains[:, 0] < smooth[:, 0])).any()):
        counts = _programme(gains, total, least, most)
    return Allocation(counts, price)


def divide_at_price(gains: Tensor, price: float, least: Tensor, most: Tensor) -> Allocation:
    """For an open-ended budget: every completion whose gain is above ``price``, within [least, most].

    Arguments and errors as :func:`divide`. This maximises gains minus price times completions; where the
    first completion of an empty group is worth less than the second, the two are bought together or not at
    all.

    >>> gains = gradient_gains(torch.tensor([0.25, 0.01]), 8)
    >>> divide_at_price(gains, 0.01, torch.zeros(2, dtype=torch.long), torch.full((2,), 8)).counts
    tensor([5, 0])
    """
    least, most = _checked(gains, least, most)
    if not (is_real(price) and 0 <= price < math.inf):
        raise NumericError(f"price: got {quote(price)}, expected a finite number >= 0")
    price = float(price)
    counts = (_smoothed(gains, least) > price).sum(1)
    counts = torch.minimum(torch.maximum(counts, least), most)
    alone = (counts == 1) & (least < 1) & (gains[:, 0] <= price)  # a cap of 1: half a pair is worth nothing
    return Allocation(torch.where(alone, 0, counts), price)


def _take_best(gains: Tensor, spare: int, least: Tensor, most: Tensor) -> tuple[Tensor, float]:
    """``spare`` more completions to the largest gains: rows fall, so each row is taken from the left."""
    place = torch.arange(gains.shape[1])
    open_ = (place >= least[:, None]) & (place < most[:, None])
    order = torch.where(open_, gains, -math.inf).flatten().argsort(descending=True, stable=True)
    taken = order[:spare]
    counts = least + torch.bincount(taken // gains.shape[1], minlength=len(gains))
    if spare:
        return counts, float(gains.flatten()[taken[-1]])
    return counts, float(torch.where(open_, gains, 0.0).max())


def _smoothed(gains: Tensor, least: Tensor) -> Tensor:
    """Falling gains above these: a low first entry shares with the second where it is for sale."""
    if gains.shape[1] < 2:
        return gains
    second = gains[:, 1]
    shared = torch.where(least < 1, gains[:, :2].mean(1), second)
    first = torch.maximum(gains[:, 0], shared)
    return (
        torch.cat((first[:, None], torch.minimum(second, first)[:, None], gains[:, 2:]), 1).cummin(1).values
    )


def _programme(gains: Tensor, total: int, least: Tensor, most: Tensor) -> Tensor:
    """Dynamic programme over prompts: best[t] = largest sum of gains of t completions; O(N B n_max)."""
    worth = torch.cat((gains.new_zeros(len(gains), 1), gains.cumsum(1)), dim=1)
    best = gains.new_full((total + 1,), -math.inf)
    best[0] = 0.0
    choices = []
    for i, (low, high) in enumerate(zip(least.tolist(), most.tolist())):
        options = best.new_full((high - low + 1, total + 1), -math.inf)
        for row, n in enumerate(range(low, min(high, total) + 1)):
            options[row, n:] = best[: total + 1 - n] + worth[i, n]
        best, row_of_best = options.max(0)
        choices.append(row_of_best + low)
    counts, left = torch.zeros_like(least), total
    for i in range(len(gains) - 1, -1, -1):
        counts[i] = choices[i][left]
        left -= int(counts[i])
    return counts


def _checked(gains: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("gains", gains), ("least", least), ("most", most)):
        if not isinstance(value, Tensor):
            raise ShapeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if gains.dim() != 2 or 0 in gains.shape:
        raise ShapeError(
            f"gains: got shape {tuple(gains.shape)}, expected (N, n_max), both >= 1; is the pool empty?"
        )
    legal = gains.isfinite() & (gains >= 0)
    if not legal.all():
        raise NumericError(f"gains: got {gains[~legal][0].item()}, expected finite numbers >= 0")
    if least.shape != gains.shape[:1] or most.shape != gains.shape[:1]:
        raise ShapeError(
            f"least, most: got shapes {tuple(least.shape)}, {tuple(most.shape)}, expected ({len(gains)},)"
        )
    ordered = (least >= 0) & (least <= most) & (most <= gains.shape[1])
    if not ordered.all():
        i = int((~ordered).nonzero()[0])
        raise ConfigError(
            f"least, most: got {int(least[i])} and {int(most[i])} at prompt {i}, expected "
            f"0 <= least <= most <= {gains.shape[1]}"
        )
    return least.long(), most.long()
