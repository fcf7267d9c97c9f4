"""Importance corrections for a behaviour policy that is not the old policy: a detached factor per token.

    d_t = logp_old_t - logp_behaviour_t        level token:     D = d_t
                                               level sequence:  D = sum_u d_u      of the token's sequence
                                               level geometric: D = mean_u d_u

:class:`Truncated` weights by ``min(exp D, cap)``, :class:`Masked` by ``exp D`` in a band and 0 outside.
The factor multiplies coefficient and surrogate of every objective; denominators keep their counts, and
penalties are left alone. A method whose ratio is already taken to the behaviour policy refuses a correction.

Source: truncated importance sampling and its masked variants as in TRL 1.16 and verl 0.9.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.objectives.inputs import required
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.objectives.trust.clip import weight_of

Level = Literal["token", "sequence", "geometric"]


def mismatch(rollouts: Rollouts, level: Level) -> Tensor:
    """D (B, T) of the module's formula, nats, detached; 0 outside the mask.

    Args: rollouts: with ``logp_behaviour``. level: "token", "sequence" or "geometric".
    Raises: ConfigError for another level, or rollouts without the behaviour policy's log-probabilities.
    """
    _check_level(level)
    behaviour = required("logp_behaviour", rollouts.logp_behaviour, "an importance correction")
    difference = torch.where(rollouts.mask, rollouts.logp_old - behaviour, 0.0)
    if level == "token":
        return difference
    total = rollouts.per_sequence_sum(difference)
    if level == "geometric":
        total = total / rollouts.lengths.clamp(min=1.0)
    return torch.where(rollouts.mask, total, 0.0)


def _check_level(level: str) -> None:
    if level not in get_args(Level):
        raise ConfigError(f"level: got {level!r}, expected one of {', '.join(get_args(Level))}")


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
            raise NumericError(f"cap: got {self.cap}, expected an upper bound > 0 of the weight")

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
                f"low, high: got {self.low}, {self.high}, expected 0 <= low <= high and high > 0"
            )

    def __call__(self, rollouts: Rollouts) -> Tensor:
        weight = weight_of(mismatch(rollouts, self.level))
        return torch.where((weight >= self.low) & (weight <= self.high), weight, 0.0)


CORRECTIONS = {"truncated": Truncated, "masked": Masked}
"""Corrections by name, for configuration files."""
