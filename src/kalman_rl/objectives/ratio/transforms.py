"""Ratio transforms: from the observed token log-ratio to the log-weight that multiplies the gradient.

A transform is a callable ``(logp, rollouts) -> Ratio``. Everything here is detached: the weight is a
number, never a path for gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.numerics.kalman import Info, causal_filter
from kalman_rl.objectives.inputs import required
from kalman_rl.objectives.rollouts import Rollouts


class Ratio(NamedTuple):
    """What a transform returns: ``log_ratio`` (B, T) as observed, ``log_weight`` (B, T) as used, both in
    nats and 0 outside the mask, and the filter's ``info`` where there is a filter."""

    log_ratio: Tensor
    log_weight: Tensor
    info: Info | None = None


def token_log_ratio(logp: Tensor, rollouts: Rollouts) -> Tensor:
    """Observed log-ratio ``l_t = logp_t - logp_old_t`` (B, T), detached, 0 outside the mask."""
    return torch.where(rollouts.mask, logp.detach() - rollouts.logp_old, 0.0)


def token(logp: Tensor, rollouts: Rollouts) -> Ratio:
    """Token ratio: ``s_t = l_t``. Source: PPO (arXiv 1707.06347), GRPO (arXiv 2402.03300)."""
    log_ratio = token_log_ratio(logp, rollouts)
    return Ratio(log_ratio, log_ratio)


def behaviour(rollouts: Rollouts) -> Tensor:
    """Log-probabilities (B, T) under the behaviour policy; ConfigError if the rollouts have none."""
    return required("logp_behaviour", rollouts.logp_behaviour, "a ratio to the behaviour policy")


@dataclass(frozen=True)
class BehaviourToken:
    """Token ratio to the behaviour policy instead of the old policy: ``s_t = logp_t - logp_behaviour_t``.

    It covers policy drift and the mismatch of an inference engine at once, so no importance correction goes
    with it. Needs: ``logp_behaviour``. Source: DPPO (arXiv 2602.04879).
    """

    inputs: ClassVar[tuple[str, ...]] = ("logp_behaviour",)

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Ratio:
        log_ratio = torch.where(rollouts.mask, logp.detach() - behaviour(rollouts), 0.0)
        return Ratio(log_ratio, log_ratio)


@dataclass(frozen=True)
class Lagged:
    """Token ratio to the policy of one step ago, guessed between the behaviour policy and the current one.

        log pi_near = log mu + a (log pi - log mu),   a = (k - 1) / k for a lag of k steps
        s_t = log pi - log pi_near = l_t / max(k, 1),   l_t = logp_t - logp_behaviour_t

    No forward pass is spent on the old policy. :class:`kalman_rl.objectives.trust.Decoupled` takes back the rest.
    Needs: ``logp_behaviour``, ``lag``. Source: A-3PO (arXiv 2512.06547), log-linear.
    """

    inputs: ClassVar[tuple[str, ...]] = ("logp_behaviour", "lag")

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Ratio:
        lag = required("lag", rollouts.lag, "a ratio to a policy between two versions").to(logp.dtype)
        log_ratio = torch.where(rollouts.mask, logp.detach() - behaviour(rollouts), 0.0)
        return Ratio(log_ratio, log_ratio / lag.clamp(min=1.0))


def one(logp: Tensor, rollouts: Rollouts) -> Ratio:
    """Ratio := 1, ``s_t = 0``: plain policy gradient, and the control for every claim about ratios."""
    log_ratio = token_log_ratio(logp, rollouts)
    return Ratio(log_ratio, torch.zeros_like(log_ratio))


def sequence_mean(logp: Tensor, rollouts: Rollouts) -> Ratio:
    """Sequence ratio: ``s_t = (1/n_i) sum_{u in i} l_u`` at every token of sequence i.

    Source: GSPO (arXiv 2507.18071). GSPO's gradient spreads ``s_i / n_i`` over the tokens, which is this
    log-weight under :func:`kalman_rl.objectives.aggregate.sequence_mean`.
    """
    log_ratio = token_log_ratio(logp, rollouts)
    mean = rollouts.per_sequence_sum(log_ratio) / rollouts.lengths
    return Ratio(log_ratio, torch.where(rollouts.mask, mean, 0.0))


