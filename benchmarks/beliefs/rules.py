"""Rules that decide how many completions each prompt of a step gets. Many worlds at once, shapes (W, B).

A rule reads a Beta posterior from one common tracker and draws through :class:`Draws`; it says with what
baseline its samples become a gradient. Comparison rules are our own short readings of the published ones,
hence "-like"; the last three classes are the package's gains and allocation, called as they are.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from kalman_rl.sampling.divide import divide, gradient_gains
from kalman_rl.sampling.gains import beta_signal, gradient_gain, mixed_group_gain

MAX_SAMPLES = 32
NORMAL = NormalDist()


class Draws:
    """The completions drawn for one step, kept as sums: enough for every baseline that depends on counts.

    Args:
        policy: (W, B, 8) probabilities, action 0 is correct. prior: (a, b), (W, B) each. rng: source of chance.
    """

    def __init__(
        self, policy: np.ndarray, prior: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
    ) -> None:
        self.policy, self.prior, self.rng = policy, prior, rng
        self.n = np.zeros(policy.shape[:2])
        self.wins = np.zeros(policy.shape[:2])
        self.up = np.zeros(policy.shape)  # summed scores e_a - pi of the successes, and of the failures
        self.down = np.zeros(policy.shape)
        self.causal = np.zeros(policy.shape)  # summed A (e_a - pi) with the round-causal baseline
        wrong = policy[..., 1:] / np.maximum(policy[..., 1:].sum(-1, keepdims=True), 1e-300)
        self._wrong = wrong / wrong.sum(-1, keepdims=True)

    @property
    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        return self.prior[0] + self.wins, self.prior[1] + self.n - self.wins

    def draw(self, k: np.ndarray) -> None:
        """``k`` (W, B) more completions of each prompt, as one round."""
        k = np.asarray(k, dtype=np.int64)
        a, b = self.posterior
        wins = self.rng.binomial(k, self.policy[..., 0])
        misses = k - wins
        up = -wins[..., None] * self.policy
        up[..., 0] += wins
        down = -misses[..., None] * self.policy
        down[..., 1:] += self.rng.multinomial(misses, self._wrong)
        size = np.maximum(a + b + k - 1, 1e-9)
        self.causal += (1 - (a + wins - 1) / size)[..., None] * up - ((a + wins) / size)[..., None] * down
        self.n, self.wins, self.up, self.down = self.n + k, self.wins + wins, self.up + up, self.down + down

    def gradient(self, baseline: str) -> np.ndarray:
        """(W, B, 8). "loo" and "tracker" average over a prompt's own samples, "tau" divides by the batch mean."""
        if baseline == "tau":
            return self.causal / np.maximum(self.n.mean(1), 1e-9)[:, None, None]
        a, b = self.prior if baseline == "tracker" else (0.0, 0.0)
        size = np.maximum(a + b + self.n - 1, 1e-9)
        up, down = 1 - (a + self.wins - 1) / size, -(a + self.wins) / size
        total = up[..., None] * self.up + down[..., None] * self.down
        usable = self.n > (0 if baseline == "tracker" else 1)  # a single sample has no others
        return np.where(usable[..., None], total / np.maximum(self.n, 1)[..., None], 0.0)


class Rule:
    """``points``: the operating points swept; ``baselines``: how its samples are turned into gradients."""

    name = ""
    points: tuple[float, ...] = ()
    baselines: tuple[str, ...] = ("loo",)

    def start(self, worlds: int, prompts: int, per_epoch: int) -> None:
        """A new run with ``worlds`` worlds."""

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        """Draw for one step; ``point`` (W, 1)."""
        raise NotImplementedError


class Fixed(Rule):
    """The same number for every prompt: the reference."""

    name = "fixed"
    points = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
    baselines = ("loo", "tracker")

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        draws.draw(np.broadcast_to(point, draws.n.shape))


class Dapo(Fixed):
    """Groups whose rewards are all equal are thrown away (after drawing them)."""

    name = "dapo-like"
    baselines = ("loo",)

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        super().sample(draws, point, ids, step)
        mixed = ((draws.wins > 0) & (draws.wins < draws.n))[..., None]
        draws.up, draws.down = draws.up * mixed, draws.down * mixed


