"""How noisy rewards are, learned from all prompts together and always one batch late.

``R`` is the variance of one reward around its prompt's value. For 0/1 rewards it follows from the value,
``R = m (1 - m)``. Otherwise it is the variance within groups, pooled over prompts with weights n - 1.
Heavy tails are detected by the kurtosis of the same residuals; then rewards are clipped before they are
absorbed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.change import MAX_WAIT, Change
from kalman_rl.beliefs.groups import Groups
from kalman_rl.checks import expect, is_real, is_whole
from kalman_rl.errors import ConfigError, quote

BINARY_FLOOR = 0.01
"""Least R of 0/1 rewards: a prompt that never failed so far may fail."""
HUBER = 2.5
"""Predictive standard deviations at which a reward is clipped in robust mode."""
HEAVY_TAIL = 1.0
"""Excess kurtosis of within-group residuals above which robust mode is on."""
ROBUST_INFLATION = 1.7
"""Clipped rewards look more certain than they are; reported variances are multiplied by this."""
_MIN_NOISE = 0.1  # of a squared innovation, when the belief's variance seems to explain all of it
_TINY = 1e-12
MAX_SUM = 1e200
"""Of squares in a saved state: those of float32 rewards, to the fourth power, stay far below."""


def binary_noise(mean: Tensor) -> Tensor:
    """``R = max(m (1 - m), 0.01)``: variance of a 0/1 reward at the predicted success rate."""
    return (mean * (1 - mean)).clamp(min=BINARY_FLOOR)


def coin_log_likelihood(rate: Tensor, groups: Groups) -> Tensor:
    """(u,) log-likelihood of each prompt's 0/1 rewards at success rates (u,), none taken for surer than 0.02."""
    rate = rate.clamp(0.02, 0.98)
    return groups.size * (groups.mean * rate.log() + (1 - groups.mean) * torch.log1p(-rate))


@dataclass
class RewardNoise:
    """Running sums over batches with forgetting ``1 - rate``; every number is of past batches only.

    Attributes: ``binary`` None before the first reward, True while all were 0 or 1; ``squares``, ``freedom``
    within-group sum of squares and its degrees of freedom, of clipped rewards in ``clipped_squares``;
    ``fourth``, ``second``, ``samples`` moments of residuals; ``innovations``,
    ``surprise``, ``surprises`` squared innovations of groups of one, the part of them that the belief's own
    variance does not explain, their number: used while no group had two rewards; ``age``, ``off`` of a
    :class:`~kalman_rl.beliefs.change.Change` that lets the sums begin anew.
    """

    rate: float = 0.03
    binary: bool | None = None
    squares: float = 0.0
    clipped_squares: float = 0.0
    freedom: float = 0.0
    fourth: float = 0.0
    second: float = 0.0
    samples: float = 0.0
    surprise: float = 0.0
    innovations: float = 0.0
    surprises: float = 0.0
    age: int = 0
    off: int = 0

    @property
    def excess_kurtosis(self) -> float:
        """Of the pooled within-group residuals; 0 for a normal distribution or when nothing is known."""
        if self.second <= _TINY * max(self.samples, 1.0):
            return 0.0
        return self.fourth * self.samples / (self.second * self.second) - 3.0

    @property
    def robust(self) -> bool:
        """Whether rewards are clipped: heavy tails were seen, and rewards are not 0/1."""
        return self.binary is False and self.excess_kurtosis > HEAVY_TAIL

    @property
    def pooled(self) -> float | None:
        """R of one reward, or None before anything is known about it."""
        if self.freedom > 0:
            squares = self.clipped_squares if self.robust else self.squares
            return max(squares / self.freedom, _TINY)
        if not self.surprises:
            return None
        return max(self.surprise, _MIN_NOISE * self.innovations, _TINY) / self.surprises

    def of(self, mean: Tensor, default: float) -> Tensor:
        """(u,) R at the predicted means: by formula for 0/1 rewards, pooled otherwise."""
        if self.binary is True:
            return binary_noise(mean)
        pooled = self.pooled
        return torch.full_like(mean, default if pooled is None else pooled)

    def clip(self, groups: Groups, mean: Tensor, variance: Tensor) -> Groups:
        """Rewards clipped at HUBER predictive standard deviations around the (u,) predicted means."""
        centre, reach = mean[groups.place], HUBER * variance.sqrt()[groups.place]
        return groups.with_reward(groups.reward.clamp(centre - reach, centre + reach))

    def see_kind(self, groups: Groups) -> None:
        """Note whether all rewards so far, with this batch, were 0 or 1."""
        values = groups.reward[groups.known]
        self.binary = bool(((values == 0) | (values == 1)).all()) and self.binary is not False

    def learn(self, groups: Groups, mean: Tensor, variance: Tensor) -> None:
        """Absorb a batch; ``mean``, ``variance`` (u,) were predicted of each *value* before it."""
        self.see_kind(groups)
        freedom = (groups.size - 1).clamp(min=0)
        keep, pooled = 1 - self.rate, self.pooled
        clipped = groups
        if pooled is not None:
            clipped = self.clip(groups, mean, variance + pooled)
        # A residual within a group of n has variance R (n-1)/n: undo that, so that groups of all sizes pool.
        size = groups.size[groups.place]
        residual = groups.deviation * (size / (size - 1).clamp(min=1)).sqrt()
        residual = residual[groups.known & (size > 1)]
        single = groups.size == 1
        surprise = (groups.mean - mean).square() - variance
        single = single & torch.isfinite(surprise)
        fresh = {
            "squares": float(groups.within.sum()),
            # This one starts from the raw one and shrinks to its fixed point.
            "clipped_squares": float(clipped.within.sum()),
            "freedom": float(freedom.sum()),
            "fourth": float(residual.pow(4).sum()),
            "second": float(residual.square().sum()),
            "samples": float(len(residual)),
            "surprise": float(surprise[single].sum()),
            "innovations": float((groups.mean - mean)[single].square().sum()),
            "surprises": float(single.sum()),
        }
        before = {name: getattr(self, name) for name in fresh}
        squares, number = ("squares", "freedom") if fresh["freedom"] else ("innovations", "surprises")
        change = Change(self.age, self.off)
        if change.seen(
            _ratio(before[squares], before[number]), _ratio(fresh[squares], fresh[number]), fresh[number]
        ):
            keep = 0.0
        self.age, self.off = change.age, change.off
        for name, value in fresh.items():
            setattr(self, name, keep * before[name] + value)

    def begin(self) -> None:
        """Forget all sums; whether rewards are 0/1 is kept."""
        self.__init__(self.rate, self.binary)  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """The fields; :func:`restored` reads them back."""
        return asdict(self)


