"""Discounted Beta counts per prompt with a bank of forgetting factors, for many worlds at once.

Two uses: the competitor ``beta_bank`` of the estimation table, and the one tracker under every allocation
rule, so that rules differ in what they do with a posterior and not in the posterior. Numpy, because hundreds
of worlds (seeds times operating points) run side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import betaln

from benchmarks.beliefs.competitors import Competitor
from benchmarks.beliefs.world import Scenario, Visit

MEMORY = np.array([0.5, 0.7, 0.85, 0.93, 0.97, 1.0])  # kept per epoch


class Counts(NamedTuple):
    """Pseudo-counts of the Beta belief about some prompts, one per bank member: (W, B, K), weights (W, K)."""

    good: np.ndarray
    bad: np.ndarray
    weight: np.ndarray

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the success probability under the mixture, (W, B) each."""
        total = self.good + self.bad
        mean = self.good / total
        variance = mean * (1 - mean) / (total + 1)
        w = self.weight[:, None, :]
        center = (w * mean).sum(-1)
        return center, (w * (variance + mean**2)).sum(-1) - center**2

    def matched(self) -> tuple[np.ndarray, np.ndarray]:
        """The one Beta with the mixture's mean and variance: (a, b), (W, B) each."""
        mean, variance = self.moments()
        strength = np.maximum(mean * (1 - mean) / np.maximum(variance, 1e-12) - 1, 1e-3)
        return mean * strength, (1 - mean) * strength


class BetaBank:
    """``prior + discounted counts``; forgetting pulls back to a prior learned from the whole pool.

    Args:
        worlds: W. prompts: N. per_epoch: steps that one unit of forgetting stands for.
    """

    def __init__(self, worlds: int, prompts: int, per_epoch: int) -> None:
        self.per_epoch = per_epoch
        self.good = np.zeros((worlds, prompts, len(MEMORY)))
        self.bad = np.zeros_like(self.good)
        self.last = np.zeros((worlds, prompts), dtype=int)
        self.evidence = np.zeros((worlds, len(MEMORY)))
        self.prior_mean = np.full((worlds, 1, 1), 0.5)
        self.prior_strength = np.full((worlds, 1, 1), 1.0)
        self._moments: np.ndarray | None = None

    def counts(self, ids: np.ndarray, step: int) -> Counts:
        """The belief about ``ids`` (W, B) at ``step``, before the rewards of that step."""
        rows = np.arange(len(ids))[:, None]
        keep = MEMORY ** ((step - self.last[rows, ids]) / self.per_epoch)[..., None]
        good = self.prior_mean * self.prior_strength + keep * self.good[rows, ids]
        bad = (1 - self.prior_mean) * self.prior_strength + keep * self.bad[rows, ids]
        weight = np.exp(self.evidence - self.evidence.max(-1, keepdims=True))
        return Counts(np.maximum(good, 1e-3), np.maximum(bad, 1e-3), weight / weight.sum(-1, keepdims=True))

    def absorb(self, ids: np.ndarray, step: int, wins: np.ndarray, n: np.ndarray, seen: Counts) -> None:
        """Add ``wins`` of ``n`` samples, (W, B) each; prompts with n = 0 stay as they are."""
        self._weigh(wins, n, seen)
        self._learn_prior(wins, n)
        rows = np.arange(len(ids))[:, None]
        keep = MEMORY ** ((step - self.last[rows, ids]) / self.per_epoch)[..., None]
        self.good[rows, ids] = keep * self.good[rows, ids] + wins[..., None]
        self.bad[rows, ids] = keep * self.bad[rows, ids] + (n - wins)[..., None]
        self.last[rows, ids] = step

    def _weigh(self, wins: np.ndarray, n: np.ndarray, seen: Counts) -> None:
        """Pooled predictive log-likelihood of every member, remembered over about 100 steps."""
        x, size = wins[..., None], n[..., None]
        if np.array_equal(wins, np.rint(wins)) and (wins >= 0).all() and (wins <= n).all():
            score = betaln(seen.good + x, seen.bad + size - x) - betaln(seen.good, seen.bad)
        else:  # scores that are no counts: a Gaussian with the Beta's moments
            total = seen.good + seen.bad
            mean = seen.good / total
            variance = mean * (1 - mean) * (1 / (total + 1) + 1 / size) + 1e-3
            score = -0.5 * (np.log(variance) + (x / size - mean) ** 2 / variance)
        self.evidence = 0.99 * self.evidence + np.where(size > 0, score, 0.0).sum(1)

    def _learn_prior(self, wins: np.ndarray, n: np.ndarray) -> None:
        """Moments of the group means: their mean, and their variance less what sampling explains."""
        many = n >= 2
        share = wins / np.maximum(n, 1)
        size = np.maximum(many.sum(-1), 1)
        center = np.where(many, share, 0.0).sum(-1) / size
        spread = np.where(many, (share - center[:, None]) ** 2, 0.0).sum(-1) / size
        noise = np.where(many, share * (1 - share) / np.maximum(n - 1, 1), 0.0).sum(-1) / size
        new = np.stack([center, spread - noise])
        self._moments = new if self._moments is None else 0.9 * self._moments + 0.1 * new
        center, spread = np.clip(self._moments[0], 0.01, 0.99), np.maximum(self._moments[1], 1e-4)
        strength = np.clip(center * (1 - center) / spread - 1, 0.05, 30.0)
        self.prior_mean, self.prior_strength = center[:, None, None], strength[:, None, None]


class BetaCompetitor(Competitor):
    """The bank as a baseline: ``b_j = sum_k w_k (a_k + S - r_j) / (a_k + b_k + G - 1)``."""

    name = "beta_bank"

    def __init__(self, scenario: Scenario, worlds: int) -> None:
        self.bank = BetaBank(worlds, scenario.prompts, scenario.per_epoch)
        self._seen: Counts | None = None

    def baseline(self, visit: Visit) -> np.ndarray:
        r = visit.reward
        seen = self._seen = self.bank.counts(visit.ids, visit.step)
        others = (r.sum(-1, keepdims=True) - r)[..., None]
        total = (seen.good + seen.bad)[:, :, None] + r.shape[-1] - 1
        return (seen.weight[:, None, None] * (seen.good[:, :, None] + others) / total).sum(-1)

    def interval(self) -> tuple[np.ndarray, np.ndarray] | None:
        assert self._seen is not None
        return self._seen.moments()

    def absorb(self, visit: Visit) -> None:
        assert self._seen is not None
        n = np.full(visit.ids.shape, float(visit.reward.shape[-1]))
        self.bank.absorb(visit.ids, visit.step, visit.reward.sum(-1), n, self._seen)
