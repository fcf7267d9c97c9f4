"""Success counts per prompt that fade: a discounted Beta belief for 0/1 rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.base import Prior, TableBelief
from kalman_rl.beliefs.groups import Groups
from kalman_rl.beliefs.mixture import Evidence, is_finite
from kalman_rl.beliefs.shrinkage import leave_one_out_prior
from kalman_rl.beliefs.table import PromptTable
from kalman_rl.checks import expect, is_real, saved
from kalman_rl.errors import ConfigError, NumericError, quote
from kalman_rl.numerics.kalman import Gaussian

FORGETTING = (1.0, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8)
"""Default bank of forgetting factors per step: memories from five steps to everything."""
_PRIOR_STRENGTH = (0.5, 50.0)
"""Bounds of the learned pseudo-counts of the prior."""


class BetaBelief(TableBelief):
    """Success rate ~ Beta(a, b) per prompt, with old counts discounted by ``rho`` per step.

    ``a = a0 + s``, ``b = b0 + f``; a batch with S successes and F failures after ``gap`` steps makes
    ``s <- rho^gap s + S``, ``f <- rho^gap f + F``. Several rho are run side by side and weighted by how
    well they predicted all prompts (beta-binomial likelihood, forgetting itself slowly). The prior (a0,
    b0) is learned from the mean and spread of success rates over prompts. The baseline is ``b_j = (a + S -
    r_j) / (a + b + n - 1)`` for one rho.

    Rewards must lie in [0, 1]; a fraction counts as a fractional success. A late batch is discounted to the time of the
    last visit: ``s <- s + rho^late S``. The prior is never forgotten: of rewards that are all r, the baseline is still
    ``(a0 - (a0 + b0) r) / (a0 + b0 + n)`` off after n of them, which is no rounding; with ``scale`` it is divided by a
    scale that shrinks alike.

    Args:
        forgetting: one rho or several, each in (0, 1], per step.
        prior: None = learned, or (a0, b0), each > 0.
        scale: divide advantages by the lagged pooled standard deviation.

    Raises: ConfigError for a setting outside its range.

    >>> belief = BetaBelief(forgetting=1.0, prior=(1.0, 1.0))
    >>> _ = belief.update(["a"] * 4, torch.tensor([1.0, 1.0, 1.0, 0.0]), step=0)
    >>> round(belief.predict(["a"], step=9).mean.item(), 6)  # Laplace's rule: (1 + 3) / (2 + 4)
    0.666667
    """

    def __init__(
        self,
        *,
        forgetting: float | Sequence[float] = FORGETTING,
        prior: tuple[float, float] | None = None,
        scale: bool = True,
    ) -> None:
        grid = tuple(forgetting) if isinstance(forgetting, Sequence) else (forgetting,)
        if not grid or not all(is_real(rho) and 0 < rho <= 1 for rho in grid):
            raise ConfigError(
                f"forgetting: got {quote(forgetting)}, expected one or more factors in (0, 1] per step"
            )
        if prior is not None and not (
            isinstance(prior, Sequence)
            and len(prior) == 2
            and is_real(*prior)
            and 0 < min(prior) <= max(prior) < math.inf
        ):
            raise ConfigError(
                f"prior: got {quote(prior)}, expected two pseudo-counts > 0, or None to learn them"
            )
        columns = {name: ((len(grid),), torch.float64) for name in ("success", "failure")}
        super().__init__(PromptTable(columns), scale=scale)
        self.prior = prior
        self._rho = torch.tensor(grid, dtype=torch.float64)
        self._evidence = Evidence(torch.zeros(len(grid), dtype=torch.float64))
        # Over past batches: prompts with >= 2 rewards, sums of y, y^2 and the noise of y.
        self._moments = torch.zeros(4, dtype=torch.float64)

    @property
    def weights(self) -> Tensor:
        """(K,) current weight of each forgetting factor."""
        return self._evidence.weights

    @property
    def _options(self) -> dict[str, Any]:
        return {"forgetting": self._rho.tolist(), "prior": self.prior}

    def _extra_state(self) -> dict[str, Any]:
        return {"evidence": self._evidence.state_dict(), "moments": self._moments.clone()}

    def _load_extra(self, state: dict[str, Any]) -> None:
        evidence, moments = saved("belief state", state, "evidence", "moments")
        expect("belief state", "moments", is_finite(moments, 4), moments, "four finite numbers")
        self._evidence, self._moments = self._evidence.checked(evidence), moments.clone()

    def _check(self, groups: Groups, step: int, part: int) -> None:
        super()._check(groups, step, part)
        refuse_outside_unit_interval(groups)

    def _pseudo_counts(self) -> tuple[float, float]:
        """(a0, b0): given, or from the mean and the spread of success rates."""
        if self.prior is not None:
            return self.prior
        number, total, squares, noise = self._moments.tolist()
        if not number:
            return 1.0, 1.0
        mean = min(max(total / number, 0.01), 0.99)
        spread = max((squares - noise) / number - (total / number) ** 2, 1e-6)
        strength = min(max(mean * (1 - mean) / spread - 1, _PRIOR_STRENGTH[0]), _PRIOR_STRENGTH[1])
        return strength * mean, strength * (1 - mean)

    def _counts(self, rows: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Discounted data counts (u, K), without the prior."""
        fade = self._rho ** gap.clamp(min=0)[:, None]
        fade = torch.where(rows[:, None] < 0, 0.0, fade)
        place = rows.clamp(min=0)
        if not len(self._table):
            return fade, fade.clone()
        return fade * self._table.columns["success"][place], fade * self._table.columns["failure"][place]

    def _parameters(self, rows: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """a, b (u, K)."""
        success, failure = self._counts(rows, gap)
        a0, b0 = self._pseudo_counts()
        return success + a0, failure + b0

    def _prior(self, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> Prior:
        a, b = self._parameters(rows, gap)
        size = a + b
        rate = a / size
        mean = rate @ self.weights
        spread = rate * (1 - rate) / (size + 1) + (rate - mean[:, None]).square()
        variance = spread @ self.weights
        # E[p (1 - p)]: with one rho, R / P = a + b, so the Gaussian formula is the Beta posterior mean.
        noise = (mean * (1 - mean) - variance).clamp(min=1e-12)
        return Prior(Gaussian(mean, variance), noise)

    def _before(self, groups: Groups, step: int, inputs: Tensor | None) -> Prior:
        if len(self._table) or self.prior is not None:
            return super()._before(groups, step, inputs)
        return leave_one_out_prior(groups, 0.5)

    def _absorb(self, groups: Groups, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> None:
        prior = self._prior(rows, gap.clamp(min=0), step, inputs)
        late = self._rho ** (-gap).clamp(min=0)[:, None]
        success, failure = groups.total[:, None], (groups.size - groups.total)[:, None]
        a, b = self._parameters(rows, gap)
        likelihood = _log_beta(a + success, b + failure) - _log_beta(a, b)
        self._evidence.learn(likelihood[rows >= 0].sum(0), step)
        faded_success, faded_failure = self._counts(rows, gap)
        rows = self._table.add(groups.ids, rows)
        self._table.columns["success"][rows] = faded_success + late * success
        self._table.columns["failure"][rows] = faded_failure + late * failure
        self._noise.learn(groups, *prior.value)
        self._learn_prior(groups)

    def _learn_prior(self, groups: Groups) -> None:
        """Var(mean) over prompts = spread of rates + noise y (1 - y) / (n - 1); needs n > 1."""
        several = groups.size > 1
        y, n = groups.mean[several], groups.size[several]
        noise = (y * (1 - y)).clamp(min=0) / (n - 1)
        sums = torch.stack((n.new_tensor(float(len(n))), y.sum(), y.square().sum(), noise.sum()))
        self._moments = (1 - self._noise.rate) * self._moments + sums


def refuse_outside_unit_interval(groups: Groups) -> None:
    """Raises: NumericError for a known reward below 0 or above 1."""
    bad = groups.known & ((groups.reward < 0) | (groups.reward > 1))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise NumericError(
            f"reward: got {groups.reward[row].item()} at row {row}, expected [0, 1]; use a Gaussian belief "
            "for other rewards"
        )


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
