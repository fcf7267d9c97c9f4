"""Importance corrections for a behaviour policy that is not the old policy: a detached factor per token.

    d_t = logp_old_t - logp_behaviour_t        level token:     D = d_t
                                               level sequence:  D = sum_u d_u      of the token's sequence
                                               level geometric: D = mean_u d_u

:class:`Truncated` weighs by ``min(exp D, cap)``, :class:`Masked` by ``exp D`` in a band and 0 outside, and
:class:`FilteredTruncated` as Truncated by a filtered d. :class:`Rejected` weighs nothing: 1 in a band, 0 outside;
:class:`TruncatedRejected` is both. The factor multiplies coefficient and surrogate of every objective; denominators
keep their counts, and penalties are left alone. A method whose ratio is already taken to the behaviour policy refuses
a correction.

Source: truncated importance sampling, its masked variants and rejection as in TRL 1.16 and verl 0.9.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, quote
from kalman_rl.numerics.kalman import causal_filter
from kalman_rl.objectives.inputs import required
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.objectives.trust.clip import LOG_WEIGHT_CAP, weight_of

Level = Literal["token", "sequence", "geometric"]
Statistic = Literal["k1", "k2", "k3"]
Over = Literal["token", "sum", "mean", "max"]


def mismatch(rollouts: Rollouts, level: Level) -> Tensor:
    """D (B, T) of the module's formula, nats, detached; 0 outside the mask.

    Args: rollouts: with ``logp_behaviour``. level: "token", "sequence" or "geometric".
    Raises: ConfigError for another level, or rollouts without the behaviour policy's log-probabilities.
    """
    _check_level(level)
    behaviour = required("logp_behaviour", rollouts.logp_behaviour, "an importance correction")
    difference = rollouts.logp_old - behaviour
    if level == "token":
        return difference
    total = rollouts.per_sequence_sum(difference)
    if level == "geometric":
        total = total / rollouts.lengths
    return torch.where(rollouts.mask, total, 0.0)


def _check_level(level: str) -> None:
    if level not in get_args(Level):
        raise ConfigError(f"level: got {quote(level)}, expected one of {', '.join(get_args(Level))}")


@dataclass(frozen=True)
class Truncated:
    """``min(exp D, cap)``: tokens the behaviour policy found too unlikely count at most ``cap`` times.

    Args:
        cap: > 0; 2 in verl.
        level: of the module's formula.

    Needs: ``logp_behaviour``. Raises: NumericError, ConfigError for a value outside its range.
    """

    cap: float = 2.0
    level: Level = "token"
    inputs: ClassVar[tuple[str, ...]] = ("logp_behaviour",)

    def __post_init__(self) -> None:
        _check_level(self.level)
        if not self.cap > 0:
            raise NumericError(f"cap: got {quote(self.cap)}, expected an upper bound > 0 of the weight")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return weight_of(mismatch(rollouts, self.level)).clamp(max=self.cap)


@dataclass(frozen=True)
class Masked:
    """``exp D`` where ``low <= exp D <= high``, else 0: what drifted too far is left out.

    Args:
        low, high: 0 <= low <= high, high > 0, bounds of the weight itself.
        level: of the module's formula; verl's geometric band is 0.999 to 1.001.

    Needs: ``logp_behaviour``. Raises: NumericError, ConfigError for a value outside its range.
    """

    low: float = 0.5
    high: float = 2.0
    level: Level = "token"
    inputs: ClassVar[tuple[str, ...]] = ("logp_behaviour",)

    def __post_init__(self) -> None:
        _check_level(self.level)
        if not (0 <= self.low <= self.high and self.high > 0 and self.low < math.inf):
            raise NumericError(
                f"low, high: got {quote(self.low)}, {quote(self.high)}, expected 0 <= low <= high and high > 0"
            )

    def __call__(self, rollouts: Rollouts) -> Tensor:
        weight = weight_of(mismatch(rollouts, self.level))
        return torch.where((weight >= self.low) & (weight <= self.high), weight, 0.0)


def icepop(low: float = 0.5, high: float = 5.0) -> Masked:
    """IcePop: a token's own weight in [low, high], else 0. Source: arXiv 2510.18855, as in verl ("0.5_5.0")."""
    return Masked(low, high, "token")


