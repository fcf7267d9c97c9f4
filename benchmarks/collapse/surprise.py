"""The filter on a run's own metrics: how surprising is each new value, in standard deviations.

Metric j at step t, transformed, is a slowly moving level plus a profile over the steps since the last sampling::

    y_jt = x_jt + c_j,phase(t) + v_jt,    x_jt = x_j,t-1 + w_jt
    Var v = s_j^2,  Var w = q s_j^2,  Var of a change of c from one visit to the next = DRIFT q s_j^2

There is no slope on purpose: a metric that keeps sliding leaves innovations of one sign, and those are what the rule
in ``k_of_n`` counts. ``s_j^2`` and q are learned: a bank of q runs side by side, each with its own
discounted mean of squared innovations as ``s_j^2``, and the q of the highest discounted likelihood speaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.collapse.metrics import WATCHED, Metric
from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.numerics.kalman import Gaussian, predict, update

RATIOS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
"""Bank of q, process noise over observation noise per step."""
PROFILE_PRIOR = 100.0
"""Variance of the profile before a phase was seen, in units of the noise."""
DRIFT = 0.1
MAX_PHASES = 64
CLIP = 3.0
"""Innovations beyond it move level and noise as if they were this many standard deviations."""
CLIPPED_SECOND_MOMENT = 0.9950072780344535
"""Mean of min(z, CLIP)^2 of a standard normal z."""


@dataclass(frozen=True)
class WatchOptions:
    """How the filter learns.

    Args:
        stiffest: in (0, inf), largest q of the bank that may speak. A larger one follows a random walk without
            alarms, a smaller one keeps a slow slide visible.
        memory: in (0, 1), share of the evidence about noise that an observation keeps.
        warm_up: observations of a metric before it can say anything.
    """

    stiffest: float = 1e-3
    memory: float = 0.98
    warm_up: int = 24

    def __post_init__(self) -> None:
        if not (is_real(self.stiffest) and 0 < self.stiffest < math.inf):
            raise NumericError(f"stiffest: got {self.stiffest!r}, expected a finite number > 0")
        if not (is_real(self.memory) and 0 < self.memory < 1):
            raise NumericError(f"memory: got {self.memory!r}, expected (0, 1)")
        if not is_whole(self.warm_up, 4):
            raise ConfigError(f"warm_up: got {self.warm_up!r}, expected an integer, at least 4 observations")


class Surprise(NamedTuple):
    """One metric at one step: the value as logged, what was expected, and z = innovation / deviation."""

    metric: Metric
    value: float
    expected: float
    z: float


class Watch:
    """Filters over the metrics of a run, fed one logged row at a time.

    Args:
        metrics: what is watched.
        period: steps from one sampling to the next; 1 = no profile.
        options: see :class:`WatchOptions`.

    >>> watch = Watch()
    >>> [watch.see(step, {"entropy": 0.5}) for step in (1, 2)]  # too early to say anything
    [[], []]
    """

    def __init__(
        self, period: int = 1, *, metrics: tuple[Metric, ...] = WATCHED, options: WatchOptions | None = None
    ) -> None:
        if not is_whole(period, 1):
            raise ConfigError(
                f"period: got {period!r}, expected the steps from one sampling to the next, >= 1"
            )
        self.metrics, self.period, self.options = metrics, int(period), options or WatchOptions()
        self.phases = self.period if self.period <= MAX_PHASES else 1
        ratios = [q for q in RATIOS if q <= self.options.stiffest] or [self.options.stiffest]
        self._ratios = torch.tensor(ratios, dtype=torch.float64)
        shape = (len(metrics), len(ratios))
        zeros = torch.zeros(shape, dtype=torch.float64)
        self._level = Gaussian(zeros, zeros + math.inf)
        spread = PROFILE_PRIOR if self.phases > 1 else 0.0
        self._profile = Gaussian(
            zeros.new_zeros(*shape, self.phases), zeros.new_full((*shape, self.phases), spread)
        )
        self._weight, self._squares, self._logs = zeros, zeros, zeros
        self._count = torch.zeros(len(metrics), dtype=torch.float64)

    def see(self, step: int, row: Mapping[str, Any]) -> list[Surprise]:
        """Take in the row logged at a step; absent, null and non-finite metrics are missing observations.

        Returns: one :class:`Surprise` per metric that was observed and has left its warm-up.
        """
        values = [metric.read(row) for metric in self.metrics]
        observed = [value is not None for value in values]
        if not any(observed):
            self._level = predict(self._level, self._ratios)
            return []
        seen = torch.tensor(observed)[:, None]
        y = torch.tensor([0.0 if value is None else value for value in values], dtype=torch.float64)[:, None]
        phase = (int(step) - 1) % self.phases
        level, shape = predict(self._level, self._ratios), self._shape(phase)
        diffuse = level.variance.isinf()
        innovation = y - level.mean - shape.mean
        total = torch.where(diffuse, 1.0, level.variance) + shape.variance + 1.0
        scale = self._scale(total)
        limit = CLIP * scale * total.sqrt()
        ready = (self._count[:, None] >= self.options.warm_up) & ~diffuse
        used = torch.where(ready, innovation.clamp(-limit, limit), innovation)
        told = self._told(values, innovation, scale * total.sqrt(), level.mean + shape.mean, ready & seen)
        self._learn(used, total, seen & ~diffuse)
        noise = torch.where(seen, 1.0 + shape.variance, math.inf)  # the profile's doubt is noise to the level
        self._level, _ = update(level, level.mean + used, noise)
        self._level = Gaussian(torch.where(seen & diffuse, y, self._level.mean), self._level.variance)
        if self.phases > 1:
            self._move_profile(phase, shape, used, torch.where(diffuse, math.inf, 1.0 + level.variance), seen)
        self._count = self._count + seen[:, 0]
        return told

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, JSON-safe; :meth:`load_state_dict` continues bit for bit."""
        tensors = {name: getattr(self, name) for name in ("_weight", "_squares", "_logs", "_count")}
        tensors |= {"_level.mean": self._level.mean, "_level.variance": self._level.variance}
        tensors |= {"_profile.mean": self._profile.mean, "_profile.variance": self._profile.variance}
        return {
            "metrics": [metric.name for metric in self.metrics],
            "period": self.period,
            "tensors": {name: _plain(tensor) for name, tensor in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on from a saved state; False, and nothing changed, if it is of other metrics, period or shape."""
        if (
            state.get("metrics") != [metric.name for metric in self.metrics]
            or state.get("period") != self.period
        ):
            return False
        new = {name: _tensor(value) for name, value in state["tensors"].items()}
        if new["_level.mean"].shape != self._level.mean.shape:
            return False
        self._weight, self._squares = new["_weight"], new["_squares"]
        self._logs, self._count = new["_logs"], new["_count"]
        self._level = Gaussian(new["_level.mean"], new["_level.variance"])
        self._profile = Gaussian(new["_profile.mean"], new["_profile.variance"])
        return True

    def _shape(self, phase: int) -> Gaussian:
        mean, variance = (part[..., phase] for part in self._profile)
        return Gaussian(mean, variance + (DRIFT * self._ratios if self.phases > 1 else 0.0))

    def _scale(self, total: Tensor) -> Tensor:
        """Learned standard deviation of the noise, not below what the metric calls a change at all."""
        floor = torch.tensor([metric.least for metric in self.metrics], dtype=torch.float64)[:, None]
        variance = self._squares / self._weight.clamp(min=1e-300) / CLIPPED_SECOND_MOMENT
        return torch.maximum(variance.sqrt(), floor / total.sqrt())

    def _learn(self, used: Tensor, total: Tensor, counts: Tensor) -> None:
        new = counts.double()
        keep = 1.0 - (1.0 - self.options.memory) * new
        self._weight = keep * self._weight + new
        self._squares = keep * self._squares + torch.where(counts, used.square() / total, 0.0)
        self._logs = keep * self._logs + torch.where(counts, total.log(), 0.0)

    def _move_profile(self, phase: int, shape: Gaussian, used: Tensor, rest: Tensor, seen: Tensor) -> None:
        """Share of the innovation that the phase takes. Level and profile are treated as independent."""
        noise = torch.where(seen, rest, math.inf)
        after, _ = update(shape, shape.mean + used, noise)
        mean, variance = (part.clone() for part in self._profile)
        mean[..., phase], variance[..., phase] = after
        self._profile = Gaussian(mean, variance)

    def _told(
        self,
        values: list[float | None],
        innovation: Tensor,
        deviation: Tensor,
        expected: Tensor,
        ready: Tensor,
    ) -> list[Surprise]:
        weight = self._weight.clamp(min=1e-300)
        cost = self._logs / weight + (self._squares / weight).clamp(min=1e-30).log()
        best = cost.argmin(1, keepdim=True)
        z, guess, speaks = (
            part.gather(1, best)[:, 0].tolist() for part in (innovation / deviation, expected, ready)
        )
        return [
            Surprise(metric, metric.back(value), metric.back(guess[j]), z[j])
            for j, (metric, value) in enumerate(zip(self.metrics, values))
            if value is not None and speaks[j]
        ]


def _plain(tensor: Tensor) -> Any:
    """Nested lists with None for infinity, which JSON has no word for."""
    flat = [None if math.isinf(value) else value for value in tensor.flatten().tolist()]
    return {"shape": list(tensor.shape), "values": flat}


def _tensor(plain: Mapping[str, Any]) -> Tensor:
    values = [math.inf if value is None else value for value in plain["values"]]
    return torch.tensor(values, dtype=torch.float64).reshape(plain["shape"])
