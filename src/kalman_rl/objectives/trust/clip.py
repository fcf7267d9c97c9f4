"""Trust regions: which tokens keep their gradient, and with what weight.

A trust region is a callable ``(ratio, advantage, current, rollouts) -> Trust``, everything (B, T) and
detached. It turns the log-weight into the coefficient ``c_t = keep_t * weight_t`` and reports the surrogate
loss that TRL and verl would print, so that curves can be compared. Those that look at more than the ratio
have separate files: ``divergence`` (DPPO, VACO), ``prefix`` (CPPO), ``balance`` (BAPO), ``moment`` (M2PO),
``curvature`` (CAPO).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts

LOG_WEIGHT_CAP = 20.0
"""Log-weights above this are capped before ``exp`` (float32 overflows at 88.7); the share is logged."""


class Trust(NamedTuple):
    """``keep`` (B, T) bool, ``weight`` (B, T), ``surrogate`` (B, T) loss per token; all detached.

    The weight may be any finite number: negative, it pushes a token against its advantage."""

    keep: Tensor
    weight: Tensor
    surrogate: Tensor


TrustRegion = Callable[[Ratio, Tensor, Current, Rollouts], Trust]


def weight_of(log_weight: Tensor) -> Tensor:
    """``w = exp(min(s, 20))`` (B, T)."""
    return log_weight.clamp(max=LOG_WEIGHT_CAP).exp()


def unclipped(ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
    """Keep every token at its weight: ``loss_t = -A w_t``. Source: importance-weighted policy gradient."""
    weight = weight_of(ratio.log_weight)
    return Trust(everything(weight), weight, -advantage * weight)


def log_likelihood(ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
    """Keep every token at its weight and report ``loss_t = -A w_t logp_t``. Source: the score function."""
    weight = weight_of(ratio.log_weight)
    return Trust(everything(weight), weight, -advantage * weight * current.logp)


def everything(weight: Tensor) -> Tensor:
    """A mask that keeps every token (B, T)."""
    return torch.ones_like(weight, dtype=torch.bool)


@dataclass(frozen=True)
class Clip:
    """PPO's one-sided clip on the weight, with optional dual clip.

        loss_t = max(-A w_t, -A clip(w_t, 1 - low, 1 + high));   A < 0 and dual:  min(loss_t, -A dual)

    so a token loses its gradient when it already moved as far as allowed in the direction its advantage
    asks for (or, with dual clip, when w_t > dual and A < 0).

    Args:
        low, high: >= 0, the band [1 - low, 1 + high] of the weight.
        dual: None, or a bound > 1 for negative advantages.

    Raises: NumericError for a value outside its range.
    Source: PPO (arXiv 1707.06347), clip-higher DAPO (arXiv 2503.14476), dual clip (arXiv 1912.09729).
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if not value >= 0:
                raise NumericError(f"{name}: got {quote(value)}, expected a clip distance >= 0 from ratio 1")
        if self.dual is not None and not self.dual > 1:
            raise NumericError(
                f"dual: got {quote(self.dual)}, expected a bound > 1, or None to switch it off"
            )

    @property
    def bounds(self) -> dict[str, float]:
        """The ends of the band, as weights."""
        return {"low": 1 - self.low, "high": 1 + self.high}

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        weight = weight_of(ratio.log_weight)
        low, high = self.bounds["low"], self.bounds["high"]
        drop = ((advantage > 0) & (weight > high)) | ((advantage < 0) & (weight < low))
        surrogate = torch.maximum(-advantage * weight, -advantage * weight.clamp(low, high))
        if self.dual is not None:
            drop |= (advantage < 0) & (weight > self.dual)
            bounded = torch.minimum(surrogate, -advantage * self.dual)
            surrogate = torch.where(advantage < 0, bounded, surrogate)
        return Trust(~drop, weight, surrogate)