@dataclass(frozen=True)
class FilteredTruncated:
    """``min(exp x_t, cap)``, x the mismatch d filtered along the sequence: rounding averages out before it is cut off.

        x_t = x_{t-1} + w_t,  Var w = Q;    d_t = x_t + v_t,  Var v = R;    diffuse start

    Args:
        noise_ratio: Q / R >= 0. inf: x = d, truncation at the token; 0: the mean of d so far, at the last token the
            geometric level.
        cap: > 0.

    Needs: ``logp_behaviour``. Raises: NumericError for a value outside its range.
    Source: ours. Mismatch of weights is no noise; then :class:`Truncated` is better (docs/evidence.md, mismatch).
    """

    noise_ratio: float = 0.1
    cap: float = 2.0
    inputs: ClassVar[tuple[str, ...]] = ("logp_behaviour",)

    def __post_init__(self) -> None:
        Truncated(self.cap)
        if not self.noise_ratio >= 0:
            raise NumericError(f"noise_ratio: got {quote(self.noise_ratio)}, expected Q / R >= 0, or inf")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        state, _ = causal_filter(
            mismatch(rollouts, "token"),
            rollouts.mask,
            process_noise=self.noise_ratio,
            observation_noise=1.0,
            initial_variance=math.inf,
            segment=rollouts.segment,
        )
        return weight_of(torch.where(rollouts.mask, state.mean, 0.0)).clamp(max=self.cap)


@dataclass(frozen=True)
class Rejected:
    """1 where ``-low <= K <= high``, else 0: a token or a whole sequence that drifted is left out, none is weighted.

        k1 = -d,   k2 = d^2 / 2,   k3 = e^d - 1 - d;     K = k of the token, or its sum, mean or max over the sequence

    Args:
        statistic: k1, k2 or k3: estimates of KL(behaviour || old) in nats, k1 signed.
        over: token, sum, mean or max; max not with k1, whose sign tells two directions.
        high, low: >= 0 in nats; ``low`` matters to k1 only.

    Log-ratios are held in [-20, 20]. verl's bounds of k1 are ratios: ``high = log upper``, ``low = -log lower``.
    Needs: ``logp_behaviour``. Raises: NumericError, ConfigError for a value outside its range.
    """

    statistic: Statistic = "k3"
    over: Over = "mean"
    high: float = 0.01
    low: float = math.inf
    inputs: ClassVar[tuple[str, ...]] = ("logp_behaviour",)

    def __post_init__(self) -> None:
        for name, kinds in (("statistic", Statistic), ("over", Over)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise ConfigError(f"{name}: got {quote(getattr(self, name))}, expected one of {known}")
        if (self.statistic, self.over) == ("k1", "max"):
            raise ConfigError("over: got 'max' with statistic 'k1', expected k2 or k3 because k1 has a sign")
        for name in ("low", "high"):
            if not getattr(self, name) >= 0:
                raise NumericError(f"{name}: got {getattr(self, name)}, expected a bound >= 0 in nats")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        d = mismatch(rollouts, "token").clamp(-LOG_WEIGHT_CAP, LOG_WEIGHT_CAP)
        value = {"k1": -d, "k2": d.square() / 2, "k3": torch.expm1(d) - d}[self.statistic]
        if self.over in ("sum", "mean"):
            value = rollouts.per_sequence_sum(value)
        if self.over == "mean":
            value = value / rollouts.lengths.clamp(min=1.0)
        if self.over == "max":
            value = torch.where(rollouts.mask, value, 0.0)  # sizes: nothing is below 0
            index = rollouts.sequence_index.flatten()
            largest = value.new_zeros(value.numel()).scatter_reduce(0, index, value.flatten(), "amax")
            value = largest[index].reshape(value.shape)
        return ((value >= -self.low) & (value <= self.high)).to(value.dtype)


@dataclass(frozen=True)
class TruncatedRejected:
    """``min(exp D, cap)`` where the rejection's K is in its band, else 0: what is kept is weighed, once.

    Args: as of the two parts: ``cap``, ``level`` of :class:`Truncated`, the others of :class:`Rejected`.

    Needs: ``logp_behaviour``. Raises: NumericError, ConfigError as the parts do.
    Source: verl's ``rollout_is`` with ``rollout_rs``; verl's rejected tokens leave the denominators, ours are counted.
    """

    cap: float = 2.0
    level: Level = "token"
    statistic: Statistic = "k3"
    over: Over = "mean"
    high: float = 0.01
    low: float = math.inf
    inputs: ClassVar[tuple[str, ...]] = ("logp_behaviour",)

    def __post_init__(self) -> None:
        self._parts()

    def _parts(self) -> tuple[Truncated, Rejected]:
        return Truncated(self.cap, self.level), Rejected(self.statistic, self.over, self.high, self.low)

    def __call__(self, rollouts: Rollouts) -> Tensor:
        weight, rejection = self._parts()
        return weight(rollouts) * rejection(rollouts)


CORRECTIONS: dict[str, Callable[..., Callable[[Rollouts], Tensor]]] = {
    "truncated": Truncated,
    "masked": Masked,
    "icepop": icepop,
    "filtered": FilteredTruncated,
    "rejected": Rejected,
    "truncated_rejected": TruncatedRejected,
}
"""Corrections by name, for configuration files."""
