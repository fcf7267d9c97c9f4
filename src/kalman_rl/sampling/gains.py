"""What the next completions of a prompt are worth: pure functions of what a belief knows about the prompt.

Two aims, and no rule serves both. *Gradient*: cut the error of the prompt's policy gradient, which is spent
on prompts with success probability p near 1/2. *Mixed groups*: make the group mixed, so that it teaches anything
under a group baseline, which is spent on hard but solvable prompts. Both read the rewards through the
posterior Beta(a, b) of p.

All arguments broadcast; all results are float64 and detached.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from kalman_rl.checks import is_whole
from kalman_rl.errors import NumericError, ShapeError, quote
from kalman_rl.numerics.kalman import Gaussian

Number = Tensor | float

SMALLEST_EVIDENCE = 0.3
"""Least a + b of a matched Beta: as vague as a pool of mostly hopeless and mostly solved prompts."""
SMALLEST_MEAN = 1e-3
"""A matched Beta has its mean in [1e-3, 1 - 1e-3]: a Gaussian never makes an outcome impossible."""


NINETY = NormalDist().inv_cdf(0.95)
"""Half of the central 90 % interval of a Gaussian in standard deviations."""


def beta_from_moments(value: Gaussian) -> tuple[Tensor, Tensor]:
    """The Beta(a, b) with a belief's mean m and variance P: ``a + b = m (1 - m) / P - 1``, ``a = m (a + b)``.

    A Gaussian belief about a success probability may lie where no Beta does. Then the nearest is taken: the
    mean is clamped to [1e-3, 1 - 1e-3] and a + b to at least 0.3 (an unknown value, P = inf, is Beta(.15,
    .15) around its mean).

    >>> a, b = beta_from_moments(Gaussian(torch.tensor(0.4), torch.tensor(0.04)))
    >>> round(a.item(), 6), round(b.item(), 6)
    (2.0, 3.0)
    """
    mean, variance = _doubles(mean=value.mean, variance=value.variance)
    _expect("value", mean.isfinite() & (variance >= 0), "a finite mean and a variance in [0, inf]", mean)
    mean = mean.clamp(SMALLEST_MEAN, 1 - SMALLEST_MEAN)
    evidence = mean * (1 - mean) / variance.clamp(min=1e-12) - 1
    evidence = evidence.clamp(min=SMALLEST_EVIDENCE)
    return mean * evidence, (1 - mean) * evidence


def beta_signal(a: Number, b: Number) -> Tensor:
    """``E[p (1 - p)] = a b / ((a + b) (a + b + 1))`` in (0, 1/4): the expected variance of one 0/1 reward.

    Raises: NumericError unless a, b > 0.

    >>> beta_signal(1.0, 1.0)
    tensor(0.1667, dtype=torch.float64)
    """
    a, b = beta_parameters(a, b)
    return (a / (a + b)) * (b / (a + b + 1))


def noisy_signal(reward_variance: Number, noise_variance: Number = 0.0) -> Tensor:
    """``max(R - noise, 0)``: what is left of the variance of a prompt's rewards without the scorer's noise.

    The noise variance is not identifiable from single scores; score some completions twice to know it.

    Raises: NumericError for a negative or non-finite variance.
    """
    reward_variance, noise_variance = _doubles(reward_variance=reward_variance, noise_variance=noise_variance)
    for name, value in (("reward_variance", reward_variance), ("noise_variance", noise_variance)):
        _expect(name, value.isfinite() & (value >= 0), "a finite variance >= 0", value)
    return (reward_variance - noise_variance).clamp(min=0.0)


def gradient_gain(signal: Number, n: Number, k: Number = 1) -> Tensor:
    """Expected drop of the variance of a prompt's gradient per completion, if k join the n there are.

    ``signal * (1/n - 1/(n + k)) / k``, with ``signal = E[p (1 - p) | data]`` (:func:`beta_signal`), in
    squared reward units. Without any completion ``1/n`` is taken as 2: to skip a prompt costs what half a
    completion would, so the first completion is worth ``signal``, the second half of it, and gains fall
    throughout.

    Args:
        signal: >= 0. n: completions so far, >= 0. k: completions to add, >= 1.

    Raises: NumericError for a value outside its range.

    >>> gradient_gain(0.25, torch.tensor([0, 2, 8]), 2)
    tensor([0.1875, 0.0312, 0.0031], dtype=torch.float64)
    """
    signal, n, k = _doubles(signal=signal, n=n, k=k)
    _expect("signal", signal.isfinite() & (signal >= 0), "a finite number >= 0", signal)
    _expect_counts(n, k)
    return signal * (1 / n.clamp(min=0.5) - 1 / (n + k)) / k


def mixed_group_gain(a: Number, b: Number, successes: Number, failures: Number, k: int = 1) -> Tensor:
    """Probability that the group becomes mixed within the next k completions, over k; 0 once it is mixed.

    With all successes so far, the next k are all successes too with probability
    ``E[p^k] = prod_{j<k} (a + j) / (a + b + j)``, with all failures ``E[(1 - p)^k]``, and an empty group
    stays uniform with the sum of both. (a, b) is the posterior that has seen the successes and failures.

    Raises: NumericError unless a, b > 0, counts >= 0 and k >= 1.

    >>> mixed_group_gain(1.0, 1.0, 0, 0, k=2)  # two completions differ with probability 1/3
    tensor(0.1667, dtype=torch.float64)
    """
    return remaining_mixed_group_gains(a, b, successes, failures, k).sum(-1) / k


def remaining_mixed_group_gains(a: Number, b: Number, successes: Number, failures: Number, k: int) -> Tensor:
    """The same one by one: probability that the group becomes mixed with exactly the j-th next completion.

    Arguments and errors as :func:`mixed_group_gain`. Returns (..., k); entries fall along the last axis, except
    that the first completion of an empty group mixes nothing.
    """
    if not is_whole(k, 1):
        raise NumericError(f"k: got {quote(k)}, expected a count >= 1")
    a, b = beta_parameters(a, b)
    successes, failures = _doubles(successes=successes, failures=failures)
    _expect("successes", successes >= 0, "a count >= 0", successes)
    _expect("failures", failures >= 0, "a count >= 0", failures)
    # E[p^j (1 - p)] is the probability that the first failure is number j + 1. Nothing cancels in these sums.
    failure, success = _first_change(a, b, k), _first_change(b, a, k)
    from_nothing = torch.cat((torch.zeros_like(failure[..., :1]), (failure + success)[..., 1:]), dim=-1)
    some_success, some_failure = (successes > 0)[..., None], (failures > 0)[..., None]
    gains = torch.where(some_success, failure, torch.where(some_failure, success, from_nothing))
    return torch.where(some_success & some_failure, 0.0, gains)


def _first_change(a: Tensor, b: Tensor, k: int) -> Tensor:
    """``E[p^j (1 - p)]`` for j = 0 .. k - 1 in a new last axis, p ~ Beta(a, b)."""
    j = torch.arange(k, dtype=torch.float64)
    a, b = a[..., None], b[..., None]
    stays = (a + j) / (a + b + j)
    before = torch.cat((torch.ones_like(stays[..., :1]), stays[..., :-1].cumprod(-1)), dim=-1)
    return before * b / (a + b + j)


def beta_parameters(a: Number, b: Number) -> tuple[Tensor, Tensor]:
    """a and b as float64 tensors of one shape. Raises: NumericError unless both are finite and > 0."""
    first, second = _doubles(a=a, b=b)
    for name, value in (("a", first), ("b", second)):
        _expect(name, value.isfinite() & (value > 0), "a finite number > 0", value)
    return first.expand_as(first + second), second.expand_as(first + second)


def _doubles(**values: Number) -> list[Tensor]:
    """The values as float64 tensors on the CPU. Raises: NumericError, ShapeError unless they broadcast together."""
    found = [_double(name, value) for name, value in values.items()]
    try:
        sum(found)  # the shapes of a sum
    except RuntimeError:
        shapes = ", ".join(str(tuple(value.shape)) for value in found)
        raise ShapeError(
            f"{', '.join(values)}: got shapes {shapes}, expected shapes that broadcast"
        ) from None
    return found


def _double(name: str, value: Number) -> Tensor:
    try:
        found = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        fits = not found.is_complex()
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fits = False
    if not fits:
        raise NumericError(f"{name}: got {quote(value, 80)}, expected a number or a tensor of numbers")
    return found.to(device="cpu", dtype=torch.float64)


def _expect_counts(n: Tensor, k: Tensor) -> None:
    _expect("n", n >= 0, "a count >= 0", n)
    _expect("k", k >= 1, "a count >= 1", k)


def _expect(name: str, holds: Tensor, expected: str, value: Tensor) -> None:
    if not holds.all():
        place = tuple((~holds).nonzero()[0].tolist())
        where = f" at {place}" if place else ""
        raise NumericError(f"{name}: got {value.expand_as(holds)[place].item()}{where}, expected {expected}")
