"""Advantages from a Kalman filter that runs over the rewards of a batch in their order, as published.

Both filters restart from their prior at every call and keep nothing. What is wrong with them is measured in
``tests/methods/test_unbiased.py``; beliefs that outlive the batch and do not depend on order are in ``belief``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kalman_rl.checks import is_real
from kalman_rl.errors import NumericError, quote
from kalman_rl.numerics.kalman import causal_filter
from kalman_rl.objectives.advantage.group import known_rewards, only_known


@dataclass(frozen=True)
class GroupFilter:
    """A scalar filter over the rewards of each group, in the order given.

        K_n, m_n, P_n: random walk with Q, R from N(0, P0), one reward a step
        A_n = (r_n - m_n) / (sqrt(P_n) + epsilon)          the posterior after r_n

    Because ``sqrt(P_n)`` is the deviation of the mean and shrinks with n, the weight of a completion grows
    with its place in the list (by 310 from first to twelfth at the published constants); A is not centred,
    and equal rewards do not give 0. Under a sum over tokens, or one with a constant divisor, the expected
    gradient keeps its direction; a mean over a completion's own tokens turns it, as it does for any baseline.

    With ``invariant`` no order enters, and no own reward: the baseline is the posterior given all *other*
    rewards of the group, ``A_n = (r_n - m_{-n}) / sqrt(P_{-n} + R)``, with no process noise inside the group.

    Args:
        process_noise: Q >= 0. observation_noise: R > 0. initial_variance: P0 > 0, all finite.
        invariant: see above.

    Raises: NumericError for a value outside its range.
    Source: KRPO (arXiv 2505.07527) as published; ``invariant`` is ours.
    """

    process_noise: float = 1e-5
    observation_noise: float = 1e-2
    initial_variance: float = 1.0
    invariant: bool = False
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _check(self, "process_noise", lambda v: v >= 0, "a finite variance >= 0")
        _check(self, "observation_noise", lambda v: v > 0, "a finite variance > 0")
        _check(self, "initial_variance", lambda v: v > 0, "a finite variance > 0")
        _check(self, "epsilon", lambda v: v >= 0, "a finite number >= 0")

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        filled, known = known_rewards(reward, group)
        if self.invariant:
            baseline, variance = self._given_the_others(filled, known, group)
            return only_known((filled - baseline) / (variance + self.observation_noise).sqrt(), reward)
        order = torch.argsort(group, stable=True)  # each group's rewards side by side, order kept
        order = order[known[order]]
        advantage = torch.zeros_like(filled)
        if len(order):
            row = filled[order][None]
            state = causal_filter(
                row,
                torch.ones_like(row, dtype=torch.bool),
                process_noise=self.process_noise,
                observation_noise=self.observation_noise,
                initial_variance=self.initial_variance,
                segment=group[order][None],
            ).state
            advantage[order] = ((row - state.mean) / (state.variance.sqrt() + self.epsilon))[0]
        return only_known(advantage, reward)

    def _given_the_others(self, filled: Tensor, known: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance (B,) of each completion's group given the rewards of the others."""
        others = (group[:, None] == group[None, :]) & known[None, :]
        others &= ~torch.eye(len(filled), dtype=torch.bool, device=filled.device)
        total = torch.where(others, filled[None, :], 0.0).sum(1)  # never holds the own reward
        precision = 1 / self.initial_variance + others.sum(1).double() / self.observation_noise
        return total / self.observation_noise / precision, 1 / precision


@dataclass(frozen=True)
class BatchFilter:
    """A scalar filter over all rewards of the batch in the order given, as a normaliser.

        A_n = (r_n - m_n) / (sqrt(P_n) + epsilon)          running; with ``final`` the last m and P for all n
        R <- adapt R + (1 - adapt) nu_n^2                  after each reward, if adapt < 1

    Args:
        process_noise: Q >= 0. observation_noise: R > 0 at the start. initial_variance: P0 > 0.
        adapt: in (0, 1]; 1 leaves R alone (paper), 0.9 is published code. The rule counts P twice.
        final: normalise with the state after the last reward (published code).

    Raises: NumericError for a value outside its range.
    Source: K-Score (arXiv 2604.23056), whose stream is the discounted returns of an episode; here it is the
    outcome rewards of the batch. It depends on order and is not centred.
    """

    process_noise: float = 1e-2
    observation_noise: float = 1e-1
    initial_variance: float = 1.0
    adapt: float = 1.0
    final: bool = False
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _check(self, "process_noise", lambda v: v >= 0, "a finite variance >= 0")
        _check(self, "observation_noise", lambda v: v > 0, "a finite variance > 0")
        _check(self, "initial_variance", lambda v: v > 0, "a finite variance > 0")
        _check(self, "adapt", lambda v: 0 < v <= 1, "a number in (0, 1]")
        _check(self, "epsilon", lambda v: v >= 0, "a finite number >= 0")

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        filled, known = known_rewards(reward, group)
        mean, variance, noise = 0.0, self.initial_variance, self.observation_noise
        means, variances = [], []
        for value, given in zip(filled.tolist(), known.tolist()):
            if given:
                variance += self.process_noise
                gain = variance / (variance + noise)
                innovation = value - mean
                mean, variance = mean + gain * innovation, gain * noise  # 1 - gain would cancel
                surprise = min(innovation * innovation, sys.float_info.max)
                noise = self.adapt * noise + (1 - self.adapt) * surprise
                if noise + variance == 0:  # equal rewards from the start: nothing left to divide by
                    noise = self.observation_noise
            means.append(mean)
            variances.append(variance)
        if self.final and means:
            means, variances = means[-1:] * len(means), variances[-1:] * len(variances)
        center = filled.new_tensor(means).reshape(filled.shape)
        scale = filled.new_tensor(variances).reshape(filled.shape).sqrt() + self.epsilon
        return only_known((filled - center) / scale, reward)


def _check(part: object, name: str, legal: Callable[[float], bool], expected: str) -> None:
    value = getattr(part, name)
    if not (is_real(value) and legal(value) and math.isfinite(value)):
        raise NumericError(f"{name}: got {quote(value, 80)}, expected {expected}")
