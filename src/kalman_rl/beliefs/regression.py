"""Prompts that learn from each other: a drifting ridge regression on features plus a filter for the rest."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.base import ROUNDING, Prior, TableBelief, prompt_features
from kalman_rl.beliefs.change import MAX_WAIT, Change, core_variance
from kalman_rl.beliefs.groups import Groups
from kalman_rl.beliefs.mixture import Evidence, LocalLevels, is_finite
from kalman_rl.beliefs.noise import BINARY_FLOOR, MAX_SUM, coin_log_likelihood
from kalman_rl.beliefs.ridge import Features, Ridge
from kalman_rl.beliefs.shrinkage import leave_one_out_prior
from kalman_rl.beliefs.table import PromptTable
from kalman_rl.checks import expect, is_real, is_whole, saved
from kalman_rl.errors import ConfigError, quote
from kalman_rl.numerics.kalman import Gaussian

PROCESS_NOISE = (0.0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Default bank of Q per step, in squared reward scales."""
PRIOR_VARIANCE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.25, 0.5, 1.0)
"""Default bank of tau^2, the variance of values around the regression, in squared reward scales.

From scores that are almost all noise to scores that hardly have any; more of them cost no memory."""
_MIN_TAU2 = 1e-4
_MIN_SHARE = 0.1
"""Least expected R of 0/1 rewards, as a share of ``m (1 - m)``: a P that explains all rewards is not believed."""
_FORGOTTEN = -1.0  # in place of a variance: of a prompt that was visited in another unit
ROW_ROUNDING = 2e-5
"""Of a level as stored: float32 rounds to 6e-8 of it, and an update with a small gain loses more than one of
these."""


