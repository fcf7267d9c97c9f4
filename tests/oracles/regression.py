"""The regression belief with one process noise and one prior variance, for real rewards: plain loops."""

from __future__ import annotations

import numpy as np

from kalman_rl.beliefs.ridge import LEVEL_PRECISION, PRIOR_PRECISION


class OnePairBelief:
    """One scalar filter per prompt around a ridge regression; no clipping, no change of unit.

    Args: q, tau2: in units of the variance of the first batch. forgetting: of the regression, per step.
    """

    def __init__(self, q: float, tau2: float, forgetting: float) -> None:
        self.q, self.tau2, self.forgetting = q, tau2, forgetting
        self.filters: dict[object, tuple[float, float, float, int]] = {}  # mean, variance, fit then, step
        self.squares = self.freedom = self.prompts = self.distances = 0.0
        self.unit = self.spread = self.offset = 0.0
        self.centre: np.ndarray | None = None
        self.last = 0

    def regression(self, x: np.ndarray, step: int) -> tuple[float, float]:
        """Fit and its variance, for standard features with an intercept."""
        prior = np.array([LEVEL_PRECISION / self.unit] + [PRIOR_PRECISION / self.spread] * (len(x) - 1))
        fade = self.forgetting ** max(step - self.last, 0)
        covariance = np.linalg.inv(fade * self.precision + np.diag(prior))
        return x @ covariance @ (fade * self.target), x @ covariance @ x

    def standard(self, features: np.ndarray) -> np.ndarray:
        return np.concatenate(([1.0], (features - self.centre) / self.length))

    def value(self, name: object, features: np.ndarray, step: int) -> tuple[float, float]:
        """Mean, relative to the offset, and variance of a prompt's value."""
        fit, unsure = self.regression(self.standard(features), step)
        if name not in self.filters:
            return fit, self.tau2 * self.unit + unsure
        mean, variance, then, at = self.filters[name]
        return mean + fit - then, variance + self.q * self.unit * max(step - at, 0)

    def update(self, groups: dict[object, np.ndarray], features: dict[object, np.ndarray], step: int) -> None:
        """Absorb the rewards of each prompt."""
        first, rewards = not self.filters, np.concatenate(list(groups.values()))
        means = {name: values.mean() for name, values in groups.items()}
        if first:
            self.unit = rewards.var(ddof=1)
            self.spread, self.offset = 0.1 * self.unit, np.mean(list(means.values()))
            rows = np.array([features[name] for name in groups])
            self.centre = rows.mean(0)
            self.length = np.sqrt(((rows - self.centre) ** 2).sum(1).mean())
            size = 1 + rows.shape[1]
            self.precision, self.target = np.zeros((size, size)), np.zeros(size)
            self.pool(groups)
        noise = {name: self.squares / self.freedom / len(values) for name, values in groups.items()}
        before = {name: self.value(name, features[name], step) for name in groups}
        fits = {name: self.regression(self.standard(features[name]), step) for name in groups}
        fade = self.forgetting ** max(step - self.last, 0)
        self.precision, self.target, self.last = (
            fade * self.precision,
            fade * self.target,
            max(step, self.last),
        )
        for name in groups:
            mean, variance = before[name]
            fit, unsure = fits[name]
            if first:
                rest, doubt = means[name] - self.offset, self.tau2 * self.unit
            else:
                rest = means[name] - self.offset - (mean - fit)
                doubt = variance if name in self.filters else max(variance - unsure, 1e-4 * self.unit)
            x, weight = self.standard(features[name]), 1 / (noise[name] + doubt)
            self.precision += weight * np.outer(x, x)
            self.target += weight * rest * x
        if first:
            before = {name: self.value(name, features[name], step) for name in groups}
        else:
            self.pool(groups)
        after = {}
        for name, (mean, variance) in before.items():
            late = max(self.filters[name][3] - step, 0) if name in self.filters else 0
            gain = variance / (variance + noise[name] + late * self.q * self.unit)
            after[name] = mean + gain * (means[name] - self.offset - mean), (1 - gain) * variance
        found, doubts = (np.array(part) for part in zip(*after.values()))
        self.prompts = 0.8 * self.prompts + len(found)
        self.distances = 0.8 * self.distances + len(found) * found.var(ddof=1) + doubts.sum()
        self.spread = self.distances / self.prompts
        for name, (mean, variance) in after.items():
            fit, _ = self.regression(self.standard(features[name]), step)
            at = max(step, self.filters[name][3]) if name in self.filters else step
            self.filters[name] = mean, variance, fit, at

    def pool(self, groups: dict[object, np.ndarray]) -> None:
        """Variance within groups, fading by 0.97 per batch."""
        self.squares = 0.97 * self.squares + sum(((v - v.mean()) ** 2).sum() for v in groups.values())
        self.freedom = 0.97 * self.freedom + sum(len(v) - 1 for v in groups.values())
