"""Section 6, last table: which prompts of a pool to visit, 64 of 2048 a step, 8 completions each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.sampling.learnability import read_signal
from kalman_rl.sampling.prompts import PromptSelector


@dataclass(frozen=True)
class Bank:
    """2048 prompts with logit ~ N(center, 5^2) that walk ``walk`` per pass over the pool (32 steps)."""

    walk: float = 0.3
    center: float = 0.0
    prompts: int = 2048
    count: int = 64
    group: int = 8
    steps: int = 96
    spread: float = 5.0

    @property
    def name(self) -> str:
        return f"{self.prompts}, q={self.walk:g}, {self.center:g}"


BANKS = (Bank(), Bank(walk=1.0), Bank(center=-4.0))
METHODS = ("uniform", "weights", "greedy", "greedy+floor", "thompson", "ucb", "ids", "oracle")


def play(method: str, bank: Bank, seed: int) -> tuple[float, float]:
    """Mean ``4 p (1 - p)`` of the chosen prompts over all steps, and the share of the pool ever chosen."""
    rng = np.random.default_rng([seed, 9])
    logit = bank.center + bank.spread * rng.normal(size=bank.prompts)
    belief = BetaBelief(scale=False)
    known = method in ("uniform", "weights", "greedy", "thompson", "ids")
    kind = method if known else "greedy"
    every = None if method == "greedy+floor" else 0
    selector = PromptSelector(belief, range(bank.prompts), bank.count, method=kind, every=every, seed=seed)
    signal, seen = [], np.zeros(bank.prompts, dtype=bool)
    for step in range(bank.steps):
        logit = logit + bank.walk * np.sqrt(bank.count / bank.prompts) * rng.normal(size=bank.prompts)
        p = 1 / (1 + np.exp(-logit))
        if method == "oracle":
            ids = np.argsort(-p * (1 - p))[: bank.count]
        elif method == "ucb":
            ids = _upper(belief, bank, step)
        else:
            ids = np.array(selector.select(step=step))
        reward = torch.from_numpy((rng.random((bank.count, bank.group)) < p[ids, None]).astype(float).ravel())
        belief.update(np.repeat(ids, bank.group).tolist(), reward, step=step)
        signal.append(float((4 * p[ids] * (1 - p[ids])).mean()))
        seen[ids] = True
    return float(np.mean(signal)), float(seen.mean())


def _upper(belief: BetaBelief, bank: Bank, step: int) -> np.ndarray:
    """The largest p (1 - p) that one posterior standard deviation of p towards 1/2 allows."""
    read = read_signal(belief, range(bank.prompts), step=step)
    assert read.a is not None and read.b is not None
    a, b = read.a.numpy(), read.b.numpy()
    mean = a / (a + b)
    width = np.sqrt(mean * (1 - mean) / (a + b + 1))
    near = np.clip(0.5, mean - width, mean + width)
    return np.argsort(-near * (1 - near), kind="stable")[: bank.count]


def table(seeds: Sequence[int], banks: Sequence[Bank] = BANKS) -> dict[str, dict[str, np.ndarray]]:
    """Per bank and method (seeds, 2): signal and coverage."""
    return {
        bank.name: {m: np.array([play(m, bank, seed) for seed in seeds]) for m in METHODS} for bank in banks
    }
