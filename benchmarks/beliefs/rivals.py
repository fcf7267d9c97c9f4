"""Rules that divide a budget among prompts, at equal budget: after CERO, AERO, VIP and the knapsack, ours, an oracle.

    python -m benchmarks.beliefs.rivals            # 20 worlds, about two minutes; writes rivals.json and rivals.md

All rules read the same Beta posterior and draw 8 completions per prompt on average, 0/1 rewards; the worlds are those
of section 6 (``allocation.py``). Dividing a budget by a belief about each prompt is published by all of them; what
differs is what is maximised, and whether rewards of the same batch are read. Each rule is our own short reading of its
paper, hence "-like". The oracle knows every p.

- ``signal``: mean p (1 - p) of the completions drawn.
- ``regret``: gradient variance sum_i v_i / n_i over the oracle's, minus 1; v = p (1 - p), and n = 0 counts as 1/2.
- ``mixed``: share of prompts with both outcomes.
- ``quality``: cos^2 / (1 - cos^2) of the gradient with the true one, over that of fixed eights in the same worlds.

With ``late``, three in ten completions come too late and are dropped, long ones first: wrong ones, and those of hard
prompts. They are paid for. Belief and gradient see the others only. ``bias`` is the belief's mean minus p, and ``hard``
the share of the completions of prompts with p < 0.5 that is kept over the share that is kept of the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import betaln

from benchmarks.beliefs.allocation import POOLS, Pool, _Truth, quality
from benchmarks.beliefs.beta_bank import BetaBank
from benchmarks.beliefs.command import study
from benchmarks.beliefs.rules import MAX_SAMPLES, Draws, Fixed, Knapsack, Predictive, Rule, Vip
from benchmarks.intervals import over_seeds, stored, text
from kalman_rl.sampling.divide import divide, gradient_gains
from kalman_rl.sampling.gains import beta_signal

BUDGET = 8.0
"""Completions per prompt of a batch."""
PILOT = 4
KEPT = (0.95, 0.6)
"""Share that comes in time: of right completions, and of wrong ones; a hard prompt's are later still."""


