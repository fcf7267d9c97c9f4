"""Allocation before sampling: how many completions each prompt gets, from what is believed now.

The counts depend on the past only, so a group's size is independent of its rewards, and the mean over each
group is an exactly unbiased gradient. Sampling in rounds (``rounds``) saves more and needs a weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from kalman_rl.beliefs.groups import expect_names, places_of
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.checks import is_whole
from kalman_rl.errors import ConfigError, quote
from kalman_rl.sampling.budget import check_aim
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.divide import Allocation, divide, gradient_gains, mixed_group_gains
from kalman_rl.sampling.learnability import Signal, read_signal
from kalman_rl.sampling.price import Price

TIE_BREAK = 1e-9
"""Weight of the gradient gain for mixed groups: decides where no group can become mixed any more."""


def allocate(
    belief: Belief,
    ids: Sequence[Hashable],
    *,
    step: int,
    total: int | None = None,
    price: Price | None = None,
    aim: str = "gradient",
    n_min: int = 2,
    n_max: int = 32,
    features: Tensor | None = None,
    reward_range: str = "unit",
    reward_noise_variance: float = 0.0,
    coverage: Coverage | None = None,
) -> Allocation:
    """Divide a budget among prompts before any of them is sampled.

    Args:
        belief: read, not changed.
        ids: N different prompt ids.
        step: the current step.
        total: completions in all, every one of which is used; or
        price: a :class:`~kalman_rl.sampling.price.Price` for a budget that holds on average. It is updated.
        aim: "gradient" (spend near p = 1/2) or "mixed_groups" (spend on hard but solvable prompts).
        n_min, n_max: completions per prompt, 0 <= n_min <= n_max; with n_min 0 prompts can be skipped.
        features: None or (N, F).
        reward_range, reward_noise_variance: see :func:`~kalman_rl.sampling.learnability.read_signal`.
        coverage: prompts that are due get at least 1 completion ("mixed_groups": 2, one alone is never mixed). Where
            ``total`` cannot pay for all of them, those that wait longest do. Visits are noted in it.

    Returns:
        :class:`~kalman_rl.sampling.divide.Allocation` with counts (N,) in the order of ids.

    Raises:
        ConfigError: an option is out of range, an id comes twice, the pool is empty, or no counts fit.
        ShapeError: ids are no list of names, or features have another shape.
    """
    check_aim(aim, reward_range)
    check_bounds(ids, n_min, n_max)
    check_books(price, coverage)
    if (total is None) == (price is None):
        raise ConfigError(
            f"total, price: got {quote(total)} and {quote(price)}, expected exactly one of them"
        )
    signal = read_signal(
        belief,
        ids,
        step=step,
        features=features,
        reward_range=reward_range,
        reward_noise_variance=reward_noise_variance,
    )
    gains = gain_table(signal, aim, n_max)
    least = least_counts(ids, step, n_min, n_max, total, aim, coverage)
    most = torch.full_like(least, n_max)
    if total is not None:
        allocation = divide(gains, total, least, most)
    else:
        assert price is not None
        allocation = price.divide(gains, least, most)
        price.update(allocation.counts.double().mean().item(), len(ids))
    if coverage is not None:
        coverage.visit([name for name, n in zip(ids, allocation.counts.tolist()) if n], step=step)
    return allocation


def gain_table(signal: Signal, aim: str, n_max: int) -> Tensor:
    """(N, n_max) gains from an empty group, for :func:`~kalman_rl.sampling.divide.divide`."""
    gradient = gradient_gains(signal.variance, n_max)
    if aim == "gradient" or signal.a is None or signal.b is None:
        return gradient
    tie_break = gradient.clone()
    tie_break[:, 0] = 0.0
    return mixed_group_gains(signal.a, signal.b, n_max) + TIE_BREAK * tie_break


def least_counts(
    ids: Sequence[Hashable],
    step: int,
    n_min: int,
    n_max: int,
    total: int | None,
    aim: str,
    coverage: Coverage | None,
) -> Tensor:
    """(N,) int64: what each prompt must get, with those that are due raised to one visit."""
    least = torch.full((len(ids),), n_min, dtype=torch.long)
    visit = min(max(n_min, 2 if aim == "mixed_groups" else 1), n_max)
    if coverage is None or visit == n_min:
        return least
    limit = None
    if total is not None:
        free = total - n_min * len(ids)
        limit = min(free, max(int(coverage.share * free), visit - n_min)) // (visit - n_min)
    return torch.where(coverage.due(ids, step=step, limit=limit), visit, least)


def check_bounds(ids: Sequence[Hashable], n_min: int, n_max: int) -> None:
    """Refuse an empty pool, repeated ids and bounds out of order. Raises: ConfigError, ShapeError for no ids."""
    expect_names(ids)
    if not len(ids):
        raise ConfigError("ids: got an empty pool, expected at least one prompt")
    names, places = places_of(ids)
    if len(names) != len(ids):
        twice = next(name for name, place in names.items() if places.count(place) > 1)
        raise ConfigError(
            f"ids: got prompt {quote(twice)} twice, expected every prompt once; counts are per prompt"
        )
    if not (is_whole(n_min) and is_whole(n_max, max(n_min, 1))):
        raise ConfigError(
            f"n_min, n_max: got {quote(n_min)}, {quote(n_max)}, expected integers 0 <= n_min <= n_max and n_max >= 1"
        )


def check_books(price: Price | None, coverage: Coverage | None) -> None:
    """Refuse a number where the object that is kept from step to step is meant. Raises: ConfigError."""
    if not isinstance(price, Price | None):
        raise ConfigError(
            f"price: got {quote(price)}, expected a Price; with a mean number per prompt, Price(budget)"
        )
    if not isinstance(coverage, Coverage | None):
        raise ConfigError(f"coverage: got {quote(coverage)}, expected a Coverage, e.g. Coverage(every)")
