"""Section 5.3: closed-loop training of a toy policy, where a better baseline has to pay in final reward.

256 prompts, 8 actions, one of them right. The policy is ``softmax(W z_i + B_i)``: a part shared by all prompts
(the right action is readable from z_i) and a private part. A step visits 64 prompts, G samples each::

    g_i = mean_j A_j (e_a - pi_i),   W += lr mean_i g_i z_i',   B_i += lr g_i / 16

Learning rates are chosen per method on other seeds. All runs of a method (learning rates times seeds) go side
by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.beliefs.competitors import Competitor
from benchmarks.beliefs.world import ACTIONS, LATENT, WIDTH, Scenario, Visit

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 8.0, 20.0)
TUNING_SEEDS = tuple(range(1000, 1004))
START_LOGIT, START_SPREAD = 1.6, 1.2


def final_reward(
    scenario: Scenario,
    build: Callable[[Scenario, int], Competitor],
    seeds: Sequence[int],
    rates: Sequence[float],
    steps: int = 96,
) -> np.ndarray:
    """True mean reward over all prompts after training, (rates, seeds).

    Args: scenario: its ``group``, ``noise``, ``prompts`` and ``batch`` are used. build: the method under test.
    """
    worlds = [_Bandit(scenario, seed) for _ in rates for seed in seeds]
    rate = np.repeat(rates, len(seeds))
    method = build(scenario, len(worlds))
    for step in range(steps):
        visit = _stack([world.visit(step) for world in worlds])
        for baseline in method.estimate(visit).values():
            advantage = method.advantage(visit, baseline)
            break
        method.absorb(visit)
        score = np.eye(ACTIONS)[visit.action] - visit.policy[:, :, None]
        gradient = np.matmul(advantage[:, :, None], score)[:, :, 0] / scenario.group
        for world, lr, ids, g in zip(worlds, rate, visit.ids, gradient):
            world.learn(ids, lr * g)
    return np.array([world.policy()[:, 0].mean() for world in worlds]).reshape(len(rates), len(seeds))


def start_reward(scenario: Scenario, seeds: Sequence[int]) -> np.ndarray:
    """What every run starts with, (seeds,)."""
    return np.array([_Bandit(scenario, seed).policy()[:, 0].mean() for seed in seeds])


def tuned(
    scenario: Scenario,
    build: Callable[[Scenario, int], Competitor],
    seeds: Sequence[int],
    tuning: Sequence[int] = TUNING_SEEDS,
    rates: Sequence[float] = RATES,
    steps: int = 96,
) -> tuple[np.ndarray, float]:
    """Final reward per seed at the rate that was best on the tuning seeds, and that rate."""
    best = rates[int(final_reward(scenario, build, tuning, rates, steps).mean(1).argmax())]
    return final_reward(scenario, build, seeds, [best], steps)[0], best


class _Bandit:
    """One policy and its prompts. Action 0 stands for the right one; the shared part sees the real names."""

    def __init__(self, c: Scenario, seed: int) -> None:
        self.c, self.rng = c, np.random.default_rng([seed, 5])
        self.z = self.rng.normal(size=(c.prompts, LATENT))
        answer = (self.z @ self.rng.normal(size=(LATENT, ACTIONS))).argmax(1)
        # names[i, k]: which shared output the k-th action of prompt i is; its first is the answer
        shift = np.array([self.rng.permutation(np.delete(np.arange(ACTIONS), a)) for a in answer])
        self.names = np.concatenate([answer[:, None], shift], axis=1)
        self.shared = np.zeros((LATENT, ACTIONS))
        self.private = START_SPREAD * self.rng.normal(size=(c.prompts, ACTIONS))
        self.private[:, 0] += START_LOGIT
        subspace = np.linalg.qr(self.rng.normal(size=(WIDTH, LATENT)))[0]
        self.features = self.z @ subspace.T + 0.02 * self.rng.normal(size=(c.prompts, WIDTH))

    def policy(self, ids: Any = slice(None)) -> np.ndarray:
        outputs = np.take_along_axis(self.z[ids] @ self.shared, self.names[ids], 1) + self.private[ids]
        weight = np.exp(outputs - outputs.max(1, keepdims=True))
        return weight / weight.sum(1, keepdims=True)

    def visit(self, step: int) -> dict[str, Any]:
        place = step * self.c.batch % self.c.prompts
        if place == 0:
            self.order = self.rng.permutation(self.c.prompts)
        ids = self.order[place : place + self.c.batch]
        policy = self.policy(ids)
        draw = self.rng.random((self.c.batch, self.c.group, 1))
        action = (draw > np.cumsum(policy, 1)[:, None, :-1]).sum(-1)
        noise = self.c.noise * self.rng.normal(size=action.shape)
        return {
            "step": step,
            "epoch": step * self.c.batch // self.c.prompts,
            "ids": ids,
            "reward": (action == 0) + noise,
            "value": policy[:, 0],
            "known": policy[:, 0],
            "mean_value": policy[:, 0].mean(),
            "features": self.features[ids],
            "action": action,
            "policy": policy,
        }

    def learn(self, ids: np.ndarray, change: np.ndarray) -> None:
        named = np.empty_like(change)
        np.put_along_axis(named, self.names[ids], change, 1)
        self.shared += self.z[ids].T @ named / len(ids)
        self.private[ids] += change / 16


def _stack(visits: list[dict[str, Any]]) -> Visit:
    arrays = {k: np.stack([v[k] for v in visits]) for k in visits[0] if k not in ("step", "epoch")}
    return Visit(step=visits[0]["step"], epoch=visits[0]["epoch"], **arrays)