class Greso(Rule):
    """A prompt whose last z groups were all equal is skipped with probability 1 - 0.5^z, at most 3/4."""

    name = "greso-like"
    points = (4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
    baselines = ("loo", "tracker")

    def start(self, worlds: int, prompts: int, per_epoch: int) -> None:
        self.streak = np.zeros((worlds, prompts))

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        rows = np.arange(len(ids))[:, None]
        streak = self.streak[rows, ids]
        skip = draws.rng.random(streak.shape) < np.minimum(1 - 0.5**streak, 0.75)
        draws.draw(np.where(skip, 0, point))
        mixed = (draws.wins > 0) & (draws.wins < draws.n)
        self.streak[rows, ids] = np.where(skip, streak, np.where(mixed, 0, streak + 1))


class Ada(Rule):
    """Reinforce-Ada: rounds of 4 until one success ("pos"), both outcomes ("mix") or half of each ("bal")."""

    points = (4.0, 8.0, 12.0, 16.0, 24.0, 32.0)

    def __init__(self, until: str) -> None:
        self.name, self.until = f"ada-{until}-like", until

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        half = point / 2
        while True:
            losses = draws.n - draws.wins
            done = {
                "pos": draws.wins > 0,
                "mix": (draws.wins > 0) & (losses > 0),
                "bal": (draws.wins >= np.minimum(half, 4)) & (losses >= np.minimum(half, 4)),
            }[self.until] | (draws.n >= point)
            if done.all():
                return
            draws.draw(np.where(done, 0, 4))


class Vip(Rule):
    """Variance-minimising counts fixed before sampling: n proportional to the predicted sqrt(p (1 - p)), >= 2."""

    name = "vip-like"
    points = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
    baselines = ("loo", "tracker")

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        a, b = draws.prior
        root = np.sqrt(a * b / ((a + b) * (a + b + 1)))
        wish = 2 + (point - 2) * root / root.mean(1, keepdims=True)
        ends = np.rint(np.cumsum(wish, 1))  # rounding that keeps the total
        draws.draw(np.diff(ends, axis=1, prepend=0.0))


class Knapsack(Rule):
    """Budgeted choice of counts: value p (1 - p) times the probability of a mixed group, 2 to 64 each."""

    name = "knapsack-like"
    points = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
    most = 64

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        a, b = draws.prior
        p = (a / (a + b))[..., None]
        n = np.arange(2, self.most)
        gain = p * (1 - p) * (p**n * (1 - p) + (1 - p) ** n * p)
        flat = gain.reshape(len(p), -1)
        spare = np.rint((point[:, 0] - 2) * draws.n.shape[1]).astype(int)
        ordered = np.sort(flat, axis=1)[:, ::-1]
        cut = ordered[np.arange(len(flat)), spare]
        draws.draw(2 + (gain > cut[:, None, None]).sum(-1))


class Price(Rule):
    """The package's gains at a fixed price: rounds until the gain per completion falls below it.

    A prompt whose gain is below the price before its first completion is skipped, but never for longer than
    four epochs. The first round has 2, later ones k.

    Args: aim: "gradient", "mixed_groups" or "width" (half-width of the 95 % interval above the point). k: round size.
    """

    baselines = ("tracker", "tau")

    def __init__(self, aim: str, k: int) -> None:
        self.aim, self.k = aim, k
        self.name = f"{'ours ' if aim != 'width' else ''}{aim} k{k}"
        self.points = {
            "gradient": (2e-2, 1e-2, 6e-3, 3.5e-3, 2e-3, 1.2e-3, 7e-4),
            "mixed_groups": (0.2, 0.12, 0.07, 0.045, 0.028, 0.018, 0.01),
            "width": (0.5, 0.4, 0.33, 0.28, 0.23, 0.19, 0.16),
        }[aim]

    def start(self, worlds: int, prompts: int, per_epoch: int) -> None:
        self.last = np.zeros((worlds, prompts), dtype=int)
        self.patience = 4 * per_epoch

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        rows = np.arange(len(ids))[:, None]
        due = step - self.last[rows, ids] >= self.patience
        draws.draw(np.where((self._gain(draws, 2) >= point) | due, 2, 0))
        while True:
            more = (draws.n > 0) & (draws.n + self.k <= MAX_SAMPLES)
            more &= self._gain(draws, self.k) >= point
            if not more.any():
                break
            draws.draw(np.where(more, self.k, 0))
        self.last[rows, ids] = np.where(draws.n > 0, step, self.last[rows, ids])

    def _gain(self, draws: Draws, k: int) -> np.ndarray:
        a, b = (torch.from_numpy(x) for x in draws.posterior)
        if self.aim == "gradient":
            return gradient_gain(beta_signal(a, b), torch.from_numpy(draws.n), k).numpy()
        if self.aim == "mixed_groups":
            wins, losses = torch.from_numpy(draws.wins), torch.from_numpy(draws.n - draws.wins)
            return mixed_group_gain(a, b, wins, losses, k).numpy()
        variance = a * b / ((a + b) ** 2 * (a + b + 1))
        return NORMAL.inv_cdf(0.975) * variance.sqrt().numpy()  # half of the value's 95 % interval


class Predictive(Rule):
    """The package's allocation before sampling: exactly optimal counts for the predicted signal, skips allowed."""

    name = "ours predictive"
    points = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
    baselines = ("tracker",)

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        signal = beta_signal(*(torch.from_numpy(x) for x in draws.prior))
        least = torch.zeros(draws.n.shape[1], dtype=torch.long)
        counts = np.empty(draws.n.shape, dtype=np.int64)
        for w, budget in enumerate(point[:, 0]):
            gains = gradient_gains(signal[w], MAX_SAMPLES)
            counts[w] = divide(
                gains, round(float(budget) * len(least)), least, least + MAX_SAMPLES
            ).counts.numpy()
        draws.draw(counts)


def rules() -> list[Rule]:
    """Every rule of the table, reference first."""
    ours: list[Rule] = [Price(aim, k) for aim in ("gradient", "mixed_groups") for k in (2, 4)]
    others: list[Any] = [Fixed(), Dapo(), Greso(), Vip(), Ada("pos"), Ada("mix"), Ada("bal"), Knapsack()]
    return [*others, Price("width", 4), *ours, Predictive()]
