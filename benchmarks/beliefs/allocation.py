"""Section 6: how many completions a rule needs for what a fixed group of eight achieves, 0/1 rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.beliefs.beta_bank import BetaBank
from benchmarks.beliefs.rules import Draws, Rule
from benchmarks.beliefs.world import ACTIONS

BINS = (0.0, 0.02, 0.2, 0.5, 0.8, 0.98, 1.0)
REFERENCE = 8


@dataclass(frozen=True)
class Pool:
    """512 prompts with logit ~ N(center, 5^2), walking 0.3 per epoch; batches of 64.

    Warm: four epochs of fixed eights have been seen before the rule starts, then four epochs are scored. Cold:
    the rule starts with an empty tracker and its first two epochs are scored.
    """

    name: str
    center: float = 0.0
    warm: bool = True
    spread: float = 5.0
    walk: float = 0.3
    prompts: int = 512
    batch: int = 64

    @property
    def epochs(self) -> tuple[int, int]:
        return (4, 4) if self.warm else (0, 2)


POOLS = (
    Pool("U-shaped warm"),
    Pool("U-shaped cold", warm=False),
    Pool("hard-skewed warm", center=-4.0),
    Pool("easy-skewed warm", center=4.0),
)


def play(rule: Rule, pool: Pool, seeds: Sequence[int]) -> dict[str, dict[str, np.ndarray]]:
    """Run a rule at all its operating points.

    Returns:
        Per baseline: ``n`` mean completions per prompt, ``mixed`` share of groups with both outcomes, ``cosine``
        of the batch gradient with the true equal-weight one, each (points, seeds), and ``by_difficulty``
        (points, seeds, 6).
    """
    points, worlds = len(rule.points), len(rule.points) * len(seeds)
    truth = [_Truth(pool, seed) for seed in seeds]
    rng = np.random.default_rng([*seeds, len(rule.name)])
    per_epoch = pool.prompts // pool.batch
    tracker = BetaBank(worlds, pool.prompts, per_epoch)
    rule.start(worlds, pool.prompts, per_epoch)
    point = np.repeat(rule.points, len(seeds))[:, None]
    warm, scored = pool.epochs
    record: dict[str, list[np.ndarray]] = {}
    for step in range((warm + scored) * per_epoch):
        ids, policy = (
            np.tile(np.stack(x), (points, *[1] * x[0].ndim)) for x in zip(*(t.step() for t in truth))
        )
        seen = tracker.counts(ids, step)
        draws = Draws(policy, seen.matched(), rng)
        if step < warm * per_epoch:
            draws.draw(np.full(ids.shape, REFERENCE))
        else:
            rule.sample(draws, point, ids, step)
            for key, value in _measure(draws, rule.baselines).items():
                record.setdefault(key, []).append(value)
        tracker.absorb(ids, step, draws.wins, draws.n, seen)
    total = {
        k: np.nanmean(np.stack(v), 0).reshape(points, len(seeds), *v[0].shape[1:]) for k, v in record.items()
    }
    common = {k: total[k] for k in ("n", "mixed", "by_difficulty")}
    return {b: {**common, "cosine": total[f"cosine_{b}"]} for b in rule.baselines}


class _Truth:
    """One world of a pool: what is visited and the policy there."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool, self.rng = pool, np.random.default_rng([seed, 77])
        self.logit = pool.center + pool.spread * self.rng.normal(size=pool.prompts)
        self.wrong = self.rng.dirichlet(np.ones(ACTIONS - 1), size=pool.prompts)
        self.queue = np.empty(0, dtype=int)

    def step(self) -> tuple[np.ndarray, np.ndarray]:
        pace = np.sqrt(self.pool.batch / self.pool.prompts)
        self.logit = self.logit + self.pool.walk * pace * self.rng.normal(size=self.pool.prompts)
        if not len(self.queue):
            self.queue = self.rng.permutation(self.pool.prompts)
        ids, self.queue = self.queue[: self.pool.batch], self.queue[self.pool.batch :]
        p = 1 / (1 + np.exp(-self.logit[ids]))[:, None]
        return ids, np.concatenate([p, (1 - p) * self.wrong[ids]], axis=1)