@dataclass(frozen=True)
class PrefixMinimum:
    """Token ratio times the smallest earlier ratio: ``s_t = l_t + min_{u < t} l_u``, ``s_1 = l_1``.

    A stand-in for the prefix ratio ``prod_{u <= t} w_u`` that does not grow with t; equal to it for two
    tokens. The minimum of n noisy terms drifts down like ``-sigma sqrt(2 log n)``, so late tokens fade.

    Args:
        inclusive: let the minimum run over ``u <= t``; then the first token's factor is its own ratio,
            ``s_1 = 2 l_1``.
        capped: never let the factor exceed 1, ``min(0, .)``.

    Source: MinPRO (arXiv 2601.22718), from its abstract: inclusive and capped are not settled there. Holes
    and padding do not enter the minimum; packed sequences start anew.
    """

    inclusive: bool = False
    capped: bool = False

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Ratio:
        log_ratio = token_log_ratio(logp, rollouts)
        lowest = torch.where(rollouts.mask, log_ratio, math.inf)
        sequence = rollouts.sequence_index
        if not self.inclusive:
            lowest = _shifted(lowest, 1, sequence)
        shift = 1
        while shift < lowest.shape[1]:  # each round doubles how far back the minimum reaches
            lowest = torch.minimum(lowest, _shifted(lowest, shift, sequence))
            shift *= 2
        lowest = torch.where(lowest == math.inf, 0.0, lowest)
        if self.capped:
            lowest = lowest.clamp(max=0.0)
        return Ratio(log_ratio, torch.where(rollouts.mask, log_ratio + lowest, 0.0))


def _shifted(values: Tensor, by: int, sequence: Tensor) -> Tensor:
    """Values (B, T) of ``by`` positions earlier in the same sequence; inf where there is none."""
    out = torch.full_like(values, math.inf)
    same = sequence[:, by:] == sequence[:, :-by]
    out[:, by:] = torch.where(same, values[:, :-by], math.inf)
    return out


@dataclass(frozen=True)
class KalmanFiltered:
    """Causally filtered ratio: ``s_t = x_t``, the posterior mean of a random walk seen through noise.

        x_t = x_{t-1} + w_t,  Var w = Q;    l_t = x_t + v_t,  Var v = R;    x_0 ~ N(0, P0)

    One dial between known methods: ``Q -> inf`` is the token ratio (GRPO); ``Q = 0, P0 = inf`` is the
    running mean, which ends in GSPO's sequence ratio; ``Q = P0 = 0`` is ratio 1.

    Args:
        process_noise: Q >= 0 (nats^2 per token), how much the true log-ratio may move in one token.
        observation_noise: R > 0 (nats^2), how noisy one token's log-ratio is.
        initial_variance: P0 >= 0 or inf. 0 pins the start to ratio 1 (as published); inf (a diffuse start)
            believes the first token.

    Raises:
        NumericError: a variance is negative or NaN, or R is not positive and finite.

    Source: KPO (arXiv 2602.10609). Deviations: mask holes are missing observations instead of zeros,
    padding and packing do not shift the gain, P0 is a choice, and the recursion is exact for every Q/R.
    """

    process_noise: float = 1e-6
    observation_noise: float = 1.0
    initial_variance: float = 0.0

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("process_noise", self.process_noise, self.process_noise >= 0),
            ("observation_noise", self.observation_noise, 0 < self.observation_noise < math.inf),
            ("initial_variance", self.initial_variance, self.initial_variance >= 0),
        ):
            if not legal:
                limits = "0 < R < inf" if name == "observation_noise" else "0 <= value <= inf"
                raise NumericError(f"{name}: got {quote(value)}, expected {limits} (a variance, in nats^2)")

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Ratio:
        log_ratio = token_log_ratio(logp, rollouts)
        state, info = causal_filter(
            log_ratio,
            rollouts.mask,
            process_noise=self.process_noise,
            observation_noise=self.observation_noise,
            initial_variance=self.initial_variance,
            segment=rollouts.segment,
        )
        return Ratio(log_ratio, torch.where(rollouts.mask, state.mean, 0.0), info)

    def time_constants(self, tokens: float) -> float:
        """``s = T sqrt(Q/R)``: how many filter time constants fit into a completion of T tokens.

        With a zero start, ``s < 0.5`` means the filter never leaves ratio 1 and the method is plain
        policy gradient without a ratio.

        >>> KalmanFiltered(1e-6, 1.0).time_constants(100)
        0.1
        """
        return tokens * math.sqrt(self.process_noise / self.observation_noise)