def expected(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``E[p (1 - p)]`` of Beta(a, b)."""
    return a * b / ((a + b) * (a + b + 1))


def best(gains: np.ndarray, spare: int) -> np.ndarray:
    """Counts (W, B) of the ``spare`` largest gains (W, B, most) of each world; rows of gains fall."""
    flat = gains.reshape(len(gains), -1)
    chosen = np.zeros_like(flat, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-flat, axis=1, kind="stable")[:, :spare], True, axis=1)
    return chosen.reshape(gains.shape).sum(-1)


def falling(signal: np.ndarray, taken: np.ndarray | float = 0.0) -> np.ndarray:
    """Gains (W, B, MAX_SAMPLES): the fall of ``v / n`` by each completion beyond ``taken``, n = 0 counted as 1/2."""
    n = np.asarray(taken, dtype=float)[..., None] + np.arange(MAX_SAMPLES)
    return signal[..., None] * (1 / np.maximum(n, 0.5) - 1 / (n + 1))


def variance(signal: np.ndarray, n: np.ndarray) -> np.ndarray:
    """``sum_i v_i / n_i`` of each world."""
    return (signal / np.maximum(n, 0.5)).sum(1)


class Oracle(Rule):
    """Knows p, and makes the variance of the gradient as small as it can be."""

    name = "oracle"
    baselines = ("tracker",)

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        p = draws.policy[..., 0]
        draws.draw(best(falling(p * (1 - p)), spare(draws, point)))


class Cero(Rule):
    """After CERO: ``E[p (1 - p)] log(1 + C_i)``, C_i all completions of a prompt so far, at one price per batch."""

    name = "cero-like"
    baselines = ("tracker",)

    def start(self, worlds: int, prompts: int, per_epoch: int) -> None:
        self.total = np.zeros((worlds, prompts))

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        rows = np.arange(len(ids))[:, None]
        done = self.total[rows, ids][..., None] + np.arange(MAX_SAMPLES)
        counts = best(expected(*draws.prior)[..., None] * np.log1p(1 / (1 + done)), spare(draws, point))
        self.total[rows, ids] += counts
        draws.draw(counts)


class Aero(Rule):
    """After AERO: four each, then the rest where the posterior still expects a group to become mixed."""

    name = "aero-like"
    baselines = ("tracker",)

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        draws.draw(np.full(ids.shape, PILOT))
        a, b = (x[..., None] for x in draws.posterior)
        n = np.arange(MAX_SAMPLES)
        first_win = np.exp(betaln(a + 1, b + n) - betaln(a, b))  # n more losses, then a win
        first_loss = np.exp(betaln(a + n, b + 1) - betaln(a, b))
        none, every = draws.wins == 0, draws.wins == draws.n
        hope = np.where(none[..., None], first_win, np.where(every[..., None], first_loss, 0.0))
        left_over = 1e-6 * falling(expected(*draws.posterior), draws.n)  # once no group can be helped
        draws.draw(best(hope + left_over, spare(draws, point)))


class Rounds(Rule):
    """Ours: half of the budget by the prior, the rest by what the first half showed."""

    name = "ours, two rounds"
    baselines = ("tracker",)

    def sample(self, draws: Draws, point: np.ndarray, ids: np.ndarray, step: int) -> None:
        for share in (0.5, 1.0):
            signal = beta_signal(*(torch.from_numpy(x) for x in draws.posterior))
            taken = torch.from_numpy(draws.n).long()
            most = torch.full_like(taken[0], MAX_SAMPLES)
            counts = np.stack(
                [
                    divide(gradient_gains(signal[w], MAX_SAMPLES), int(total), taken[w], most).counts.numpy()
                    for w, total in enumerate(draws.n.sum(1) + spare(draws, share * point))
                ]
            )
            draws.draw(counts - draws.n)


def spare(draws: Draws, point: np.ndarray) -> int:
    """Completions of the batch that are not drawn yet, alike in all worlds."""
    return round(float(point[0, 0]) * draws.n.shape[1] - float(paid(draws)[0].sum()))


def paid(draws: Draws) -> np.ndarray:
    """Completions (W, B) that were drawn, late ones among them."""
    return getattr(draws, "paid", draws.n)


class LateDraws(Draws):
    """Draws of which some come too late: a wrong one, and one of a hard prompt, with higher probability."""

    def draw(self, k: np.ndarray) -> None:
        k = np.asarray(k, dtype=np.int64)
        p = self.policy[..., 0]
        slow = 0.8 + 0.2 * p
        right = self.rng.binomial(k, p)
        kept = self.rng.binomial(right, KEPT[0] * slow), self.rng.binomial(k - right, KEPT[1] * slow)
        self.paid = getattr(self, "paid", 0) + k
        self._take(*kept)

    def _take(self, wins: np.ndarray, misses: np.ndarray) -> None:
        policy, wrong = self.policy, self._wrong
        self.up -= wins[..., None] * policy
        self.up[..., 0] += wins
        self.down -= misses[..., None] * policy
        self.down[..., 1:] += self.rng.multinomial(misses, wrong)
        self.n, self.wins = self.n + wins + misses, self.wins + wins


def rivals() -> list[Rule]:
    """Every rule, the reference first and the oracle last."""
    return [Fixed(), Vip(), Knapsack(), Cero(), Aero(), Predictive(), Rounds(), Oracle()]


def play(rule: Rule, pool: Pool, seeds: Sequence[int], *, late: bool = False) -> dict[str, np.ndarray]:
    """Numbers of a rule at the common budget, (seeds,) each."""
    worlds, per_epoch = len(seeds), pool.prompts // pool.batch
    truth = [_Truth(pool, seed) for seed in seeds]
    rng = np.random.default_rng([*seeds, len(rule.name)])
    tracker = BetaBank(worlds, pool.prompts, per_epoch)
    rule.start(worlds, pool.prompts, per_epoch)
    point = np.full((worlds, 1), BUDGET)
    kind = LateDraws if late else Draws
    warm, scored = pool.epochs
    record: dict[str, list[np.ndarray]] = {}
    for step in range((warm + scored) * per_epoch):
        ids, policy = (np.stack(x) for x in zip(*(t.step() for t in truth)))
        seen = tracker.counts(ids, step)
        draws = kind(policy, seen.matched(), rng)
        if step < warm * per_epoch:
            draws.draw(np.full(ids.shape, round(BUDGET)))
        else:
            rule.sample(draws, point, ids, step)
            for key, value in _measured(draws, seen.moments()[0]).items():
                record.setdefault(key, []).append(value)
        tracker.absorb(ids, step, draws.wins, draws.n, seen)
    return {key: np.stack(values).mean(0) for key, values in record.items()}


def _measured(draws: Draws, told: np.ndarray) -> dict[str, np.ndarray]:
    p, drawn = draws.policy[..., 0], paid(draws)
    v = p * (1 - p)
    least = variance(v, best(falling(v), round(BUDGET * p.shape[1])))
    true = -p[..., None] * draws.policy
    true[..., 0] += p
    got = draws.gradient("tracker")
    size = np.sqrt((got**2).sum((1, 2)) * (true**2).sum((1, 2)))
    hard = p < 0.5
    kept = [(draws.n * part).sum(1) / np.maximum((drawn * part).sum(1), 1) for part in (hard, ~hard)]
    return {
        "completions": drawn.mean(1),
        "signal": (drawn * v).sum(1) / drawn.sum(1),
        "regret": variance(v, draws.n) / least - 1,
        "mixed": ((draws.wins > 0) & (draws.wins < draws.n)).mean(1),
        "cosine": (got * true).sum((1, 2)) / np.maximum(size, 1e-300),
        "bias": (told - p).mean(1),
        "hard": kept[0] / np.maximum(kept[1], 1e-9),
    }


def measure(pools: Sequence[Pool], seeds: Sequence[int]) -> list[dict[str, object]]:
    """One row per pool, rule, and whether late completions are dropped."""
    rows: list[dict[str, object]] = []
    for pool in pools:
        for late in (False, True):
            found = {rule.name: play(rule, pool, seeds, late=late) for rule in rivals()}
            for numbers in found.values():
                numbers["quality"] = quality(numbers.pop("cosine"))
            reference = found["fixed"]["quality"]
            for name, numbers in found.items():
                numbers["quality"] = numbers["quality"] / reference
                means = {key: list(over_seeds(value)) for key, value in numbers.items()}
                rows.append({"pool": pool.name, "late": late, "rule": name, "numbers": means})
    return rows


def render(rows: Sequence[dict[str, object]], command: str, worlds: int) -> str:
    """Tables as Markdown."""
    head = "\n\n".join((__doc__ or "").strip().split("\n\n")[2:])
    lines = ["# Rules that divide a budget, at equal budget", "", head, ""]
    for pool in dict.fromkeys(row["pool"] for row in rows):
        for late in (False, True):
            lines += [f"## {pool}{', late completions dropped' if late else ''}", ""]
            keys = ["signal", "regret", "mixed", "quality", "bias", *(["hard"] if late else [])]
            lines += ["| rule | " + " | ".join(keys) + " |", "|" + "---|" * (1 + len(keys))]
            for row in rows:
                if row["pool"] == pool and row["late"] == late:
                    numbers = row["numbers"]
                    assert isinstance(numbers, dict)
                    cells = [text(stored(numbers[key]), 3) for key in keys]
                    lines.append(f"| {row['rule']} | " + " | ".join(cells) + " |")
            lines.append("")
    lines.append(f"`{command}`, {worlds} worlds, 95 % intervals over worlds.")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return study("rivals", lambda seeds: measure(POOLS, seeds), render, argv)


if __name__ == "__main__":
    sys.exit(main())