def _measure(draws: Draws, baselines: Sequence[str]) -> dict[str, np.ndarray]:
    p = draws.policy[..., 0]
    true = -p[..., None] * draws.policy
    true[..., 0] += p
    out = {"n": draws.n.mean(1), "mixed": ((draws.wins > 0) & (draws.wins < draws.n)).mean(1)}
    for baseline in baselines:
        got = draws.gradient(baseline)
        size = np.sqrt((got**2).sum((1, 2)) * (true**2).sum((1, 2)))
        out[f"cosine_{baseline}"] = (got * true).sum((1, 2)) / np.maximum(size, 1e-300)
    place = np.digitize(p, BINS[1:-1])
    counts = np.stack([(place == k).sum(1) for k in range(len(BINS) - 1)], -1)
    sums = np.stack([np.where(place == k, draws.n, 0).sum(1) for k in range(len(BINS) - 1)], -1)
    out["by_difficulty"] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return out


def quality(cosine: np.ndarray) -> np.ndarray:
    """``cos^2 / (1 - cos^2)``: for an unbiased gradient proportional to the number of completions."""
    return cosine**2 / (1 - cosine**2)


def savings(n: np.ndarray, reached: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Completions of the reference over those the rule needs for ``wanted``, per seed; NaN = not in the sweep.

    Args: n, reached: (points, seeds). wanted: (seeds,) what fixed eights reach in the same worlds.
    The smallest count that reaches it counts, interpolated linearly in log n between operating points.
    """
    out = np.full(len(wanted), np.nan)
    for s, target in enumerate(wanted):
        order = np.argsort(n[:, s])
        order = order[n[order, s] > 0]
        x, y = np.log(n[order, s]), reached[order, s]
        for i in range(len(x) - 1):
            low, high = y[i], y[i + 1]
            if low <= target <= high and high > low:
                out[s] = REFERENCE / np.exp(x[i] + (target - low) / (high - low) * (x[i + 1] - x[i]))
                break
    return out


def log_det_rule(
    dim: int, noise: float, threshold: float, p: float, *, prompts: int = 200, cap: int = 16, seed: int = 0
) -> np.ndarray:
    """Samples at which the published stop rule ends, (prompts,): ``log det P`` below a threshold.

    Rewards are drawn and enter the filter's mean, but the rule never reads them. Features have norm 5;
    for dim = 1 they are all equal, as one projected coordinate of similar texts nearly is.
    """
    rng = np.random.default_rng(seed)
    taken = np.full(prompts, cap)
    for i in range(prompts):
        covariance, mean = np.eye(dim), np.zeros(dim)
        for n in range(1, cap + 1):
            h = rng.normal(size=dim)
            h *= 5 / np.linalg.norm(h)
            h = np.abs(h) if dim == 1 else h
            gain = covariance @ h / (h @ covariance @ h + noise)
            mean = mean + gain * (float(rng.random() < p) - h @ mean)
            covariance = covariance - np.outer(gain, h @ covariance)
            if np.linalg.slogdet(covariance)[1] < threshold:
                taken[i] = n
                break
    return taken


LOG_DET = (
    (1, 0.01, -17.5),
    (64, 0.01, -17.5),
    (64, 0.01, -19.5),
    (128, 0.01, -22.0),
    (128, 1.0, -1.5),
    (64, 0.01, -40.0),
)


def log_det_table(prompts: int) -> list[dict[str, Any]]:
    """Mean and standard deviation of the samples at stop, for hopeless, even and solved prompts."""
    rows = []
    for dim, noise, threshold in LOG_DET:
        row: dict[str, Any] = {"dim": dim, "R": noise, "threshold": threshold}
        for p in (0.01, 0.5, 0.99):
            taken = log_det_rule(dim, noise, threshold, p, prompts=prompts)
            row[f"p={p}"] = [float(taken.mean()), float(taken.std())]
        rows.append(row)
    return rows
