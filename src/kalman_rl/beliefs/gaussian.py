"""A scalar Kalman filter per prompt with noise you choose."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.base import Prior, TableBelief
from kalman_rl.beliefs.groups import Groups
from kalman_rl.beliefs.table import PromptTable
from kalman_rl.checks import is_real
from kalman_rl.errors import ConfigError, NumericError, quote
from kalman_rl.numerics.kalman import Gaussian, update


class GaussianBelief(TableBelief):
    """Value ~ N(m, P) per prompt, a local-level model in steps.

    ``P' = P + Q gap``; a group of n rewards with mean y is one observation of variance R/n:
    ``K = P' / (P' + R/n)``, ``m <- m + K (y - m)``, ``P <- (1 - K) P'``. Updating reward by reward in any
    order gives the same.

    Args:
        process_noise: Q >= 0 per step, in squared reward units; with ``observation_noise="auto"`` and 0/1
            rewards it is multiplied by ``16 (m (1 - m))^2``, the shape of a random walk in the logit.
        observation_noise: R > 0 of one reward, or "auto": ``m (1 - m)`` with a floor of 0.01 while all
            rewards were 0 or 1, otherwise the pooled within-group variance, both from earlier batches.
        mean: of a prompt never visited.
        variance: of a prompt never visited, in [0, inf]; also the R of "auto" before anything is known.
        scale: divide advantages by the lagged pooled standard deviation.

    Raises: NumericError, ConfigError for a value outside its range.

    Limits: ``variance=inf`` with one visit is RLOO; ``variance=0, process_noise=0`` a constant baseline. Late
    rewards: see :class:`~kalman_rl.beliefs.protocol.Belief`. Source: Kalman (1960).

    >>> belief = GaussianBelief(process_noise=0.0, observation_noise=0.25, mean=0.5, variance=0.25)
    >>> belief.update(["a", "a"], torch.tensor([1.0, 1.0]), step=0).innovation
    tensor([0.5000], dtype=torch.float64)
    >>> round(belief.predict(["a"], step=0).mean.item(), 4)
    0.8333
    """

    def __init__(
        self,
        *,
        process_noise: float = 1e-3,
        observation_noise: float | str = "auto",
        mean: float = 0.5,
        variance: float = 0.25,
        scale: bool = True,
    ) -> None:
        if not (is_real(process_noise) and 0 <= process_noise < math.inf):
            raise NumericError(f"process_noise: got {quote(process_noise)}, expected a finite variance >= 0")
        if isinstance(observation_noise, str):
            if observation_noise != "auto":
                raise ConfigError(
                    f"observation_noise: got {quote(observation_noise)}, expected a number or 'auto'"
                )
        elif not (is_real(observation_noise) and 0 < observation_noise < math.inf):
            raise NumericError(
                f"observation_noise: got {quote(observation_noise)}, expected a finite variance > 0, or 'auto'"
            )
        if not is_real(mean, variance) or not math.isfinite(mean) or not variance >= 0:
            raise NumericError(
                f"mean, variance: got {quote(mean)}, {quote(variance)}, expected a finite mean, variance >= 0"
            )
        row = {"mean": ((), torch.float64), "variance": ((), torch.float64)}
        super().__init__(PromptTable(row), scale=scale)
        self.process_noise, self.observation_noise = process_noise, observation_noise
        self.mean, self.variance = mean, variance

    @property
    def _robust(self) -> bool:
        return self.observation_noise == "auto" and self._noise.robust

    @property
    def _options(self) -> dict[str, Any]:
        names = ("process_noise", "observation_noise", "mean", "variance")
        return {name: getattr(self, name) for name in names}

    def _stored(self, rows: Tensor) -> Gaussian:
        """Belief right after the last visit; the prior for prompts never visited."""
        columns, known = self._table.columns, rows >= 0
        mean = torch.full(rows.shape, self.mean, dtype=torch.float64)
        variance = torch.full(rows.shape, self.variance, dtype=torch.float64)
        mean[known], variance[known] = columns["mean"][rows[known]], columns["variance"][rows[known]]
        return Gaussian(mean, variance)

    def _drift(self, mean: Tensor) -> Tensor:
        """Q per step of each prompt."""
        if self.observation_noise == "auto" and self._noise.binary is True:
            inside = mean.clamp(0.0, 1.0)
            return self.process_noise * 16 * (inside * (1 - inside)).square()
        return torch.full_like(mean, self.process_noise)

    def _prior(self, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> Prior:
        mean, variance = self._stored(rows)
        if isinstance(self.observation_noise, str):
            default = self.variance if 0 < self.variance < math.inf else 1.0
            noise = self._noise.of(mean, default)
        else:
            noise = torch.full_like(mean, self.observation_noise)
        return Prior(Gaussian(mean, variance + self._drift(mean) * gap), noise)

    def _absorb(self, groups: Groups, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> None:
        state, noise = self._prior(rows, gap.clamp(min=0), step, inputs)
        late = self._drift(state.mean) * (-gap).clamp(min=0)
        shown = groups
        if self._robust:
            shown = self._noise.clip(groups, state.mean, state.variance + noise)
        after, _ = update(state, shown.mean, noise / groups.size + late)
        rows = self._table.add(groups.ids, rows)
        self._table.columns["mean"][rows] = after.mean
        self._table.columns["variance"][rows] = after.variance
        self._noise.learn(groups, state.mean, state.variance)