@dataclass
class AdvantageScale:
    """The lagged pooled standard deviation of unscaled advantages: ``sqrt(sum A^2 / count)`` of past batches.

    One number for all prompts: dividing by a group's own standard deviation would re-weight prompts by
    difficulty and bias the gradient. 1 before the first batch. One of the first batches that is FAR smaller
    replaces those before it; later ones may not, or the scale would follow rewards that become constant to rounding.
    """

    rate: float = 0.03
    squares: float = 0.0
    count: float = 0.0
    batches: int = 0

    @property
    def value(self) -> float:
        """The standard deviation in reward units; 1 before the first batch."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0

    def learn(self, advantage: Tensor, known: Tensor) -> None:
        """Absorb the (n,) unscaled advantages of a batch."""
        squares, count = float(advantage[known].square().sum()), float(known.sum())
        odd = 0 < self.batches < MAX_WAIT and Change().seen(
            self.squares / self.count, squares / max(count, 1), count
        )
        keep = 0.0 if odd and squares < self.squares else 1 - self.rate
        self.batches += count > 0
        self.squares, self.count = keep * self.squares + squares, keep * self.count + count

    def state_dict(self) -> dict[str, Any]:
        """The fields; :func:`restored` reads them back."""
        return asdict(self)


def _ratio(squares: float, freedom: float) -> float:
    return squares / freedom if freedom else 0.0


def restored(kind: type[Any], state: Any) -> Any:
    """A dataclass of this module from its saved fields. Raises: ConfigError for other fields."""
    if not isinstance(state, dict) or set(state) != set(kind.__dataclass_fields__):
        raise ConfigError(f"belief state: got {quote(state, 80)} for {kind.__name__}, expected its fields")
    for name, value in state.items():
        wanted = kind.__dataclass_fields__[name].default
        if wanted is None:
            expect(
                "belief state", name, value is None or isinstance(value, bool), value, "True, False or None"
            )
        elif isinstance(wanted, int):
            expect("belief state", name, is_whole(value, -MAX_WAIT), value, "a count")
        else:
            low = -math.inf if name == "surprise" else 0
            legal = (
                is_real(value) and low <= value <= (1 if name == "rate" else MAX_SUM) and value > -math.inf
            )
            expect(
                "belief state", name, legal, value, f"a number from {low} to {MAX_SUM:g}, a rate at most 1"
            )
    return kind(**state)