@dataclass(frozen=True)
class Cap:
    """Keep every token, with its weight clamped: ``loss_t = -A sg(clamp(w_t, low, high)) logp_t``.

    Args:
        high: absolute upper bound of the weight (> 0). TRL calls this ``epsilon_high`` (5.0); verl's
            ``clip_ratio_high`` is the distance from 1, so pass ``1 + clip_ratio_high``.
        low: absolute lower bound (>= 0); 0 means none.

    Raises: NumericError for a value outside its range.
    Source: CISPO (MiniMax-M1, arXiv 2506.13585).
    """

    high: float = 5.0
    low: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.high and self.high > 0 and self.low < math.inf):
            raise NumericError(
                f"low, high: got {quote(self.low)}, {quote(self.high)}, expected 0 <= low <= high and high > 0"
            )

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        weight = weight_of(ratio.log_weight).clamp(self.low, self.high)
        return Trust(everything(weight), weight, -advantage * weight * current.logp)


@dataclass(frozen=True)
class Band:
    """Keep a token while its log-weight lies in ``[-low, high]``, whatever its advantage: ``loss_t = -A w_t``, else 0.

    Args:
        low, high: >= 0 in nats; inf for no bound.

    Raises: NumericError for a value outside its range.
    Source: hard rejection, as in IcePop (arXiv 2510.18855) and M2PO (arXiv 2510.01161).
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if not value >= 0:
                raise NumericError(
                    f"{name}: got {quote(value)}, expected a distance >= 0 of the log-weight from 0"
                )

    @property
    def bounds(self) -> dict[str, float]:
        """The ends of the band, as log-weights."""
        return {"low": -self.low, "high": self.high}

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        keep = (ratio.log_weight >= -self.low) & (ratio.log_weight <= self.high)
        weight = weight_of(ratio.log_weight)
        return Trust(keep, weight, -advantage * torch.where(keep, weight, 0.0))


@dataclass(frozen=True)
class GeometricClip:
    """Geometric mean of token ratios, each clipped in log space before the mean.

        z_t = min(l_t, high) if A > 0, max(l_t, -low) if A < 0;    w = exp(sum_t z_t / n);    loss = -A w

    A clipped token loses its gradient, the others keep the sequence's weight; under
    :func:`kalman_rl.objectives.aggregate.sequence_mean` that is the derivative ``w / n`` of the geometric mean.

    Args:
        low, high: >= 0 in nats, the band of a token's log-ratio.

    Raises: NumericError for a value outside its range.
    Source: GMPO (arXiv 2507.20673). Deviation: A may differ between tokens; published code averages it.
    """

    low: float = 0.4
    high: float = 0.4

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if not value >= 0:
                raise NumericError(
                    f"{name}: got {quote(value)}, expected a clip distance >= 0 of the log-ratio"
                )

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        log_ratio = ratio.log_ratio
        drop = ((advantage > 0) & (log_ratio > self.high)) | ((advantage < 0) & (log_ratio < -self.low))
        clipped = torch.where(drop, log_ratio.clamp(-self.low, self.high), log_ratio)
        mean = rollouts.per_sequence_sum(clipped) / rollouts.lengths
        weight = weight_of(torch.where(rollouts.mask, mean, 0.0))
        return Trust(~drop, weight, -advantage * weight)


@dataclass(frozen=True)
class SoftGate:
    """A sigmoid gate on the ratio instead of a clip: the gradient fades smoothly away from ratio 1.

        f(w) = (4 / tau) g,  g = sigmoid(tau (w - 1));    loss_t = -A f(w_t);    c_t = 4 g (1 - g) w_t

    so ``c = 1`` at ratio 1, and ``tau -> 0`` is the unclipped token ratio.

    Args:
        positive, negative: temperature tau > 0 for A > 0 and for A <= 0.

    Raises: NumericError for a value outside its range.
    Source: SAPO (arXiv 2511.20347).
    """

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise NumericError(f"{name}: got {quote(value)}, expected a temperature > 0, finite")

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        tau = torch.full_like(advantage, self.negative).masked_fill(advantage > 0, self.positive)
        weight = weight_of(ratio.log_weight)
        gate = torch.sigmoid(tau * (weight - 1))
        return Trust(everything(weight), 4 * gate * (1 - gate) * weight, -advantage * 4 / tau * gate)
