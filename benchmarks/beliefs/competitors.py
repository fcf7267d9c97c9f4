"""Other ways to guess a prompt's value, restated from their formulas, for many worlds at once.

Every competitor has ``estimate(visit) -> {name: (S, B, G) or (S, B, 1)}`` (the baseline of each sample, read
before the visit changes anything) and ``absorb(visit)``. ``advantage`` is ``r - estimate`` unless it says
otherwise. Arrays are (worlds S, prompts of the step B, samples G).
"""

from __future__ import annotations

import numpy as np

from benchmarks.beliefs.world import Scenario, Visit


class Competitor:
    """Base: no memory, advantage ``r - b``."""

    name = ""

    def estimate(self, visit: Visit) -> dict[str, np.ndarray]:
        return {self.name: self.baseline(visit)}

    def baseline(self, visit: Visit) -> np.ndarray:
        raise NotImplementedError

    def absorb(self, visit: Visit) -> None:
        """Nothing is remembered."""

    def advantage(self, visit: Visit, baseline: np.ndarray) -> np.ndarray:
        return visit.reward - baseline

    def interval(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and variance of the values before the visit last estimated; None where a method has no width."""
        return None


class GroupMean(Competitor):
    """The mean of the prompt's own group: the reference that every gain is relative to."""

    name = "group_mean"

    def baseline(self, visit: Visit) -> np.ndarray:
        return visit.reward.mean(-1, keepdims=True)


class LeaveOneOut(Competitor):
    """The mean of the other samples of the group."""

    name = "loo"

    def baseline(self, visit: Visit) -> np.ndarray:
        r = visit.reward
        return (r.sum(-1, keepdims=True) - r) / (r.shape[-1] - 1)


class Constant(Competitor):
    """One number for all prompts: the true mean of the pool at this moment, which nobody really knows."""

    name = "const"

    def baseline(self, visit: Visit) -> np.ndarray:
        return np.broadcast_to(visit.mean_value[:, None, None], (*visit.ids.shape, 1))


class Oracle(Competitor):
    """The true value itself."""

    name = "oracle"

    def baseline(self, visit: Visit) -> np.ndarray:
        return visit.value[..., None]


class GroupStd(Competitor):
    """GRPO: group mean, advantage divided by the group's own standard deviation (plus 1e-4)."""

    name = "grpo_std"

    def baseline(self, visit: Visit) -> np.ndarray:
        return visit.reward.mean(-1, keepdims=True)

    def advantage(self, visit: Visit, baseline: np.ndarray) -> np.ndarray:
        return (visit.reward - baseline) / (visit.reward.std(-1, ddof=1, keepdims=True) + 1e-4)


class Krpo(Competitor):
    """KRPO (arXiv 2505.07527) as published: a new scalar filter per group, run in list order.

    ``Q = 1e-5, R = 1e-2, m_0 = 0, P_0 = 1``; sample n is compared with the state that already holds it and
    divided by ``sqrt(P_n) + 1e-8``.
    """

    name = "krpo"

    def baseline(self, visit: Visit) -> np.ndarray:
        r, mean, out = visit.reward, 0.0, np.empty(visit.reward.shape)
        for j, gain in enumerate(self._gains(r.shape[-1])[0]):
            mean = mean + gain * (r[..., j] - mean)
            out[..., j] = mean
        return out

    def advantage(self, visit: Visit, baseline: np.ndarray) -> np.ndarray:
        variance = np.array(self._gains(visit.reward.shape[-1])[1])
        return (visit.reward - baseline) / (np.sqrt(variance) + 1e-8)

    @staticmethod
    def _gains(n: int) -> tuple[list[float], list[float]]:
        variance, gains, variances = 1.0, [], []
        for _ in range(n):
            variance += 1e-5
            gains.append(variance / (variance + 1e-2))
            variance *= 1 - gains[-1]
            variances.append(variance)
        return gains, variances


class Kgrpo(Competitor):
    """K-GRPO as published: per prompt a new linear filter on features of the *responses*.

    ``theta ~ N(0, I)``, no process noise, ``R`` fixed; the estimate for sample j is its prediction from the
    samples before it. Feature vectors have norm 5 and share half of their direction within a prompt (our
    choice; the published features come from a language model).
    """

    name = "kgrpo"

    def __init__(self, dim: int = 64, noise: float = 0.01, seed: int = 0) -> None:
        self.dim, self.noise, self.rng = dim, noise, np.random.default_rng(seed)
        self.name = f"kgrpo_d{dim}_R{noise:g}"

    def baseline(self, visit: Visit) -> np.ndarray:
        r = visit.reward
        common = self.rng.normal(size=(*r.shape[:2], 1, self.dim))
        own = self.rng.normal(size=(*r.shape, self.dim))
        h = common + own
        h *= 5 / np.linalg.norm(h, axis=-1, keepdims=True)
        # Innovations of a sequential filter are the rows of L^-1 r for the Cholesky factor L of the gram.
        gram = h @ h.swapaxes(-1, -2) + self.noise * np.eye(r.shape[-1])
        factor = np.linalg.cholesky(gram)
        innovation = np.linalg.solve(factor, r[..., None])[..., 0] * np.diagonal(factor, axis1=-2, axis2=-1)
        return r - innovation


class JamesStein(Competitor):
    """Leave-one-out mean shrunk towards the other prompts of the batch (after arXiv 2511.03710).

    ``b = (1 - w) x_-j + w mu_-i``, ``w = s^2 / (s^2 + tau^2)``: the noise variance s^2 of a leave-one-out mean
    and the between-prompt variance tau^2 come from the other prompts only.
    """

    name = "js_loo"

    def baseline(self, visit: Visit) -> np.ndarray:
        r, (_, b, g) = visit.reward, visit.reward.shape
        mean, within = r.mean(-1), r.var(-1, ddof=1)
        others = (mean.sum(-1, keepdims=True) - mean) / (b - 1)
        square = ((mean**2).sum(-1, keepdims=True) - mean**2) / (b - 1)
        between = (square - others**2) * (b - 1) / (b - 2)
        noise = (within.sum(-1, keepdims=True) - within) / (b - 1)
        tau = np.maximum(between - noise / g, 0.0)
        shrink = np.divide(
            noise / (g - 1), noise / (g - 1) + tau, out=np.ones_like(tau), where=noise + tau > 0
        )
        own = (r.sum(-1, keepdims=True) - r) / (g - 1)
        return (1 - shrink[..., None]) * own + (shrink * others)[..., None]


class Ebpo(Competitor):
    """Group mean shrunk to a running global mean with running variances (after arXiv 2602.05165).

    The sample's own reward is part of its group mean, as published. Running statistics forget 5 % a step.
    """

    name = "ebpo"

    def __init__(self) -> None:
        self.stats: np.ndarray | None = None

    def baseline(self, visit: Visit) -> np.ndarray:
        mean = visit.reward.mean(-1)
        center, between, noise = self._moments(visit) if self.stats is None else self.stats
        per_group = noise / visit.reward.shape[-1]
        tau = np.maximum(between - per_group, 1e-8)
        weight = (tau / (tau + per_group))[:, None]
        return (weight * mean + (1 - weight) * center[:, None])[..., None]

    def absorb(self, visit: Visit) -> None:
        new = self._moments(visit)
        self.stats = new if self.stats is None else 0.95 * self.stats + 0.05 * new

    @staticmethod
    def _moments(visit: Visit) -> np.ndarray:
        mean = visit.reward.mean(-1)
        return np.stack([mean.mean(-1), mean.var(-1, ddof=1), visit.reward.var(-1, ddof=1).mean(-1)])


class Spo(Competitor):
    """SPO's tracker (arXiv 2509.13232) with a fixed forgetting factor: discounted success counts per prompt.

    ``v = a / (a + b)`` before the rewards, then ``a <- rho a + sum r``, ``b <- rho b + sum (1 - r)``: one
    forgetting per visit. Advantages are normalised over the batch.
    """

    def __init__(self, scenario: Scenario, worlds: int, memory: float = 0.875) -> None:
        self.name, self.memory = f"spo_{round(1000 * memory)}", memory
        self.good = np.full((worlds, scenario.prompts), 0.5)
        self.bad = self.good.copy()

    def baseline(self, visit: Visit) -> np.ndarray:
        rows = np.arange(len(visit.ids))[:, None]
        a, b = self.good[rows, visit.ids], self.bad[rows, visit.ids]
        return (a / (a + b))[..., None]

    def absorb(self, visit: Visit) -> None:
        rows, total = np.arange(len(visit.ids))[:, None], visit.reward.sum(-1)
        self.good[rows, visit.ids] = self.memory * self.good[rows, visit.ids] + total
        self.bad[rows, visit.ids] = self.memory * self.bad[rows, visit.ids] + visit.reward.shape[-1] - total

    def advantage(self, visit: Visit, baseline: np.ndarray) -> np.ndarray:
        a = visit.reward - baseline
        flat = a.reshape(len(a), -1)
        return (a - flat.mean(-1)[:, None, None]) / (flat.std(-1, ddof=1)[:, None, None] + 1e-8)


class Ceiling(Competitor):
    """What no method can beat: exact Bayes on a grid, knowing everything but the private parts themselves.

    It is told feature part, trend, drift rate, noise and the shape of the likelihood, and fuses the other
    samples of the group as the leave-one-out rule demands. Two samples per group stand for all of them.
    The walk is a chain on the grid with exactly the right variance after any gap.
    """

    name = "ceiling"

    def __init__(self, scenario: Scenario, worlds: int) -> None:
        self.c = scenario
        private = scenario.spread**2 * (1 - scenario.share)
        reach = 5 * np.sqrt(private + scenario.walk**2 * scenario.epochs) + 1e-9
        size = int(np.clip(2 * reach / 0.2, 61, 181)) | 1
        self.grid = np.linspace(-reach, reach, size)
        density = np.exp(-0.5 * self.grid**2 / max(private, 1e-12))
        self.belief = np.tile(density / density.sum(), (worlds, scenario.prompts, 1))
        self.last = np.zeros((worlds, scenario.prompts), dtype=int)
        self._chain = self._spectrum()
        self._pending: np.ndarray | None = None

    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.grid)
        step = np.eye(n, k=1) + np.eye(n, k=-1) - 2 * np.eye(n)
        step[0, 0] = step[-1, -1] = -1
        rate = 0.5 * self.c.walk**2 / self.c.per_epoch / (self.grid[1] - self.grid[0]) ** 2
        values, vectors = np.linalg.eigh(step)
        return rate * values, vectors

    def _predicted(self, visit: Visit) -> np.ndarray:
        rows, (values, vectors) = np.arange(len(visit.ids))[:, None], self._chain
        belief = self.belief[rows, visit.ids]
        gap = visit.step - self.last[rows, visit.ids]
        for each in np.unique(gap[gap > 0]):
            move = (vectors * np.exp(each * values)) @ vectors.T
            belief[gap == each] = np.maximum(belief[gap == each] @ move, 0.0)
        return belief

    def baseline(self, visit: Visit) -> np.ndarray:
        value = 1 / (1 + np.exp(-(visit.known[..., None] + self.grid)))
        prior = np.log(np.maximum(self._predicted(visit), 1e-300))
        r = visit.reward
        if self.c.noise == 0:
            hit, miss = np.log(np.maximum(value, 1e-300)), np.log(np.maximum(1 - value, 1e-300))
            wins = r.sum(-1)[..., None]
            total = prior + wins * hit + (r.shape[-1] - wins) * miss
            own = [np.where(r[..., j, None] > 0.5, hit, miss) for j in (0, 1)]
        else:
            scaled = np.stack([-0.5 * ((r - x) / self.c.noise) ** 2 for x in (0.0, 1.0)])
            low, high = np.exp(scaled - scaled.max(0))[..., None]
            total, own = prior, []
            for j in range(r.shape[-1]):
                term = np.log(low[..., j, :] + (high[..., j, :] - low[..., j, :]) * value + 1e-300)
                total = total + term
                own += [term] if j < 2 else []
        self._pending = _normalised(total)
        return np.stack([(_normalised(total - term) * value).sum(-1) for term in own], -1)

    def absorb(self, visit: Visit) -> None:
        rows = np.arange(len(visit.ids))[:, None]
        self.belief[rows, visit.ids] = self._pending
        self.last[rows, visit.ids] = visit.step


def _normalised(log_weight: np.ndarray) -> np.ndarray:
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)