class RegressionBelief(TableBelief):
    """``V = f_t(x) + u``: f a ridge regression with forgetting on features x, u a local level per prompt.

    A prompt never visited starts from ``f_t(x)`` with variance ``tau^2 + x' Sigma x``. Between visits its
    value is carried by ``f_t(x) - f_s(x)`` and its variance grows by Q per step. Each batch updates the
    filters (:mod:`kalman_rl.beliefs.mixture`: every pair of Q and tau^2 at once, weighted by how well it
    predicted all prompts) and the regression (from y minus the filters' part, with weight ``1 / (R/n +
    P)``). Without features f is a common level that drifts.

    For 0/1 rewards R is ``m (1 - m)``, Q is multiplied by ``16 (m (1 - m))^2`` and tau^2 comes from the spread of first
    visits. Otherwise R is pooled within
    groups, and heavy tails switch to clipped rewards (:mod:`kalman_rl.beliefs.noise`). The first batch is baselined by
    leave-one-out shrinkage.

    Args:
        dimension: features wider than this are projected to it (SRHT).
        process_noise, prior_variance: the bank, in squared reward scales (1 for 0/1 rewards, otherwise the
            variance of the first batch that :mod:`~kalman_rl.beliefs.change` lets stand: where later ones
            contradict it, the belief begins anew in their unit); Q per step.
        forgetting: of the regression per step, in (0, 1].
        scale: divide advantages by the lagged pooled standard deviation.
        seed: of the projection.
        expected_noise: for 0/1 rewards, run the bank a second time with ``R = E[p (1 - p)] = m (1 - m) - P``, which
            does not count the doubt about a prompt as noise as well. The halves are weighed by how likely the success
            rate that each predicted made the rewards. In a pool of hopeless and solved prompts the first visits then
            tell more; where values lie close together, ``m (1 - m)`` wins.

    State: 176 bytes per prompt with the default bank (336 with ``expected_noise``), features are not stored: pass them
        with every call. An id called without features is not carried by the regression; a new one is expected at the
        average.

    Raises: ConfigError for a setting outside its range.
    Source: ridge regression as in Hoerl and Kennard (1970), local level Kalman (1960), multiple models Magill
    (1965); the combination is ours.

    >>> belief = RegressionBelief()
    >>> for step in range(20):
    ...     _ = belief.update(["easy"] * 4 + ["hard"] * 4, torch.tensor([1.0] * 4 + [0.0] * 4), step=step)
    >>> belief.predict(["easy", "hard"], step=20).mean.round(decimals=1).tolist()
    [1.0, 0.0]
    """

    def __init__(
        self,
        *,
        dimension: int = 64,
        process_noise: Sequence[float] = PROCESS_NOISE,
        prior_variance: Sequence[float] = PRIOR_VARIANCE,
        forgetting: float = 0.98,
        scale: bool = True,
        seed: int = 0,
        expected_noise: bool = False,
    ) -> None:
        for name, grid, sign in (
            ("process_noise", process_noise, ">= 0"),
            ("prior_variance", prior_variance, "> 0"),
        ):
            legal = isinstance(grid, Sequence) and len(grid) > 0 and is_real(*grid) and max(grid) < math.inf
            if not legal or min(grid) < 0 or (sign == "> 0" and not min(grid)):
                raise ConfigError(
                    f"{name}: got {quote(grid)}, expected a list of one or more finite numbers {sign}"
                )
        if not isinstance(expected_noise, bool):
            raise ConfigError(f"expected_noise: got {quote(expected_noise)}, expected True or False")
        self._rules = 1 + expected_noise  # for R of 0/1 rewards
        bank = self._rules * len(process_noise)
        columns = {
            "levels": ((5, bank), torch.float32),
            "start": ((), torch.float32),
            "fit": ((), torch.float32),
        }
        super().__init__(PromptTable(columns), scale=scale)
        self._q = torch.tensor(list(process_noise) * self._rules, dtype=torch.float64)
        self._tau2 = torch.tensor(list(prior_variance), dtype=torch.float64)
        # The first column is the tau^2 from moments, the others the grid; one of the two is in use.
        self._evidence = Evidence(torch.zeros(bank, 1 + len(prior_variance), dtype=torch.float64))
        self._rule = Evidence(torch.zeros(self._rules, dtype=torch.float64))
        self._features = Features(dimension, seed)
        self._ridge = Ridge(forgetting)
        self._offset, self._unit = 0.0, 0.0  # mean and variance of rewards; 0 = not known yet
        self._change = Change()  # of the unit
        self._spread = torch.zeros(
            2, dtype=torch.float64
        )  # running batches: prompts, their squared distances
        self._first = torch.zeros(
            2, dtype=torch.float64
        )  # first visits: their number, sum of tau^2 estimates

    # ---- what was learned

    @property
    def process_noise(self) -> float:
        """Average Q per step under the current weights, in squared reward units (for 0/1: at m = 1/2)."""
        return float(self._weights().sum(1) @ self._q) * self._unit2

    @property
    def prior_variance(self) -> float:
        """Average tau^2 under the current weights, in squared reward units."""
        return float(self._weights().sum(0) @ self._all_tau2())

    # ---- hooks

    @property
    def _robust(self) -> bool:
        return self._noise.robust

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "process_noise": self._q.chunk(self._rules)[0].tolist(),
            "prior_variance": self._tau2.tolist(),
            "forgetting": self._ridge.forgetting,
            "dimension": self._features.dimension,
            "seed": self._features.seed,
            "expected_noise": self._rules == 2,
        }

    def _extra_state(self) -> dict[str, Any]:
        return {
            "evidence": self._evidence.state_dict(),
            "rule": self._rule.state_dict(),
            "features": self._features.state_dict(),
            "ridge": self._ridge.state_dict(),
            "reward": [self._offset, self._unit, self._change.age, self._change.off],
            "first": self._first.clone(),
            "spread": self._spread.clone(),
        }

    def _load_extra(self, state: dict[str, Any]) -> None:
        names = ("evidence", "rule", "features", "ridge", "reward", "first", "spread")
        evidence, rule, features, ridge, (offset, unit, age, off), first, spread = saved(
            "belief state", state, *names
        )
        evidence, rule = self._evidence.checked(evidence), self._rule.checked(rule)
        features = self._features.checked(features)
        numbers = is_real(offset, unit) and abs(offset) < MAX_SUM and 0 <= unit < MAX_SUM
        counts = is_whole(age) and is_whole(off, -MAX_WAIT)
        expect("belief state", "reward", numbers and counts, state["reward"], "offset, unit, age and off")
        legal = is_finite(first, 2) and is_finite(spread, 2)
        expect("belief state", "first, spread", legal, (first, spread), "two finite numbers each")
        first, spread = first.clone(), spread.clone()
        ridge = self._ridge.checked(ridge)
        self._evidence, self._rule, self._features, self._ridge = evidence, rule, features, ridge
        self._offset, self._unit, self._change = float(offset), float(unit), Change(age, off)
        self._first, self._spread = first, spread

    def _inputs(self, names: list[Hashable], index: Tensor, features: Tensor | None) -> Tensor | None:
        if features is None:
            return None
        return self._features.check(prompt_features(features, index, len(names)))

    def _resolution(self, baseline: Tensor) -> Tensor:
        return ROW_ROUNDING * (baseline - self._offset).abs()

    def _before(self, groups: Groups, step: int, inputs: Tensor | None) -> Prior:
        if len(self._table):
            return super()._before(groups, step, inputs)
        return leave_one_out_prior(groups, 0.0)

    def _prior(self, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> Prior:
        x = self._features.standard(inputs, len(rows))
        levels = self._levels(rows, gap, x, step)
        mean, variance = self._mixture(levels)
        mean = mean + self._offset
        if self._noise.binary is True:
            mean = mean.clamp(0.0, 1.0)
        return Prior(Gaussian(mean, variance), self._mean_noise(self._reward_noise(mean, variance)))

    def _absorb(self, groups: Groups, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> None:
        self._features.fit(inputs)
        self._noise.see_kind(groups)
        first_ever = self._set_unit(groups) or not len(self._table)
        if first_ever:
            self._offset = float(groups.mean.mean())
        prior = self._prior(rows, gap.clamp(min=0), step, inputs)
        shown = groups
        if self._robust:
            shown = self._noise.clip(groups, prior.value.mean, prior.value.variance + prior.noise)
        if first_ever:
            self._noise.learn(groups, *prior.value)
        x = self._features.standard(inputs, len(rows))
        y = shown.mean - self._offset
        rules = self._reward_noise(*prior.value) / groups.size[:, None]
        noise, each = self._mean_noise(rules), self._of_settings(rules)
        if first_ever:  # then f comes first: residuals from a regression that knows nothing would be values
            self._learn_first(groups, rows, y, x)
            self._ridge.learn(x, y, 1 / (noise + self.prior_variance), step)
        levels = self._levels(rows, gap.clamp(min=0), x, step)
        late = self._drift(levels) * (-gap).clamp(min=0)[:, None]
        self._weigh_rules(levels, groups, step)
        self._evidence.learn(self._log_likelihood(levels, y, each + late), step)
        mean, variance = self._mixture(levels)
        if not first_ever:
            new = self._unseen(rows)
            self._learn_first(groups, rows, y - mean, x)
            fit, unsure = self._ridge.predict(x, step)
            spread = torch.where(new, (variance - unsure).clamp(min=_MIN_TAU2 * self._unit2), variance)
            self._ridge.learn(x, y - (mean - fit), 1 / (noise + spread), step)
            self._noise.learn(groups, *prior.value)
        self._learn_spread(levels.observed(y, each + late))
        self._write(groups.ids, rows, levels.observed(y, each + late), x, step)

    # ---- details

    @property
    def _unit2(self) -> float:
        """The squared reward scale: 1 for 0/1 rewards, the variance of a batch of rewards otherwise."""
        return 1.0 if self._noise.binary is not False or not self._unit else self._unit

    def _reward_noise(self, mean: Tensor, variance: Tensor) -> Tensor:
        """(u, rules) R of one reward by each rule, where the value is thought to be N(mean, variance)."""
        noise = self._noise.of(mean, self._unit2)
        if self._rules == 1:
            return noise[:, None]
        less = noise
        if self._noise.binary is True:
            less = torch.maximum(noise - variance, _MIN_SHARE * noise).clamp(min=BINARY_FLOOR)
        return torch.stack((noise, less), 1)

    def _mean_noise(self, rules: Tensor) -> Tensor:
        """(u,) of (u, rules)."""
        first, last = rules[:, 0], rules[:, -1]
        return first + self._rule.weights[-1] * (last - first)

    def _of_settings(self, rules: Tensor) -> Tensor:
        """(u, K) of (u, rules): what each filter of the bank is told."""
        return rules.repeat_interleave(len(self._q) // self._rules, 1)

    def _weigh_rules(self, levels: LocalLevels, groups: Groups, step: int) -> None:
        """By the likelihood of the rewards under the success rate that each rule's half of the bank predicted.

        Not by that of the bank, which is normal and would reward a rule for its variance as well.
        """
        if self._rules == 1 or self._noise.binary is not True:
            return
        halves = levels.moments(self._all_tau2())[0].chunk(self._rules, 1)
        parts = zip(halves, self._within_rules())
        rates = [self._offset + (means * weights).sum((1, 2)) for means, weights in parts]
        self._rule.learn(torch.stack([coin_log_likelihood(rate, groups).sum() for rate in rates]), step)

    def _set_unit(self, groups: Groups) -> bool:
        """Learn the unit from the first batch, and anew where later ones contradict it.

        Returns whether everything begins anew: what was learned in another unit was weighed by a noise of that unit.
        """
        values = groups.reward[groups.known]
        if self._noise.binary is not False or len(values) < 2:
            return False
        seen = float(values.var())
        if seen <= (ROUNDING * float(values.abs().max())) ** 2:
            return False
        again = not self._unit or self._change.seen(self._unit, seen, len(values), core_variance(values))
        if again:
            self._unit = seen
            self._begin()
        return again

    def _begin(self) -> None:
        """Forget all that depends on the unit; prompts keep their clocks."""
        self._noise.begin()
        self._evidence = Evidence(torch.zeros_like(self._evidence.log_likelihood))
        self._ridge = Ridge(self._ridge.forgetting)
        self._ridge.unit, self._ridge.spread = self._unit2, 0.1 * self._unit2
        self._first, self._spread = torch.zeros_like(self._first), torch.zeros_like(self._spread)
        self._table.columns["start"].fill_(_FORGOTTEN)

    def _unseen(self, rows: Tensor) -> Tensor:
        """(u,) whether nothing is known of a prompt itself: never visited, or not since all began anew."""
        if not len(self._table):
            return rows < 0
        return (rows < 0) | (self._table.columns["start"][rows.clamp(min=0)] == _FORGOTTEN)

    def _all_tau2(self) -> Tensor:
        """(1 + T,) tau^2 of each column of the evidence."""
        number, total = self._first.tolist()
        moment = max(total / number if number else 0.0, _MIN_TAU2 * self._unit2)
        return torch.cat((self._tau2.new_tensor([moment]), self._tau2 * self._unit2))

    def _weights(self) -> Tensor:
        """(K, 1 + T) weights of all settings, summing to 1."""
        return torch.cat([share * within for share, within in zip(self._rule.weights, self._within_rules())])

    def _within_rules(self) -> list[Tensor]:
        """Weights within each rule's part: of the grid, for 0/1 rewards in groups of the moment column."""
        evidence = self._evidence.log_likelihood.clone()
        by_moments = self._noise.binary is not False and bool(self._first[0])
        evidence[:, slice(1, None) if by_moments else slice(0, 1)] = -math.inf
        return [torch.softmax(part.flatten(), 0).reshape(part.shape) for part in evidence.chunk(self._rules)]

    def _drift(self, levels: LocalLevels) -> Tensor:
        """(u, K) Q per step in squared reward units."""
        factor = torch.full_like(levels.s, self._unit2)
        if self._noise.binary is not False:
            inside = (self._mixture(levels)[0] + self._offset).clamp(0.0, 1.0)
            factor = 16 * (inside * (1 - inside)).square()
        return factor[:, None] * self._q

    def _levels(self, rows: Tensor, gap: Tensor, x: Tensor, step: int) -> LocalLevels:
        """The filters of each prompt now, relative to the offset."""
        fit, unsure = self._ridge.predict(x, step)
        new = LocalLevels.start(fit, unsure, len(self._q))
        if not len(self._table):
            return new
        columns, place = self._table.columns, rows.clamp(min=0)
        stored = columns["levels"][place].double().unbind(1)
        old = LocalLevels._make([*stored, columns["start"][place].double()])
        shift = fit - columns["fit"][place].double()
        old = old.shifted(shift)  # first, for the drift of 0/1 rewards depends on the mean
        old = old.diffused(self._drift(old) * gap[:, None])
        unseen = self._unseen(rows)
        *fields, start = zip(new, old)
        return LocalLevels._make(
            [*(torch.where(unseen[:, None], n, o) for n, o in fields), torch.where(unseen, *start)]
        )

    def _mixture(self, levels: LocalLevels) -> tuple[Tensor, Tensor]:
        """Mean and variance (u,) of the value over all settings, relative to the offset."""
        mean, variance = levels.moments(self._all_tau2())
        weights = self._weights()
        centre = (mean * weights).sum((1, 2))
        return centre, ((variance + (mean - centre[:, None, None]).square()) * weights).sum((1, 2))

    def _log_likelihood(self, levels: LocalLevels, y: Tensor, noise: Tensor) -> Tensor:
        """(K, 1 + T) of the batch: normal, or Student's t with 4 degrees of freedom in robust mode."""
        mean, variance = levels.moments(self._all_tau2())
        total = variance + noise[..., None]
        squared = (y[:, None, None] - mean).square() / total
        if self._robust:
            return (-0.5 * total.log() - 2.5 * torch.log1p(squared / 4)).sum(0)
        return (-0.5 * (total.log() + squared)).sum(0)

    def _learn_first(self, groups: Groups, rows: Tensor, off: Tensor, x: Tensor) -> None:
        """tau^2 = E[(y - f)^2] - x' Sigma x - noise of y, over first visits with at least two rewards."""
        use = self._unseen(rows) & (groups.size > 1)
        if not use.any():
            return
        unsure = self._ridge.predict(x[use], None)[1] if len(self._table) else torch.zeros_like(off[use])
        freedom = groups.size[use] - 1
        own_noise = groups.within[use] / (freedom * groups.size[use])
        squared = off[use].square()
        if not len(self._table):  # there is no f yet: around the mean of the batch
            squared = (off[use] - off[use].mean()).square() * (len(freedom) / max(len(freedom) - 1, 1))
        self._first = self._first + torch.stack((use.double().sum(), (squared - unsure - own_noise).sum()))

    def _learn_spread(self, levels: LocalLevels) -> None:
        """Variance of values over prompts: of their means, plus what is not known about each."""
        mean, variance = self._mixture(levels)
        apart = (mean - mean.mean()).square() * (len(mean) / max(len(mean) - 1, 1)) + variance
        kept = 0.8 * self._spread
        self._spread = kept + torch.stack((apart.new_tensor(float(len(apart))), apart.sum()))
        self._ridge.spread = max(float(self._spread[1] / self._spread[0]), _MIN_TAU2 * self._unit2)

    def _write(self, names: list[Hashable], rows: Tensor, levels: LocalLevels, x: Tensor, step: int) -> None:
        rows = self._table.add(names, rows)
        columns = self._table.columns
        columns["levels"][rows] = torch.stack(levels[:5], dim=1).float()
        columns["start"][rows] = levels.s.float()
        columns["fit"][rows] = self._ridge.predict(x, step)[0].float()
